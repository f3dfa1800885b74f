"""What quantisation has left out of a worker's updates, kept until a version that holds the rest is known.

Of the last update sent, the numbers as they were *before* quantisation are kept, sealed, on this node's disk: they are
there before the upload can be accepted. Whether that update came into a version is learnt with the next assignment:
if it did, only its quantisation error is carried on; if its seat stayed empty, all of it is (`domain.carry_of`). If it
is given up, the error of the last one that counted is carried still: that one is kept until a later one counts. So none
counts twice, whatever is killed when. What fails here costs the feedback and never the round: FeedbackLostError,
upon which the update is made anew without what failed. Legend: n elements of one chunk.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cortex_common.clock import Clock
from cortex_common.codec import WeightCompressor, rounding_seed
from cortex_common.errors import CorruptError, CortexError
from cortex_common.ids import JobId, SeatIndex
from cortex_common.logging import get_logger
from cortex_common.security.encryption import TAG_BYTES, EncryptionManager, ObjectHeader, ObjectKind
from cortex_common.storage.checked import from_checked_json, to_checked_json
from cortex_common.storage.durable import (
    make_directory,
    open_new,
    require_room,
    sync_directory,
    sync_file,
    write_durably,
)
from cortex_common.tensors import ChunkRange, Float32s, chunk_range
from services.worker.domain import Carry, carry_of
from services.worker.failures import FeedbackLostError

_log = get_logger(__name__)
_FORGET_S = 7 * 24 * 3600.0
_SWEEP_EVERY_S = 24 * 3600.0


@dataclass(frozen=True, slots=True)
class Kept:
    """The last update sent: its round, how it was quantised, and where its numbers are."""

    round: int
    codec: str
    codec_options: str
    seed: tuple[int, ...]
    header: ObjectHeader
    blob: str

    def chunk_seed(self, index: int) -> int:
        """Seed of the rounding of one chunk."""
        return rounding_seed(*self.seed, index)


class ResidualStore:
    """One job's folder: `kept.json` names the blobs that count; others are left from a crash and removed."""

    def __init__(self, root: Path, job_id: JobId) -> None:
        self._directory = root / job_id

    def load(self) -> tuple[Kept, ...]:
        """The last update sent, then the last that counted if that is another; without those that are damaged."""
        known = self._facts()
        self.clear(known)
        there = tuple(kept for kept in known if (self._directory / kept.blob).exists())
        for kept in known:
            if kept not in there:
                _log.warning("residual_not_readable", path=str(self._directory), reason=f"{kept.blob} is missing")
        return there

    def clear(self, known: tuple[Kept, ...]) -> None:
        """Remove what does not belong to these."""
        names = {kept.blob for kept in known}
        for other in self._directory.glob("*.blob"):
            if other.name not in names:
                with suppress(OSError):
                    other.unlink()

    def read(self, kept: Kept) -> KeptReader:
        """The numbers of an update kept."""
        return KeptReader(self._directory / kept.blob, kept)

    def write(self, kept: Kept, counted: tuple[Kept, ...], encryption: EncryptionManager) -> KeptWriter:
        """Begin to keep an update, beside the last one that counted.

        Raises:
            OverloadedError: the disk has no room for it.
        """
        make_directory(self._directory)
        header = kept.header
        require_room(self._directory, 4 * header.elements + TAG_BYTES * header.chunks)
        return KeptWriter(self, self._directory, (kept, *counted), encryption)

    def forget(self, kept: Kept) -> None:
        """What is kept of this update no longer counts."""
        with suppress(OSError):
            (self._directory / kept.blob).unlink()

    def _facts(self) -> tuple[Kept, ...]:
        path = self._directory / "kept.json"
        try:
            return tuple(_from_facts(facts) for facts in from_checked_json(path.read_bytes())["kept"])
        except FileNotFoundError:
            return ()
        except (CortexError, OSError, ValueError, KeyError, TypeError) as error:
            _log.warning("residual_not_readable", path=str(path), reason=str(error))
            return ()


def sweep(root: Path, wall_s: float) -> None:
    """Forget jobs of which nothing was sent for a week: ended ones are not told apart from paused ones here."""
    if not root.is_dir():
        return
    for directory in root.iterdir():
        with suppress(FileNotFoundError):
            if wall_s - directory.stat().st_mtime > _FORGET_S:
                shutil.rmtree(directory, ignore_errors=True)


