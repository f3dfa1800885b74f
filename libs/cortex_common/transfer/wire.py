"""Protobuf <-> headers, keys, receipts."""

from __future__ import annotations

from cortex_common.errors import InvalidArgumentError
from cortex_common.ids import JobId, KeyId, NodeName, RoundNumber, SeatIndex, Sha256Hex
from cortex_common.pb.v1 import common_pb2, transfer_pb2
from cortex_common.security.objects import ObjectHeader, ObjectKind, WrappedKey
from cortex_common.transfer.receipt import Receipt

_KIND_TO_PROTO = {
    ObjectKind.UPDATE: transfer_pb2.OBJECT_KIND_UPDATE,
    ObjectKind.MODEL: transfer_pb2.OBJECT_KIND_MODEL,
    ObjectKind.DELTA: transfer_pb2.OBJECT_KIND_DELTA,
    ObjectKind.SHARD: transfer_pb2.OBJECT_KIND_SHARD,
}
_KIND_FROM_PROTO = {number: kind for kind, number in _KIND_TO_PROTO.items()}


def header_to_proto(header: ObjectHeader, first_chunk: int = 0) -> transfer_pb2.TransferHeader:
    """The header as it travels."""
    return transfer_pb2.TransferHeader(
        kind=_KIND_TO_PROTO[header.kind],
        object_id=header.object_id,
        salt=header.salt,
        network=header.network,
        job_id=header.job_id,
        round=header.round,
        attempt=header.attempt,
        fence=header.fence,
        sender=header.sender,
        seat=header.seat,
        key_id=header.key_id,
        codec=header.codec,
        codec_options=header.codec_options,
        chunk_elements=header.chunk_elements,
        elements=header.elements,
        counters=header.counters,
        chunks=header.chunks,
        manifest_sha256=header.manifest_sha256,
        base_sha256=header.base_sha256,
        model_sha256=header.model_sha256,
        manifest=header.manifest,
        weight=header.weight,
        first_chunk=first_chunk,
    )


def header_from_proto(proto: transfer_pb2.TransferHeader) -> ObjectHeader:
    """The header somebody sent; only its form is checked here.

    Raises:
        InvalidArgumentError: unknown kind, id or salt of the wrong length, no chunks.
    """
    kind = _KIND_FROM_PROTO.get(proto.kind)
    if kind is None:
        raise InvalidArgumentError(f"header.kind {proto.kind}; allowed are update, model, delta and shard")
    if len(proto.object_id) != 16 or len(proto.salt) != 32:
        raise InvalidArgumentError("header: object_id has 16 bytes, salt 32")
    return ObjectHeader(
        kind=kind,
        network=proto.network,
        job_id=JobId(proto.job_id),
        round=RoundNumber(proto.round),
        attempt=proto.attempt,
        fence=proto.fence,
        sender=NodeName(proto.sender),
        seat=SeatIndex(proto.seat),
        key_id=KeyId(proto.key_id),
        codec=proto.codec,
        codec_options=proto.codec_options,
        chunk_elements=proto.chunk_elements,
        elements=proto.elements,
        counters=proto.counters,
        chunks=proto.chunks,
        manifest_sha256=Sha256Hex(proto.manifest_sha256),
        base_sha256=proto.base_sha256,
        model_sha256=proto.model_sha256,
        manifest=proto.manifest,
        weight=proto.weight,
        object_id=proto.object_id,
        salt=proto.salt,
    )


def data_key_to_proto(key: WrappedKey) -> common_pb2.DataKey:
    """A data key, for the member that it is wrapped to."""
    return common_pb2.DataKey(key_id=key.key_id, epoch=key.epoch, key=key.wrapped)


def data_key_from_proto(proto: common_pb2.DataKey) -> WrappedKey:
    """Read a data key. InvalidArgumentError: no id, or not wrapped."""
    return WrappedKey(KeyId(proto.key_id), proto.epoch, proto.key)


def receipt_to_proto(receipt: Receipt) -> transfer_pb2.Receipt:
    """The receipt as it travels."""
    return transfer_pb2.Receipt(
        job_id=receipt.job_id,
        round=receipt.round,
        attempt=receipt.attempt,
        seat=receipt.seat,
        worker=receipt.worker,
        content_sha256=receipt.content_sha256,
        weight=receipt.weight,
        size_bytes=receipt.size_bytes,
        sequence=receipt.sequence,
        newly_accepted=receipt.newly_accepted,
    )


def receipt_from_proto(proto: transfer_pb2.Receipt) -> Receipt:
    """Read a receipt."""
    return Receipt(
        job_id=JobId(proto.job_id),
        round=RoundNumber(proto.round),
        attempt=proto.attempt,
        seat=SeatIndex(proto.seat),
        worker=NodeName(proto.worker),
        content_sha256=Sha256Hex(proto.content_sha256),
        weight=proto.weight,
        size_bytes=proto.size_bytes,
        sequence=proto.sequence,
        newly_accepted=proto.newly_accepted,
    )
