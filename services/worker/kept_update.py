"""The update that is on its way, kept on this node's disk as it is sent, until it is accepted.

A program that was killed in the middle of an upload so goes on with it where the aggregator has it, under the same
header, and trains nothing again. It is whole or it is not there: its chunks are sealed into a file aside, which is
synced and renamed before the first of them is sent. What travels is what was kept: nothing else is ever sealed under
its header. What fails here costs the keeping and never the round. The file: a record with header and figures, then each
sealed chunk after its length.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cortex_common.errors import CorruptError, CortexError
from cortex_common.ids import JobId
from cortex_common.logging import get_logger
from cortex_common.network.work import Assignment
from cortex_common.security.encryption import EncryptionManager, ObjectHeader
from cortex_common.storage.durable import make_directory, open_new, sync_directory, sync_file, write_fully
from cortex_common.storage.records import read_record, record
from cortex_common.tensors import ChunkRange, chunk_range
from cortex_common.transfer.push import EncodeChunk
from services.worker.failures import UpdateLostError

_log = get_logger(__name__)

_PREFIX_BYTES = 4


@dataclass(frozen=True, slots=True)
class KeptUpdate:
    """An update in its file, whole.

    Attributes:
        header: Under which it is sealed.
        answer: The trainer's, about what it learnt.
    """

    header: ObjectHeader
    answer: Mapping[str, Any]
    path: Path
    ends: tuple[int, ...]
    """Where the record, and each chunk after it, ends."""

    def header_for(self, assignment: Assignment, codec: tuple[str, str]) -> ObjectHeader | None:
        """Under which an assignment's update has to be sent, if it is this one; None if it is another.

        It is this one's own header while the same round goes on, and a fresh one when that is tried again or the data
        key has been replaced.

        Args:
            assignment: What is wanted now.
            codec: Name and options of the codec that it wants.
        """
        kept = self.header
        wanted = (assignment.round, assignment.seat, assignment.base_sha256, assignment.chunk_elements, *codec)
        if (kept.round, kept.seat, kept.base_sha256, kept.chunk_elements, kept.codec, kept.codec_options) != wanted:
            return None
        place = (assignment.transfer_id, assignment.attempt, assignment.data_key.key_id)
        if (kept.job_id, kept.attempt, kept.key_id) == place:
            return kept
        job_id, attempt, key_id = place
        return replace(kept, job_id=job_id, attempt=attempt, key_id=key_id, fence=assignment.fence).fresh()

    def encoder(self, encryption: EncryptionManager) -> EncodeChunk:
        """Gives the payloads of its chunks again.

        Args:
            encryption: Holds its data key.

        Raises:
            UpdateLostError: a chunk cannot be read, or was changed; so does what it returns.
        """
        with _or_lost(self.path):
            opener = encryption.opener(self.header)

        def payload(part: ChunkRange) -> bytes:
            with _or_lost(self.path):
                return opener.open(part.index, self._read(part.index))

        return payload

    def _read(self, index: int) -> bytes:
        start, end = self.ends[index] + _PREFIX_BYTES, self.ends[index + 1]
        file = os.open(self.path, os.O_RDONLY)
        try:
            return os.pread(file, end - start, start)
        finally:
            os.close(file)


class Outbox:
    """Keeps at most one update of a job, in a folder a job. Calls block."""

    def __init__(self, root: Path, job_id: JobId) -> None:
        self._path = root / job_id / "sealed.update"

    def load(self) -> KeptUpdate | None:
        """What an earlier process left; None if that is nothing, or damaged."""
        try:
            file = os.open(self._path, os.O_RDONLY)
        except OSError:
            return None
        try:
            with _or_lost(self._path):
                return self._indexed(file)
        except UpdateLostError as error:
            _log.warning("kept_update_not_readable", path=str(self._path), reason=error.message)
            self.forget()
            return None
        finally:
            os.close(file)

    def keep(
        self, header: ObjectHeader, answer: Mapping[str, Any], encode: EncodeChunk, encryption: EncryptionManager
    ) -> KeptUpdate:
        """Seal an update into its file; durable when this returns.

        Args:
            header: Fresh, or the one that it was kept under before.
            answer: The trainer's.
            encode: Gives the payloads, in order.
            encryption: Holds the key the header names.

        Raises:
            OSError: the disk is full or damaged; nothing is kept.
            CortexError: what `encode` raises; nothing is kept.
        """
        make_directory(self._path.parent)
        aside = self._path.with_suffix(".part")
        sealer = encryption.sealer(header)
        try:
            with open_new(aside, 0o600) as file:
                first = record(json.dumps({"header": header.to_facts(), "answer": dict(answer)}).encode())
                write_fully(file.fileno(), first)
                ends = [len(first)]
                for index in range(header.chunks):
                    part = chunk_range(index, header.elements, header.counters, header.chunk_elements)
                    sealed = sealer.seal(index, encode(part))
                    write_fully(file.fileno(), len(sealed).to_bytes(_PREFIX_BYTES, "big") + sealed)
                    ends.append(ends[-1] + _PREFIX_BYTES + len(sealed))
                sync_file(file.fileno(), aside)
        except (CortexError, OSError):
            aside.unlink(missing_ok=True)
            raise
        aside.replace(self._path)
        sync_directory(self._path.parent)
        return KeptUpdate(header, answer, self._path, tuple(ends))

    def forget(self) -> None:
        """It has been accepted, or is not wanted."""
        with suppress(OSError):
            self._path.unlink(missing_ok=True)
            self._path.parent.rmdir()

    def _indexed(self, file: int) -> KeptUpdate:
        first = read_record(file)
        if first is None:
            raise CorruptError("its beginning is not as it was written")
        facts = json.loads(first[0])
        header = ObjectHeader.from_facts(facts["header"])
        ends = [first[1]]
        for _ in range(header.chunks):
            prefix = os.pread(file, _PREFIX_BYTES, ends[-1])
            ends.append(ends[-1] + _PREFIX_BYTES + int.from_bytes(prefix, "big"))
        if ends[-1] != os.fstat(file).st_size:
            raise CorruptError(f"its {header.chunks} chunks do not fill it")
        return KeptUpdate(header, facts["answer"], self._path, tuple(ends))


@contextmanager
def _or_lost(path: Path) -> Iterator[None]:
    """Whatever cannot be read or opened inside the block is lost: it has to be trained again."""
    try:
        yield
    except (CortexError, OSError, ValueError, KeyError, TypeError) as error:
        what = error.message if isinstance(error, CortexError) else f"{type(error).__name__}: {error}"
        raise UpdateLostError(f"the update kept in {path}: {what}") from error
