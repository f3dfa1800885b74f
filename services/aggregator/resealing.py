"""Resealing: every stored object of a job is opened and sealed again under another data key, chunk by chunk."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace

from cortex_common.errors import CortexError, UnavailableError
from cortex_common.ids import JobId, KeyId, Sha256Hex
from cortex_common.security.encryption import DataKey, EncryptionManager
from cortex_common.storage import BlobWriter
from cortex_common.transfer.content import chunk_digest, content_digest
from services.aggregator.uploads import in_thread
from services.aggregator.versions import SealedPart, Version, VersionStore


class Resealer:
    """Reseals jobs, never one while a version of it is being made."""

    def __init__(
        self,
        versions: VersionStore,
        raise_fence: Callable[[JobId, int], Awaitable[None]],
        is_making: Callable[[JobId], bool],
    ) -> None:
        self._versions = versions
        self._raise_fence = raise_fence
        self._is_making = is_making
        self._running: set[JobId] = set()

    async def reseal(self, job_id: JobId, fence: int, data_keys: Sequence[DataKey]) -> int:
        """Seal all that is stored of a job under the first of these keys; how many versions that took.

        Raises:
            ConflictError: stale fence.
            UnavailableError: a version of it is being made, or it is being sealed anew already.
            NotFoundError, CorruptError, OverloadedError: as `reseal`.
        """
        await self._raise_fence(job_id, fence)
        self.check_free(job_id)
        if self._is_making(job_id):
            raise UnavailableError(f"job {job_id}: a version is being made; ask again")
        self._running.add(job_id)
        try:
            encryption = EncryptionManager(*data_keys)
            return await in_thread(lambda: reseal(self._versions, job_id, encryption, data_keys[0].key_id))
        finally:
            self._running.discard(job_id)

    def check_free(self, job_id: JobId) -> None:
        """Refuse to make a version meanwhile.

        Raises:
            UnavailableError: the job is being sealed anew.
        """
        if job_id in self._running:
            raise UnavailableError(f"job {job_id}: what is stored of it is being sealed anew; ask again")


def reseal(versions: VersionStore, job_id: JobId, encryption: EncryptionManager, key_id: KeyId) -> int:
    """Seal every version of a job, its delta and its outer state under one key; how many versions that took.

    Each version is replaced in one step, so that it may be broken off and begun again: what is done is passed over.
    Numbers, digests of models and sizes stay as they are.

    Args:
        versions: Where they are.
        job_id: Whose.
        encryption: Holds that key, and those that the objects are sealed under now.
        key_id: Of the key to seal with.

    Raises:
        NotFoundError: a key is missing.
        CorruptError: an object does not open.
        OverloadedError: there is no room for another copy of a version.
    """
    count = 0
    for version in versions.of_job(job_id):
        parts = [part for part in (version.whole, version.state, version.delta) if part is not None]
        if any(part.header.key_id != key_id for part in parts):
            _reseal(versions, version, encryption, key_id)
            count += 1
    return count


def _reseal(versions: VersionStore, version: Version, encryption: EncryptionManager, key_id: KeyId) -> None:
    writers: list[BlobWriter] = []
    blobs: list[str] = []

    def again(part: SealedPart | None, files: ExitStack) -> SealedPart | None:
        if part is None:
            return None
        header = replace(part.header, key_id=key_id).fresh()
        blob, writer = versions.create(header)
        blobs.append(blob)
        writers.append(files.enter_context(writer))
        opener, sealer = encryption.opener(part.header), encryption.sealer(header)
        reader = files.enter_context(closing(versions.open_part(part)))
        digests = []
        for index in range(header.chunks):
            sealed = sealer.seal(index, opener.open(index, reader.read(index)))
            writer.write(sealed)
            digests.append(chunk_digest(sealed))
        return SealedPart(header, part.sizes, blob, Sha256Hex(content_digest(digests).hex()))

    try:
        with ExitStack() as files:
            whole, state, delta = again(version.whole, files), again(version.state, files), again(version.delta, files)
            shown = whole or delta
            assert shown is not None  # noqa: S101  a version is there whole, as a delta, or both
            content = whole.content_sha256 if whole else version.content_sha256
            made = replace(
                version,
                header=shown.header,
                content_sha256=content,
                blob=whole.blob if whole else "",
                state=state,
                delta=delta,
            )
            versions.commit(made, writers)
    except CortexError:
        versions.erase(blobs)
        raise
