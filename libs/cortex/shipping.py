"""Bringing the sealed shards of a data set to aggregators, from where workers fetch them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from cortex_common.data.sealed import Described
from cortex_common.errors import CorruptError, NotFoundError
from cortex_common.identity import Role, TlsFiles
from cortex_common.pb.v1 import aggregator_pb2, aggregator_pb2_grpc
from cortex_common.rpc.channel import open_sync_channel
from cortex_common.rpc.errors import calling
from cortex_common.security.objects import ObjectHeader
from cortex_common.security.shards import MANIFEST_FILE, check_signature, header_of, sealed_size, shard_file
from cortex_common.transfer import ChunkFrame, HeaderFrame, TrailerFrame, frame_to_bytes
from cortex_common.transfer.content import chunk_digest, content_digest

_PUT_METHOD = "/cortex.v1.ShardService/PutShard"
_SHARD_S = 3600.0
_CALL_S = 60.0


def read_manifest(folder: Path) -> Described:
    """The manifest in the folder of a sealed data set, signed by its owner.

    Raises:
        NotFoundError: there is none.
        InvalidArgumentError, ForbiddenError: it is not one, or not signed.
    """
    from cortex_common.envelope import Envelope

    path = folder / MANIFEST_FILE
    try:
        text = path.read_bytes()
    except OSError as error:
        raise NotFoundError(f"{path}: {error.strerror}; `cortex data seal` makes such a folder") from None
    told = Described.of(Envelope.from_json(text, str(path)), str(path))
    check_signature(told)
    return told


def ship_shards(address: str, tls: TlsFiles, folder: Path, told: Described, on_shard: Callable[[int], None]) -> None:
    """Send every shard to an aggregator that does not have it yet.

    Args:
        address: host:port of the aggregator.
        tls: The operator's certificate.
        folder: Where the shards are.
        told: Their manifest.
        on_shard: Told of each that was new there.

    Raises:
        CorruptError: a shard is not what the manifest says.
        UnavailableError: the aggregator cannot be reached.
        OverloadedError: it has no room.
    """
    with open_sync_channel(address, tls, Role.AGGREGATOR, bulk=True) as channel:
        put: Any = channel.stream_unary(_PUT_METHOD, response_deserializer=aggregator_pb2.PutShardResponse.FromString)
        for index in range(len(told.manifest.shards)):
            header = header_of(told.manifest, index)
            with calling(f"aggregator at {address}"):
                answer = put(_frames(folder / shard_file(index), header), timeout=_SHARD_S)
            if answer.newly_stored:
                on_shard(index)


def drop_shards(address: str, tls: TlsFiles, digests: list[str]) -> int:
    """Have an aggregator erase shards; how many it had."""
    with open_sync_channel(address, tls, Role.AGGREGATOR) as channel, calling(f"aggregator at {address}"):
        request = aggregator_pb2.DropShardsRequest(sha256=digests)
        return aggregator_pb2_grpc.ShardServiceStub(channel).DropShards(request, timeout=_CALL_S).dropped


def check_shards(folder: Path, told: Described) -> None:
    """Every shard's file is there, and as long as it must be: said before the first byte is sent.

    Raises:
        CorruptError: one is not.
    """
    for index in range(len(told.manifest.shards)):
        header, path = header_of(told.manifest, index), folder / shard_file(index)
        wanted = sum(sealed_size(header, chunk) for chunk in range(header.chunks))
        given = path.stat().st_size if path.is_file() else None
        if given != wanted:
            told_size = "is missing" if given is None else f"has {given} bytes"
            raise CorruptError(f"{path} {told_size}; the manifest tells of {wanted} bytes")


def _frames(path: Path, header: ObjectHeader) -> Iterator[bytes]:
    yield frame_to_bytes(HeaderFrame(header))
    tags = []
    with path.open("rb") as file:
        for index in range(header.chunks):
            sealed = file.read(sealed_size(header, index))
            tags.append(chunk_digest(sealed))
            yield frame_to_bytes(ChunkFrame(index, sealed))
    yield frame_to_bytes(TrailerFrame(header.chunks, content_digest(tags)))
