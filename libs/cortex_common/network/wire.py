"""Protobuf <-> the messages between a node and its network."""

from __future__ import annotations

from functools import lru_cache

from cortex_common.errors import CortexError, InvalidArgumentError
from cortex_common.ids import JobId, NodeName, RoundNumber, SeatIndex
from cortex_common.job.spec import JobSpec
from cortex_common.job.wire import spec_from_proto
from cortex_common.network import messages as m
from cortex_common.network import work as w
from cortex_common.pb.v1 import aggregator_pb2, coordinator_pb2, job_pb2
from cortex_common.transfer.wire import data_key_from_proto, receipt_to_proto


def attend_request(hello: m.Hello, sealing_key: bytes) -> coordinator_pb2.AttendRequest:
    """Open the node's line; data keys are wrapped to this public key."""
    return coordinator_pb2.AttendRequest(
        worker=hello.node,
        region=hello.region,
        incarnation=hello.incarnation,
        slots=hello.slots,
        sealing_key=sealing_key,
    )


def assignments_from_proto(response: coordinator_pb2.AttendResponse, *, is_first: bool = False) -> m.Assignments:
    """Everything wanted; what this version does not understand is among the unreadable ones."""
    read: list[w.Assignment] = []
    unreadable: list[w.Unreadable] = []
    for proto in response.assignments:
        try:
            read.append(assignment_from_proto(proto))
        except CortexError as error:
            place = w.Place(proto.assignment_id, proto.job_id, proto.round, proto.seat)
            unreadable.append(w.Unreadable(place, error.message))
    return m.Assignments(tuple(read), tuple(unreadable), is_first)


def assignment_from_proto(proto: coordinator_pb2.Assignment) -> w.Assignment:
    """Read an assignment.

    Raises:
        InvalidArgumentError: this node does not understand it; says what.
    """
    if not proto.assignment_id or not proto.job_id or proto.seats < 1 or proto.seat >= proto.seats:
        raise InvalidArgumentError(f"assignment {proto.assignment_id!r}: id, job or seat {proto.seat} is impossible")
    return w.Assignment(
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
        older_keys=tuple(data_key_from_proto(key) for key in proto.older_keys),
        signed_job=proto.signed_job,
        sealed=_sealed(proto),
    )


def report_request(report: m.TrainingMetrics | m.WorkResult, hello: m.Hello) -> coordinator_pb2.ReportRequest:
    """A report as the coordinator takes it."""
    request = coordinator_pb2.ReportRequest(
        worker=hello.node,
        incarnation=hello.incarnation,
        assignment_id=report.place.assignment_id,
        job_id=report.place.job_id,
        round=report.place.round,
        seat=report.place.seat,
    )
    if isinstance(report, m.TrainingMetrics):
        request.activity.activity = report.activity
        request.activity.progress = report.progress
        request.activity.metrics.update(report.metrics)
        return request
    outcome = report.outcome
    match outcome:
        case w.Trained():
            request.trained.CopyFrom(_trained(outcome))
        case w.Evaluated():
            for score in outcome.slices:
                request.evaluated.slices.add(
                    slice=score.slice, examples=score.examples, loss_sum=score.loss_sum, correct=score.correct
                )
            request.evaluated.SetInParent()
        case w.Failed():
            request.failed.reason = outcome.reason
            request.failed.permanent = outcome.is_permanent
            for refusal in outcome.refusals:
                request.failed.refusals.add(rule=refusal.rule, message=refusal.message)
    return request


def pull_request(pull: m.ModelPull) -> aggregator_pb2.PullModelRequest:
    """A download as the aggregator takes it."""
    return aggregator_pb2.PullModelRequest(
        job_id=pull.job_id,
        sha256=pull.sha256,
        held_sha256=pull.held_sha256,
        first_chunk=pull.first_chunk,
        round=pull.round,
    )


def pull_from_proto(request: aggregator_pb2.PullModelRequest) -> m.ModelPull:
    """A download as it is asked for over WebSocket."""
    return m.ModelPull(request.job_id, request.sha256, request.held_sha256, request.first_chunk, request.round)


def _sealed(proto: coordinator_pb2.Assignment) -> w.SealedPart | None:
    if not proto.HasField("sealed"):
        return None
    part = proto.sealed
    if len(part.shard) != len(part.key):
        raise InvalidArgumentError(f"assignment {proto.assignment_id}: {len(part.shard)} shards, {len(part.key)} keys")
    return w.SealedPart(part.manifest, tuple(part.shard), tuple(data_key_from_proto(key) for key in part.key))


@lru_cache(maxsize=64)
def _spec(serialized: bytes) -> JobSpec:
    """A job comes again with each of its assignments: it is read once."""
    return spec_from_proto(job_pb2.JobSpec.FromString(serialized))


def _work(proto: coordinator_pb2.Assignment) -> w.Work:
    match proto.WhichOneof("work"):
        case "initialise":
            return w.Initialise()
        case "train":
            return w.Train()
        case "evaluate":
            return w.Evaluate(tuple(proto.evaluate.slice), proto.evaluate.slices)
        case "hold":
            return w.Hold()
        case _:
            raise InvalidArgumentError(
                f"assignment {proto.assignment_id}: no work that this worker knows (initialise, train, evaluate, hold)"
            )


def _trained(outcome: w.Trained) -> coordinator_pb2.TrainedReport:
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
