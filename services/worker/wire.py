"""Protobuf <-> a worker's work."""

from __future__ import annotations

from functools import lru_cache

from cortex_common.errors import InvalidArgumentError
from cortex_common.ids import JobId, NodeName, RoundNumber, SeatIndex
from cortex_common.job.spec import JobSpec
from cortex_common.job.wire import spec_from_proto
from cortex_common.pb.v1 import coordinator_pb2, job_pb2
from cortex_common.transfer.wire import data_key_from_proto, receipt_to_proto
from services.worker.domain import (
    Assignment,
    Evaluate,
    Evaluated,
    Failed,
    Hold,
    Initialise,
    Outcome,
    Train,
    Trained,
    Work,
)


def assignment_from_proto(proto: coordinator_pb2.Assignment) -> Assignment:
    """Read an assignment.

    Raises:
        InvalidArgumentError: this worker does not understand it; says what.
    """
    if not proto.assignment_id or not proto.job_id or proto.seats < 1 or proto.seat >= proto.seats:
        raise InvalidArgumentError(f"assignment {proto.assignment_id!r}: id, job or seat {proto.seat} is impossible")
    return Assignment(
        assignment_id=proto.assignment_id,
        job_id=JobId(proto.job_id),
        transfer_id=JobId(proto.transfer_job_id or proto.job_id),
        round=RoundNumber(proto.round),
        attempt=proto.attempt,
        fence=proto.fence,
        seat=SeatIndex(proto.seat),
        seats=proto.seats,
        spec=_spec(proto.job.SerializeToString(deterministic=True)),
        data_key=data_key_from_proto(proto.data_key),
        aggregator=NodeName(proto.aggregator),
        aggregator_address=proto.aggregator_address,
        base_sha256=proto.base.sha256 if proto.HasField("base") else "",
        chunk_elements=proto.chunk_elements,
        work=_work(proto),
        included_round=proto.included_round if proto.HasField("included_round") else None,
        base_seats=frozenset(SeatIndex(seat) for seat in proto.base_seats),
    )


@lru_cache(maxsize=64)
def _spec(serialized: bytes) -> JobSpec:
    """A job comes again with each of its assignments: it is read once."""
    return spec_from_proto(job_pb2.JobSpec.FromString(serialized))


def report_to_proto(assignment: Assignment, outcome: Outcome) -> coordinator_pb2.ReportRequest:
    """How work ended, without the sender's name."""
    report = _report_of(assignment)
    match outcome:
        case Trained():
            report.trained.CopyFrom(_trained(outcome))
        case Evaluated():
            for score in outcome.slices:
                report.evaluated.slices.add(
                    slice=score.slice, examples=score.examples, loss_sum=score.loss_sum, correct=score.correct
                )
            report.evaluated.SetInParent()
        case Failed():
            report.failed.reason = outcome.reason
            report.failed.permanent = outcome.is_permanent
        case _:
            raise InvalidArgumentError(f"{type(outcome).__name__} is not reported")
    return report


def activity_to_proto(
    assignment: Assignment, activity: str, progress: float, metrics: dict[str, float]
) -> coordinator_pb2.ReportRequest:
    """What is being done, without the sender's name."""
    report = _report_of(assignment)
    report.activity.activity = activity
    report.activity.progress = progress
    report.activity.metrics.update(metrics)
    return report


def refusal_to_proto(proto: coordinator_pb2.Assignment, reason: str) -> coordinator_pb2.ReportRequest:
    """The failure of an assignment that was not understood: not the job's fault, a newer worker may know it."""
    return coordinator_pb2.ReportRequest(
        assignment_id=proto.assignment_id,
        job_id=proto.job_id,
        round=proto.round,
        seat=proto.seat,
        failed=coordinator_pb2.FailedReport(reason=reason, permanent=False),
    )


def _work(proto: coordinator_pb2.Assignment) -> Work:
    match proto.WhichOneof("work"):
        case "initialise":
            return Initialise()
        case "train":
            return Train()
        case "evaluate":
            return Evaluate(tuple(proto.evaluate.slice), proto.evaluate.slices)
        case "hold":
            return Hold()
        case _:
            raise InvalidArgumentError(
                f"assignment {proto.assignment_id}: no work that this worker knows (initialise, train, evaluate, hold)"
            )


def _report_of(assignment: Assignment) -> coordinator_pb2.ReportRequest:
    return coordinator_pb2.ReportRequest(
        assignment_id=assignment.assignment_id,
        job_id=assignment.job_id,
        round=assignment.round,
        seat=assignment.seat,
    )


def _trained(outcome: Trained) -> coordinator_pb2.TrainedReport:
    return coordinator_pb2.TrainedReport(
        receipt=receipt_to_proto(outcome.receipt),
        train_seconds=outcome.train_seconds,
        exchange_seconds=outcome.exchange_seconds,
        examples=outcome.examples,
        steps=outcome.steps,
        metrics=dict(outcome.metrics),
        bytes_up=outcome.bytes_up,
        bytes_down=outcome.bytes_down,
    )
