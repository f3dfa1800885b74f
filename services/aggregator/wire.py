"""Protobuf <-> domain of the aggregator."""

from __future__ import annotations

from google.protobuf.timestamp_pb2 import Timestamp

from cortex_common.errors import InvalidArgumentError
from cortex_common.ids import JobId, NodeName, RoundNumber, SeatIndex, Sha256Hex
from cortex_common.pb.v1 import aggregator_pb2, common_pb2
from cortex_common.security.objects import WrappedKey
from cortex_common.transfer import Receipt
from cortex_common.transfer.wire import data_key_from_proto, receipt_to_proto
from services.aggregator.domain import Contribution, RoundKey, RoundTerms, Upstream
from services.aggregator.receiving import Resume
from services.aggregator.rounds import RoundView
from services.aggregator.versions import Version

Keyed = (
    aggregator_pb2.RoundSpec
    | aggregator_pb2.SealRoundRequest
    | aggregator_pb2.ForwardRoundRequest
    | aggregator_pb2.ResealJobRequest
)
"""Messages that data keys come along with."""


def terms_from_proto(spec: aggregator_pb2.RoundSpec) -> RoundTerms:
    """A round, without its keys.

    Raises:
        InvalidArgumentError: a seat twice.
    """
    seats = {SeatIndex(each.seat): NodeName(each.worker) for each in spec.seats}
    if len(seats) != len(spec.seats):
        raise InvalidArgumentError("round.seats: a seat is listed twice")
    return RoundTerms(
        key=RoundKey(JobId(spec.job_id), RoundNumber(spec.round), spec.attempt),
        fence=spec.fence,
        base_sha256=spec.base_sha256,
        seats=seats,
        codec=spec.codec,
        codec_options=spec.codec_options,
        strategy=spec.strategy,
        strategy_options=spec.strategy_options,
        chunk_elements=spec.chunk_elements,
        upstream=_upstream(spec.upstream) if spec.HasField("upstream") else None,
        download_codec=spec.download_codec or "none",
        download_options=spec.download_options,
        readers=tuple(NodeName(name) for name in spec.readers),
    )


def _upstream(message: aggregator_pb2.Upstream) -> Upstream:
    if not message.aggregator or not message.address or not message.job_id:
        raise InvalidArgumentError("round.upstream: aggregator, address and job_id are needed")
    return Upstream(
        NodeName(message.aggregator),
        message.address,
        JobId(message.job_id),
        SeatIndex(message.seat),
        JobId(message.model_job_id),
    )


def key_from_proto(
    request: aggregator_pb2.WatchRoundRequest
    | aggregator_pb2.SealRoundRequest
    | aggregator_pb2.ForwardRoundRequest
    | aggregator_pb2.AbortRoundRequest,
) -> RoundKey:
    """Which round a request is about."""
    return RoundKey(JobId(request.job_id), RoundNumber(request.round), request.attempt)


def data_keys_of(
    message: Keyed,
) -> tuple[WrappedKey, ...]:
    """The data keys that came along, the round's own first; none if none did.

    Raises:
        InvalidArgumentError: one is not wrapped.
    """
    if not message.HasField("data_key"):
        return ()
    return tuple(data_key_from_proto(key) for key in (message.data_key, *message.older_keys))


def contributions_from_proto(
    request: aggregator_pb2.SealRoundRequest | aggregator_pb2.ForwardRoundRequest,
) -> tuple[Contribution, ...]:
    """The frozen list."""
    return tuple(
        Contribution(SeatIndex(each.seat), NodeName(each.worker), Sha256Hex(each.content_sha256), each.weight)
        for each in request.contributions
    )


def version_to_proto(version: Version) -> common_pb2.ModelVersion:
    """A version as others know it."""
    created = Timestamp()
    created.FromMilliseconds(int(version.created_s * 1000))
    return common_pb2.ModelVersion(
        job_id=version.header.job_id,
        round=version.header.round,
        sha256=version.sha256,
        manifest_sha256=version.header.manifest_sha256,
        parameters=version.header.elements,
        size_bytes=version.file_bytes,
        created_at=created,
    )


def view_to_proto(view: RoundView) -> aggregator_pb2.WatchRoundResponse:
    """A round as its coordinator sees it."""
    seats = []
    for each in view.seats:
        progress = aggregator_pb2.SeatProgress(
            seat=each.seat,
            worker=each.worker,
            chunks_received=each.chunks_received,
            chunks_total=each.chunks_total,
        )
        if each.receipt is not None:
            progress.receipt.CopyFrom(receipt_to_proto(each.receipt))
        seats.append(progress)
    return aggregator_pb2.WatchRoundResponse(seats=seats, bytes_down=view.bytes_down, closed=view.closed)


def answer_to_proto(answer: Resume | Receipt) -> aggregator_pb2.PushUpdateResponse:
    """What an uploader is told."""
    if isinstance(answer, Receipt):
        return aggregator_pb2.PushUpdateResponse(receipt=receipt_to_proto(answer))
    return aggregator_pb2.PushUpdateResponse(
        resume=aggregator_pb2.Resume(first_chunk=answer.first_chunk, already_accepted=answer.already_accepted)
    )