async def sweep_daily(root: Path, clock: Clock) -> None:
    """Sweep now and once a day, for ever."""
    while True:
        try:
            await asyncio.to_thread(sweep, root, clock.wall_s())
        except OSError as error:
            _log.warning("residuals_not_swept", path=str(root), reason=str(error))
        await clock.sleep(_SWEEP_EVERY_S)


class KeptReader:
    """Opens the chunks of an update kept; one thread at a time."""

    def __init__(self, path: Path, kept: Kept) -> None:
        self.kept = kept
        self._path = path
        self._scratch = bytearray()
        self._encryption: EncryptionManager | None = None
        self._codec = WeightCompressor.from_wire(kept.codec, kept.codec_options)
        self._file = os.open(path, os.O_RDONLY)

    def whole(self, part: ChunkRange, encryption: EncryptionManager, out_n: Float32s) -> None:
        """All of the update. CorruptError: the file was changed."""
        size = 4 * part.elements + TAG_BYTES
        sealed = os.pread(self._file, size, _offset(part))
        if len(sealed) != size:
            raise CorruptError(f"{self._path} is cut short at chunk {part.index}")
        if len(self._scratch) < size:
            self._scratch = bytearray(size)
        if self._encryption is not encryption:
            self._encryption, self._opener = encryption, encryption.opener(self.kept.header)
        plain = self._opener.open_into(part.index, sealed, self._scratch)
        out_n[:] = np.frombuffer(plain, np.float32)

    def error(self, part: ChunkRange, encryption: EncryptionManager, out_n: Float32s) -> None:
        """What quantisation left out of the update: the very same quantisation once more."""
        self.whole(part, encryption, out_n)
        self._codec.encode(out_n, seed=self.kept.chunk_seed(part.index), residual_n=out_n)

    def close(self) -> None:
        """Give the file up."""
        os.close(self._file)


class KeptWriter:
    """Writes an update chunk by chunk; it counts from `commit` on. A chunk asked for again is read back."""

    def __init__(
        self, store: ResidualStore, directory: Path, known: tuple[Kept, ...], encryption: EncryptionManager
    ) -> None:
        self._store = store
        self._directory = directory
        self._known = known
        self._sealer = encryption.sealer(known[0].header)
        self._path = directory / known[0].blob
        with open_new(self._path, 0o600):
            pass
        self._file = os.open(self._path, os.O_RDWR)
        self.chunks = 0

    def append(self, part: ChunkRange, values_n: Float32s) -> None:
        """Keep the next chunk; the last one makes all durable."""
        sealed = self._sealer.seal(part.index, values_n.data.cast("B"))
        _write_at(self._file, sealed, _offset(part))
        self.chunks += 1

    def commit(self) -> None:
        """From now on this is the last update sent."""
        sync_file(self._file, self._path)
        sync_directory(self._directory)
        facts = to_checked_json({"kept": [_to_facts(kept) for kept in self._known]})
        write_durably(self._directory / "kept.json", facts, mode=0o600)
        self._store.clear(self._known)

    def close(self) -> None:
        """Give the file up."""
        os.close(self._file)


