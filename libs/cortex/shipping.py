"""Bringing the sealed shards of a data set to aggregators, from where workers fetch them.

A shard lies sealed in its folder, and is sent as it lies there: an upload that breaks off goes on at the first chunk
that the aggregator lacks, in the same call or in a later one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from cortex.patience import Patience
from cortex_common.clock import SystemClock
from cortex_common.data.sealed import Described
from cortex_common.errors import CorruptError, NotFoundError, OverloadedError, UnauthenticatedError, UnavailableError
from cortex_common.identity import Role, TlsFiles
from cortex_common.pb.v1 import aggregator_pb2, aggregator_pb2_grpc
from cortex_common.rpc.channel import RenewingSyncChannel, open_sync_channel
from cortex_common.rpc.errors import calling
from cortex_common.security.encryption import TAG_BYTES
from cortex_common.security.objects import ObjectHeader
from cortex_common.security.shards import (
    MANIFEST_FILE,
    check_signature,
    header_of,
    sealed_bytes,
    sealed_size,
    shard_file,
)
from cortex_common.transfer import ChunkFrame, HeaderFrame, TrailerFrame, frame_to_bytes
from cortex_common.transfer.content import chunk_digest, content_digest
from cortex_common.transfer.retrying import MAX_FAULTS, transferring
from cortex_common.transfer.wire import header_to_proto

_PUT_METHOD = "/cortex.v1.ShardService/PutShard"
_SHARD_S = 3600.0
_CALL_S = 60.0
# After a restart an aggregator reads all that it has of a shard before it answers.
_OFFER_S = 600.0
# An aggregator that does not answer at all is told soon; one that is started again, or a line that is down, waited for.
_REACH_PATIENCE_S = 10.0
_SEND_PATIENCE_S = 120.0
_PIECE_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class Cut:
    """A shard whose upload goes on in its middle.

    Attributes:
        index: Of the shard.
        held_bytes: Sealed bytes of it that the aggregator has.
        size_bytes: Sealed bytes of all of it.
        reason: Why it broke off, in a few words; empty if that was before this call.
    """

    index: int
    held_bytes: int
    size_bytes: int
    reason: str


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


def ship_shards(
    address: str,
    tls: TlsFiles,
    folder: Path,
    told: Described,
    on_shard: Callable[[int], None],
    on_cut: Callable[[Cut], None] = lambda cut: None,
    patience: Callable[[float], Patience] = lambda limit_s: Patience(SystemClock(), limit_s, lambda: None),
) -> None:
    """Send every shard to an aggregator that does not have it yet, from where it has it.

    Args:
        address: host:port of the aggregator.
        tls: The operator's certificate.
        folder: Where the shards are.
        told: Their manifest.
        on_shard: Told of each that was new there.
        on_cut: Told of each upload that goes on in the middle of a shard.
        patience: Makes what waits for an aggregator that is away, given for how many seconds.

    Raises:
        CorruptError: a shard is not what the manifest says.
        UnavailableError: the aggregator cannot be reached, or nothing has got through for two minutes; another call
            goes on with what has.
        OverloadedError: it has no room, still so after several attempts.
        ConflictError: somebody else sends the shard too, or has dropped it.
    """
    what = f"aggregator at {address}"
    with closing(RenewingSyncChannel(address, tls, Role.AGGREGATOR, bulk=True)) as line:
        patience(_REACH_PATIENCE_S).call(lambda: _offer(line, what, header_of(told.manifest, 0)))
        for index in range(len(told.manifest.shards)):
            path, header = folder / shard_file(index), header_of(told.manifest, index)
            if _Shipment(line, what, path, header, patience(_SEND_PATIENCE_S), on_cut).deliver():
                on_shard(index)


def ship_everywhere(
    aggregators: Mapping[str, str],
    tls: TlsFiles,
    folder: Path,
    told: Described,
    on_shard: Callable[[str, int], None],
    on_cut: Callable[[str, Cut], None],
    patience: Callable[[float], Patience],
) -> None:
    """`ship_shards` to each of the aggregators, given by name with their addresses.

    Raises:
        UnavailableError: there is none, or one cannot be reached.
    """
    if not aggregators:
        raise UnavailableError("no aggregator is live; the shards of a data set are kept by aggregators")
    for name, address in aggregators.items():
        ship_shards(address, tls, folder, told, partial(on_shard, name), partial(on_cut, name), patience)


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
        wanted = sealed_bytes(header, header.chunks)
        given = path.stat().st_size if path.is_file() else None
        if given != wanted:
            told_size = "is missing" if given is None else f"has {given} bytes"
            raise CorruptError(f"{path} {told_size}; the manifest tells of {wanted} bytes")


class _Shipment:
    """One shard on its way to an aggregator."""

    def __init__(
        self,
        line: RenewingSyncChannel,
        what: str,
        path: Path,
        header: ObjectHeader,
        patience: Patience,
        on_cut: Callable[[Cut], None],
    ) -> None:
        self._line = line
        self._what = what
        self._path = path
        self._header = header
        self._patience = patience
        self._on_cut = on_cut
        self._is_begun = False
        self._reason = ""
        self._furthest = -1
        self._unreadable: CorruptError | None = None

    def deliver(self) -> bool:
        """Bring it there, whatever happens to the connection meanwhile; False if it was there."""
        faults = 0
        while True:
            channel = self._line.current()
            try:
                return self._attempt()
            except UnavailableError as error:
                self._reason = "connection lost"
                self._patience.failed(error)
            except UnauthenticatedError:
                if self._line.current() is channel:
                    raise
                self._reason = "certificate replaced"
            except (CorruptError, OverloadedError) as error:
                faults += 1
                if faults > MAX_FAULTS or (isinstance(error, CorruptError) and not self._is_as_sealed()):
                    raise
                self._reason = error.message
                self._patience.failed(UnavailableError(error.message))

    def _attempt(self) -> bool:
        held = _offer(self._line, self._what, self._header)
        if held.complete:
            return self._is_begun
        if held.chunks or self._is_begun:
            size_bytes = sealed_bytes(self._header, self._header.chunks)
            self._on_cut(Cut(self._header.round, held.size_bytes, size_bytes, self._reason))
        self._is_begun = True
        put: Any = self._line.current().stream_unary(
            _PUT_METHOD, response_deserializer=aggregator_pb2.PutShardResponse.FromString
        )
        try:
            with transferring(self._what):
                return bool(put(self._frames(held.chunks), timeout=_SHARD_S).newly_stored)
        except UnavailableError:
            if self._unreadable is not None:
                raise self._unreadable from None
            raise

    def _frames(self, first: int) -> Iterator[bytes]:
        """Header, chunks from `first` on, trailer."""
        try:
            yield from self._read(first)
        except OSError as error:
            self._unreadable = CorruptError(f"{self._path} is not readable: {error.strerror or error}")
            raise

    def _read(self, first: int) -> Iterator[bytes]:
        header, tags = self._header, []
        yield frame_to_bytes(HeaderFrame(header, first))
        with self._path.open("rb") as file:
            for index in range(first):
                file.seek(sealed_bytes(header, index + 1) - TAG_BYTES)
                tags.append(file.read(TAG_BYTES))
            for index in range(first, header.chunks):
                if index > self._furthest:
                    self._furthest = index
                    self._patience.answered()
                sealed = file.read(sealed_size(header, index))
                tags.append(chunk_digest(sealed))
                yield frame_to_bytes(ChunkFrame(index, sealed))
        yield frame_to_bytes(TrailerFrame(header.chunks, content_digest(tags)))

    def _is_as_sealed(self) -> bool:
        """Whether the file is what the manifest tells of; if not, sending it again helps nobody."""
        if self._unreadable is not None:
            return False
        digest = hashlib.sha256()
        with self._path.open("rb", buffering=0) as file:
            while piece := file.read(_PIECE_BYTES):
                digest.update(piece)
        return digest.hexdigest() == self._header.model_sha256


def _offer(line: RenewingSyncChannel, what: str, header: ObjectHeader) -> aggregator_pb2.OfferShardResponse:
    """What an aggregator has of a shard."""
    request = aggregator_pb2.OfferShardRequest(header=header_to_proto(header))
    with transferring(what):
        return aggregator_pb2_grpc.ShardServiceStub(line.current()).OfferShard(request, timeout=_OFFER_S)
