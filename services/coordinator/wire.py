"""Protobuf to domain and back for the coordinator; the only file here that knows both."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence

from cortex_common.errors import InvalidArgumentError
from cortex_common.identity import Role
from cortex_common.ids import JobId, NodeName, SeatIndex, Sha256Hex
from cortex_common.job.site_policy import Refusal
from cortex_common.job.spec import JobSpec
from cortex_common.job.wire import spec_to_proto
from cortex_common.pb.v1 import aggregator_pb2, common_pb2, coordinator_pb2, job_pb2, transfer_pb2
from cortex_common.security.objects import DataKey
from cortex_common.security.sealing import Wrap
from cortex_common.transfer.wire import data_key_to_proto
from services.coordinator.domain.assignments import Work
from services.coordinator.domain.job import Contribution, Trained, Version
from services.coordinator.domain.seen import AggregatedVersion, AggregatorView, Dataset, Failure, SliceScore, WorkerView
from services.coordinator.orders import DataKeys, Order, RoundOrder, SealedPart, SealOrder, Upstream

_MAX_JOBS = 64
_MAX_REFUSALS = 32
_ROLES = {common_pb2.Role.Value(f"ROLE_{role.name}"): role for role in Role}
_JOBS: dict[int, tuple[JobSpec, job_pb2.JobSpec]] = {}
"""Messages of the newest specifications, by the id of the object that is held beside them."""


def open_request(order: RoundOrder, wrap: Wrap) -> aggregator_pb2.OpenRoundRequest:
    """Open this round."""
    aggregation = order.spec.aggregation
    codec, options = ("none", {}) if order.is_plain else order.spec.upload_of(order.round)
    download_codec, download_options = order.spec.download_of(order.round)
    return aggregator_pb2.OpenRoundRequest(
        round=aggregator_pb2.RoundSpec(
            job_id=order.job_id,
            round=order.round,
            attempt=order.attempt,
            fence=order.fence,
            base_sha256=order.base_sha256,
            seats=[aggregator_pb2.Seat(seat=seat, worker=worker) for seat, worker in sorted(order.seats.items())],
            codec=codec,
            codec_options=_canonical(options),
            strategy=aggregation.strategy,
            strategy_options=_canonical(aggregation.options),
            chunk_elements=order.chunk_elements,
            data_key=_key(order.keys.current, order.job_id, wrap),
            older_keys=_older(order.keys, order.job_id, wrap),
            upstream=_upstream(order.upstream()) if order.upstream else None,
            download_codec=download_codec,
            download_options=_canonical(download_options),
            readers=order.readers,
        )
    )


def _upstream(upstream: Upstream) -> aggregator_pb2.Upstream:
    return aggregator_pb2.Upstream(
        aggregator=upstream.aggregator,
        address=upstream.address,
        job_id=upstream.job_id,
        seat=upstream.seat,
        model_job_id=upstream.model_job_id,
    )


def _canonical(options: Mapping[str, object]) -> str:
    return json.dumps(options, sort_keys=True, separators=(",", ":")) if options else ""


def watch_request(order: RoundOrder) -> aggregator_pb2.WatchRoundRequest:
    """Watch this round."""
    return aggregator_pb2.WatchRoundRequest(job_id=order.job_id, round=order.round, attempt=order.attempt)


def seal_request(order: SealOrder, wrap: Wrap) -> aggregator_pb2.SealRoundRequest:
    """Fold this list."""
    return aggregator_pb2.SealRoundRequest(
        job_id=order.job_id,
        round=order.round,
        attempt=order.attempt,
        fence=order.fence,
        contributions=_listed(order),
        data_key=_key(order.keys.current, order.job_id, wrap),
        older_keys=_older(order.keys, order.job_id, wrap),
    )


def forward_request(order: SealOrder, wrap: Wrap) -> aggregator_pb2.ForwardRoundRequest:
    """Push the mean of this list one tier up."""
    return aggregator_pb2.ForwardRoundRequest(
        job_id=order.job_id,
        round=order.round,
        attempt=order.attempt,
        fence=order.fence,
        contributions=_listed(order),
        data_key=_key(order.keys.current, order.job_id, wrap),
        older_keys=_older(order.keys, order.job_id, wrap),
    )


def reseal_request(job_id: JobId, fence: int, keys: DataKeys, wrap: Wrap) -> aggregator_pb2.ResealJobRequest:
    """Seal everything of a job anew."""
    return aggregator_pb2.ResealJobRequest(
        job_id=job_id,
        fence=fence,
        data_key=_key(keys.current, job_id, wrap),
        older_keys=_older(keys, job_id, wrap),
    )


def _key(key: DataKey, job_id: JobId, wrap: Wrap) -> common_pb2.DataKey:
    return data_key_to_proto(wrap(job_id, key))


def _older(keys: DataKeys, job_id: JobId, wrap: Wrap) -> list[common_pb2.DataKey]:
    return [_key(key, job_id, wrap) for key in keys.older]


def _listed(order: SealOrder) -> list[aggregator_pb2.Contribution]:
    return [
        aggregator_pb2.Contribution(
            seat=entry.seat, worker=entry.worker, content_sha256=entry.content_sha256, weight=entry.weight
        )
        for entry in order.contributions
    ]


def prune_request(job_id: JobId, fence: int, keep: Sequence[int], *, ended: bool) -> aggregator_pb2.PruneJobRequest:
    """Erase all but these."""
    return aggregator_pb2.PruneJobRequest(job_id=job_id, fence=fence, keep_rounds=sorted(keep), ended=ended)


def accepted_of(answer: aggregator_pb2.WatchRoundResponse) -> dict[SeatIndex, Contribution]:
    """The updates an aggregator holds durably."""
    return {
        SeatIndex(progress.seat): contribution_of(progress.receipt)
        for progress in answer.seats
        if progress.HasField("receipt")
    }


def contribution_of(receipt: transfer_pb2.Receipt) -> Contribution:
    """What a receipt is for."""
    return Contribution(
        seat=SeatIndex(receipt.seat),
        worker=NodeName(receipt.worker),
        content_sha256=Sha256Hex(receipt.content_sha256),
        weight=receipt.weight,
        size_bytes=receipt.size_bytes,
    )


def received_of(answer: aggregator_pb2.WatchRoundResponse) -> dict[SeatIndex, float]:
    """Share of each upload in progress."""
    return {
        SeatIndex(progress.seat): progress.chunks_received / progress.chunks_total
        for progress in answer.seats
        if progress.chunks_total and not progress.HasField("receipt")
    }


def aggregated_of(answer: aggregator_pb2.SealRoundResponse) -> AggregatedVersion:
    """The version an aggregator made."""
    version = answer.version
    return AggregatedVersion(
        version.sha256, version.manifest_sha256, version.parameters, version.size_bytes, answer.update_norm
    )


def attend_response(orders: Sequence[Order], wrap: Wrap) -> coordinator_pb2.AttendResponse:
    """What a worker has to do now."""
    return coordinator_pb2.AttendResponse(assignments=[_assignment(order, wrap) for order in orders])


def _assignment(order: Order, wrap: Wrap) -> coordinator_pb2.Assignment:
    given = order.assignment
    message = coordinator_pb2.Assignment(
        assignment_id=given.id,
        job_id=given.job_id,
        round=given.round,
        attempt=given.attempt,
        fence=order.fence,
        seat=given.seat,
        seats=given.seats,
        job=_job(order.spec),
        data_key=_key(order.keys.current, given.job_id, wrap),
        older_keys=_older(order.keys, given.job_id, wrap),
        aggregator=order.aggregator,
        aggregator_address=order.address,
        base=_version(given.job_id, order.base) if order.base else None,
        chunk_elements=order.chunk_elements,
        transfer_job_id=order.transfer_id,
        included_round=order.included_round,
        base_seats=order.base_seats,
        signed_job=order.signed_job,
        sealed=_sealed(order.sealed, given.job_id, wrap) if order.sealed else None,
    )
    if given.work is Work.EVALUATE:
        message.evaluate.slice.extend(given.slices)
        message.evaluate.slices = given.seats
    else:
        getattr(message, given.work.value).SetInParent()
    return message


def _sealed(part: SealedPart, job_id: JobId, wrap: Wrap) -> coordinator_pb2.SealedPart:
    keys = [_key(key, job_id, wrap) for key in part.keys]
    return coordinator_pb2.SealedPart(manifest=part.manifest, shard=part.shards, key=keys)


def _job(spec: JobSpec) -> job_pb2.JobSpec:
    """The message of a job's specification, made once: it goes out with each of its assignments."""
    known = _JOBS.get(id(spec))
    if known is None or known[0] is not spec:
        while len(_JOBS) >= _MAX_JOBS:
            del _JOBS[next(iter(_JOBS))]
        known = _JOBS[id(spec)] = (spec, spec_to_proto(spec))
    return known[1]


