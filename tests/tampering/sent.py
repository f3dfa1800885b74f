"""What travels: updates up, versions and deltas down, receipts, wrapped keys; read by the code that receives them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError

from cortex_common.clock import SystemClock
from cortex_common.errors import CorruptError
from cortex_common.identity import Identity, Role
from cortex_common.ids import JobId
from cortex_common.pb.v1 import common_pb2, transfer_pb2
from cortex_common.security.encryption import ObjectHeader, ObjectKind
from cortex_common.security.sealing import KeyWrapper, SealingKey
from cortex_common.tensors import Arena, ManifestLimits, model_sha256
from cortex_common.transfer import ChunkFrame, HeaderFrame, Receipt, TrailerFrame, frame_to_bytes
from cortex_common.transfer.content import chunk_digest, content_digest
from cortex_common.transfer.pacing import UNPACED
from cortex_common.transfer.pull import _Pull, pull_request
from cortex_common.transfer.push import _Push
from cortex_common.transfer.wire import (
    data_key_from_proto,
    data_key_to_proto,
    receipt_from_proto,
    receipt_to_proto,
)
from cortex_common.validation import ValidationManager
from services.aggregator.domain import Phase, RoundKey, RoundTerms
from services.aggregator.receiving import Receiver
from services.aggregator.rounds import LiveRound
from services.aggregator.settings import AggregatorSettings
from services.aggregator.store import DirectoryRoundStore, StoredRound
from tests.tampering.damage import Pieces, Subject
from tests.tampering.objects import (
    CHUNK,
    CRYPT,
    JOB,
    KEYS,
    MANIFEST,
    OTHER_JOB,
    WORKER,
    arena_of,
    delta,
    header_of,
    model,
    sealed,
)

Run = Callable[[Any], Any]


def frames(header: ObjectHeader, chunks: Sequence[bytes]) -> Pieces:
    """An object as it is sent."""
    trailer = TrailerFrame(len(chunks), content_digest(map(chunk_digest, chunks)))
    sent = [HeaderFrame(header), *(ChunkFrame(index, chunk) for index, chunk in enumerate(chunks)), trailer]
    return tuple(frame_to_bytes(frame) for frame in sent)


def update_frames(job: str = JOB, number: int = 2, seed: int = 1, codec: str = "int8") -> Pieces:
    header = header_of(ObjectKind.UPDATE, job, number, codec)
    return frames(header, sealed(header, arena_of(seed)))


def update_sent(root: Path, run: Run) -> Subject:
    """An update, received by an aggregator whose round it is for."""
    key = RoundKey(JobId(JOB), 2, 0)
    codec = header_of(ObjectKind.UPDATE, codec="int8")
    terms = RoundTerms(key, 1, "0" * 64, {0: WORKER}, codec.codec, codec.codec_options, "fedavg", "{}", CHUNK)
    store = DirectoryRoundStore(root)
    store.save(StoredRound(terms, Phase.OPEN))
    settings = AggregatorSettings(ca=root, certificate=root, key=root, name="a", state_dir=root, disk_reserve_bytes=0)
    caller = Identity("cortex", Role.WORKER, WORKER)

    async def receive(pieces: Sequence[bytes]) -> Any:
        live = LiveRound(terms, data_key=KEYS[JOB], base=MANIFEST)
        receiver = Receiver(settings, {key: live}, store, CRYPT, ValidationManager(), SystemClock())

        async def messages() -> AsyncIterator[bytes]:
            for piece in pieces:
                if piece:
                    yield piece

        try:
            answers = [answer async for answer in receiver.push(caller, messages())]
            receipt = answers[-1]
            assert isinstance(receipt, Receipt)
            return receipt.content_sha256, live.spool(0).header.canonical(), receipt.weight
        finally:
            live.close_files()

    return Subject(
        "update as sent",
        update_frames(),
        update_frames(number=1, seed=2),
        update_frames(OTHER_JOB, seed=3),
        lambda pieces: run(receive(pieces)),
    )


class Sent:
    """Stands for the channel over which a version comes."""

    def __init__(self, pieces: Sequence[bytes]) -> None:
        self._pieces = iter(pieces)

    def unary_stream(self, *_method: Any, **_options: Any) -> Callable[[Any], Sent]:
        return lambda _request: self

    async def read(self) -> bytes | None:
        return next((piece for piece in self._pieces if piece), None)

    def cancel(self) -> None:
        pass


def version_sent(run: Run, name: str, make: Callable[..., tuple[ObjectHeader, list[bytes]]], held: str) -> Subject:
    """A version, whole or as a delta, pulled by a worker that asks for it by its digest."""
    wanted = make()[0].model_sha256

    async def pull(pieces: Sequence[bytes]) -> Any:
        request = pull_request(JOB, wanted, 0, 2, held)
        base = arena_of(0)
        arena = Arena(base.values.copy(), base.counters)
        channel: Any = Sent(pieces)
        pulling = _Pull(lambda: channel, request, CRYPT, lambda _: arena, None, ManifestLimits(), None, UNPACED)
        return (await pulling.attempt()).arena.values.tobytes()  # type: ignore[union-attr]

    return Subject(
        name,
        frames(*make()),
        frames(*make(number=1, seed=2)),
        frames(*make(OTHER_JOB, seed=3)),
        lambda pieces: run(pull(pieces)),
    )


def receipt_sent() -> Subject:
    """The answer to an update, checked by its sender as far as it can know it; the rest is statistics."""
    header = header_of(ObjectKind.UPDATE, codec="int8")
    chunks = sealed(header, arena_of(1))
    push = _Push(lambda: None, header, lambda _: b"", CRYPT, None, None, UNPACED)  # type: ignore[arg-type,return-value]
    push._digests = [chunk_digest(chunk) for chunk in chunks]

    def receipt(job: str = JOB, number: int = 2, content: str = content_digest(push._digests).hex()) -> Pieces:
        made = Receipt(job, number, 0, 0, WORKER, content, 1.5, 400, 7)
        return (receipt_to_proto(made).SerializeToString(),)

    def read(pieces: Sequence[bytes]) -> Any:
        try:
            found = receipt_from_proto(transfer_pb2.Receipt.FromString(pieces[0]))
        except DecodeError as error:
            raise CorruptError("not a receipt") from error
        push._require_own(found)
        return found.job_id, found.round, found.attempt, found.seat, found.worker

    return Subject("receipt as sent", receipt(), receipt(number=1), receipt(OTHER_JOB, content="ab" * 32), read)


def key_sent() -> Subject:
    """A data key, wrapped to the worker that takes it from its assignment."""
    member, wrapper = SealingKey("cortex"), KeyWrapper("cortex")

    def wrapped(job: str = JOB, of: str = JOB) -> Pieces:
        return (data_key_to_proto(wrapper.wrap(member.public, job, KEYS[of])).SerializeToString(),)

    def read(pieces: Sequence[bytes]) -> Any:
        try:
            proto = common_pb2.DataKey.FromString(pieces[0])
        except DecodeError as error:
            raise CorruptError("not a data key") from error
        return member.unwrap(JOB, data_key_from_proto(proto))

    return Subject("data key as sent", wrapped(), wrapped("job-0"), wrapped(OTHER_JOB, OTHER_JOB), read)


def everything_sent(root: Path, run: Run) -> list[Subject]:
    base = model_sha256(MANIFEST, arena_of(0))
    return [
        update_sent(root / "update", run),
        version_sent(run, "version as sent", model, ""),
        version_sent(run, "delta as sent", delta, base),
        receipt_sent(),
        key_sent(),
    ]