class Feedback:
    """Error feedback of one update: adds what earlier ones left out, and keeps this one.

    Args:
        store: The job's.
        kept: This update, with a fresh header.
        included_round: Last round whose version holds an update of this worker; None if none does.
        base_seats: Seats whose updates, whoever sent them, are in the base version.
        encryption: Holds the job's data key, and the one before while it is known.

    Raises:
        FeedbackLostError: what was kept cannot be read; it does not count any more. So do the methods.
    """

    def __init__(
        self,
        store: ResidualStore,
        kept: Kept,
        included_round: int | None,
        base_seats: frozenset[SeatIndex],
        encryption: EncryptionManager,
    ) -> None:
        self._store = store
        self._kept = kept
        self._encryption = encryption
        self._lock = threading.Lock()
        self._is_closed = False
        self._carry = Carry.NOTHING
        self._earlier: KeptReader | None = None
        usable = [each for each in store.load() if _layout(each.header) == _layout(kept.header)]
        self._counted = tuple(each for each in usable if each.round == included_round)
        for earlier in usable:
            self._carry = carry_of(earlier.header, kept.header, included_round, base_seats)
            if self._carry is not Carry.NOTHING:
                with self._or_without(earlier):
                    self._earlier = store.read(earlier)
                break
        self._writer: KeptWriter | None = None
        self._written: KeptReader | None = None
        self._term_n = np.empty(0, np.float32)

    @property
    def kept(self) -> Kept:
        """The update whose quantisation must be used: an earlier one when this very one has been sent before."""
        return self._earlier.kept if self._carry is Carry.REPEAT and self._earlier is not None else self._kept

    def apply(self, part: ChunkRange, delta_n: Float32s) -> None:
        """Turn a chunk of the change into the chunk to send, in place; for the same chunk always the same."""
        with self._lock:
            if self._is_closed:
                raise FeedbackLostError("the update was given up")
            if self._carry is Carry.REPEAT or not self._has_written(part):
                self._add_earlier(part, delta_n)
            if self._carry is not Carry.REPEAT:
                with self._or_without(self._kept):
                    self._keep(part, delta_n)

    def close(self) -> None:
        """Give files up; waits for a chunk in hand."""
        with self._lock:
            self._is_closed = True
            for each in (self._earlier, self._writer, self._written):
                if each is not None:
                    each.close()

    def _has_written(self, part: ChunkRange) -> bool:
        return self._writer is not None and part.index < self._writer.chunks

    def _add_earlier(self, part: ChunkRange, delta_n: Float32s) -> None:
        earlier = self._earlier
        if earlier is None:
            return
        with self._or_without(earlier.kept):
            if self._carry is Carry.REPEAT:
                earlier.whole(part, self._encryption, delta_n)
                return
            if self._term_n.size < part.elements:
                self._term_n = np.empty(part.elements, np.float32)
            term_n = self._term_n[: part.elements]
            (earlier.error if self._carry is Carry.ERROR else earlier.whole)(part, self._encryption, term_n)
            delta_n += term_n

    def _keep(self, part: ChunkRange, delta_n: Float32s) -> None:
        """Keep a new chunk; read one back that is sent again."""
        if self._writer is None:
            self._writer = self._store.write(self._kept, self._counted, self._encryption)
        if self._has_written(part):
            if self._written is None:
                self._written = self._store.read(self._kept)
            self._written.whole(part, self._encryption, delta_n)
            return
        self._writer.append(part, delta_n)
        if self._writer.chunks == self._float_chunks():
            self._writer.commit()

    @contextmanager
    def _or_without(self, kept: Kept) -> Iterator[None]:
        """Whatever fails with the numbers of an update kept: they do not count any more."""
        try:
            yield
        except (CortexError, OSError) as error:
            self._store.forget(kept)
            raise FeedbackLostError(f"the update kept of round {kept.header.round}: {error}") from error

    def _float_chunks(self) -> int:
        header = self._kept.header
        last = chunk_range(header.chunks - 1, header.elements, header.counters, header.chunk_elements)
        return header.chunks - 1 if last.is_counters else header.chunks


def kept_header(update: ObjectHeader) -> ObjectHeader:
    """The header under which an update's numbers rest: the update's, of another kind, uncompressed."""
    facts: dict[str, Any] = update.to_facts()
    facts |= {"kind": ObjectKind.RESIDUAL.value, "codec": "none", "codec_options": "", "manifest": ""}
    return ObjectHeader.from_facts(facts).fresh()


def _layout(header: ObjectHeader) -> tuple[int, int, int]:
    """What must be equal for chunks of two updates to be of the same numbers."""
    return header.elements, header.counters, header.chunk_elements


def _write_at(descriptor: int, data: bytes, offset: int) -> None:
    """Write everything, however many calls that takes."""
    rest = memoryview(data)
    while rest:
        written = os.pwrite(descriptor, rest, offset)
        rest, offset = rest[written:], offset + written


def _offset(part: ChunkRange) -> int:
    """All chunks before are whole: four bytes an element and one tag each."""
    return 4 * part.start + TAG_BYTES * part.index


def _to_facts(kept: Kept) -> dict[str, Any]:
    return {
        "round": kept.round,
        "codec": kept.codec,
        "codec_options": kept.codec_options,
        "seed": list(kept.seed),
        "header": kept.header.to_facts(),
        "blob": kept.blob,
    }


def _from_facts(facts: Mapping[str, Any]) -> Kept:
    header = ObjectHeader.from_facts(facts["header"])
    seed = tuple(int(part) for part in facts["seed"])
    return Kept(int(facts["round"]), facts["codec"], facts["codec_options"], seed, header, str(facts["blob"]))