def _version(job_id: JobId, version: Version) -> common_pb2.ModelVersion:
    return common_pb2.ModelVersion(
        job_id=job_id,
        round=version.round,
        sha256=version.sha256,
        manifest_sha256=version.manifest_sha256,
        parameters=version.parameters,
        size_bytes=version.size_bytes,
    )


def trained_of(request: coordinator_pb2.ReportRequest) -> Trained:
    """A worker's account of its training."""
    report = request.trained
    return Trained(
        worker=NodeName(request.worker),
        train_s=_finite(report.train_seconds),
        exchange_s=_finite(report.exchange_seconds),
        examples=report.examples,
        steps=report.steps,
        metrics={name: value for name, value in report.metrics.items() if math.isfinite(value)},
        bytes_down=report.bytes_down,
    )


def _finite(seconds: float) -> float:
    return seconds if math.isfinite(seconds) else 0.0


def scores_of(request: coordinator_pb2.ReportRequest) -> dict[int, SliceScore]:
    """Evaluated slices."""
    return {
        result.slice: SliceScore(result.examples, result.loss_sum, result.correct)
        for result in request.evaluated.slices
    }


def failure_of(request: coordinator_pb2.ReportRequest) -> Failure:
    """Why a worker could not do its work."""
    return Failure(NodeName(request.worker), request.failed.reason or "no reason given", request.failed.permanent)


def refusals_of(request: coordinator_pb2.ReportRequest) -> tuple[Refusal, ...]:
    """Rules of the worker's site that the job breaks; none if that is not why it failed."""
    return tuple(Refusal(each.rule[:100], each.message[:4096]) for each in request.failed.refusals[:_MAX_REFUSALS])


def round_of_assignment(assignment_id: str) -> tuple[JobId, int, int]:
    """Job, round and attempt an assignment id names.

    Raises:
        InvalidArgumentError: not an id of ours.
    """
    parts = assignment_id.split("/")
    numbers = parts[1].split(".") if len(parts) >= 4 else []
    if len(numbers) != 2 or not all(number.isdecimal() for number in numbers):
        raise InvalidArgumentError(f"assignment_id: {assignment_id!r} given; allowed: the id of an assignment")
    return JobId(parts[0]), int(numbers[0]), int(numbers[1])


def worker_of(node: common_pb2.Node) -> WorkerView:
    """A worker as discovery describes it."""
    return WorkerView(
        name=NodeName(node.name),
        region=node.region,
        slots=node.resources.slots,
        is_expired=node.health == common_pb2.NODE_HEALTH_EXPIRED,
        is_suspect=node.health == common_pb2.NODE_HEALTH_SUSPECT,
        gpus=len(node.resources.gpus),
        memory_bytes=node.resources.memory_bytes,
        cpu_utilisation=node.resources.cpu_utilisation,
        datasets={dataset.name: _dataset(dataset) for dataset in node.datasets},
    )


def _dataset(dataset: common_pb2.DatasetInfo) -> Dataset:
    elements = 1
    for size in dataset.input_shape:
        elements *= size
    return Dataset(elements, dataset.classes)


def aggregator_of(node: common_pb2.Node) -> AggregatorView:
    """An aggregator as discovery describes it."""
    is_live = node.health != common_pb2.NODE_HEALTH_EXPIRED
    return AggregatorView(NodeName(node.name), node.region, node.address, is_live)


def role_of(node: common_pb2.Node) -> Role | None:
    """The node's role; None for one this version does not know."""
    return _ROLES.get(node.role)
