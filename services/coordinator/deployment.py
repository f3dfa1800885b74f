"""ModelDeploymentManager: which versions of a model exist, where they are, and getting them to people."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial

from cortex_common.errors import CortexError, NotFoundError, OverloadedError, UnavailableError
from cortex_common.ids import JobId, NodeName
from cortex_common.job.status import VersionInfo
from cortex_common.logging import get_logger
from cortex_common.tensors import safetensors_parts
from services.coordinator.client import AggregatorPort
from services.coordinator.domain.ending import best_round, kept_rounds
from services.coordinator.domain.job import Job
from services.coordinator.domain.reach import Reach
from services.coordinator.domain.topology import with_used
from services.coordinator.keys import JobKeys
from services.coordinator.orders import Leftover, Server
from services.coordinator.store import Store, StoredVersion
from services.coordinator.store_thread import StoreThread

log = get_logger(__name__)
_PIECE_BYTES = 1 << 20
# Each holds a whole model in memory until its reader has taken it.
_MAX_HELD = 8


class ModelDeploymentManager:
    """Lists, delivers and prunes model versions. Versions rest sealed at aggregators; only here are they opened.

    `services.coordinator.main.run` builds one (`RunningCoordinator.deployment`). After a job of two rounds:

    >>> from services.coordinator.domain.reach import EVERYTHING
    >>> [version.round for version in await deployment.versions(job.id, EVERYTHING)]
    [1, 2]
    >>> newest, pieces = await deployment.download(job, None, EVERYTHING)
    >>> file = b"".join([piece async for piece in pieces])
    >>> from safetensors.numpy import load
    >>> newest.round, load(file)["w"].shape
    (2, (4, 3))
    """

    def __init__(
        self,
        store: StoreThread[Store],
        keys: JobKeys,
        aggregators: AggregatorPort,
        address_of: Callable[[NodeName], str | None],
        refusal: Callable[[NodeName], str],
    ) -> None:
        """Deliver what aggregators hold.

        Args:
            store: Which versions there are.
            keys: To open them.
            aggregators: To call.
            address_of: Where an aggregator is now, as far as known.
            refusal: Why an aggregator is not called any more: it was shut out; empty if it is.
        """
        self._store = store
        self._keys = keys
        self._aggregators = aggregators
        self._address_of = address_of
        self._refusal = refusal
        self._pulling = asyncio.Semaphore(2)
        self._held = 0

    async def versions(self, job_id: JobId, reach: Reach) -> Sequence[VersionInfo]:
        """Versions that can be downloaded, oldest first."""
        stored = await self._store.call(lambda store: store.versions(job_id, reach))
        return [_info(job_id, each) for each in stored]

    async def download(
        self, job: Job, round_number: int | None, reach: Reach
    ) -> tuple[VersionInfo, AsyncIterator[bytes]]:
        """A version and its safetensors file in pieces; fetched whole and verified before the first piece.

        Raises:
            NotFoundError: no such version, or pruned; the message lists what there is.
            UnavailableError: its aggregator cannot be reached, or was shut out.
        """
        stored = await self._find(job.id, round_number, reach)
        if refusal := self._refusal(stored.aggregator):
            raise UnavailableError(refusal)
        server = self._server(stored.aggregator, job.aggregator_address)
        return _info(job.id, stored), self._pieces(job.id, stored, server)

    async def prune(self, job: Job, epoch: int) -> None:
        """Erase versions that the job's checkpoint rule gives up; what fails is made good after the next round."""
        try:
            await self.retire(job, epoch)
            for left in self.leftovers(job):
                await self._aggregators.clean(left.server(), left.job_id, epoch, left.keep, ended=False)
        except CortexError as error:
            log.warning("prune_failed", job_id=job.id, reason=error.message)

    async def retire(self, job: Job, epoch: int) -> None:
        """No longer offer the versions that the checkpoint rule gives up, and erase the keys that nothing needs now."""
        keep = self.kept(job)
        await self._store.call(lambda store: store.prune_versions(job.id, keep, epoch))
        await self._keys.erase(job, keep, epoch)

    def leftovers(self, job: Job) -> Sequence[Leftover]:
        """What to erase where: at the root, and at the aggregator of each tier with its copies of versions.

        What a region's aggregator holds that is shut out is left alone: whoever waited for it might wait for ever.
        """
        keep = tuple(sorted(self.kept(job)))
        holders = {job.aggregator or NodeName(""): job.aggregator_address}
        tiers = job.used if job.stage.is_terminal else with_used(replace(job, used=()))
        holders |= {each.aggregator: each.address for each in tiers if each.aggregator not in holders}
        found = [(name, Leftover(job.id, keep, partial(self._server, name, last))) for name, last in holders.items()]
        for each in tiers:
            server = partial(self._server, each.aggregator, each.address)
            found.append((each.aggregator, Leftover(each.transfer_id, (), server)))
        return [left for name, left in found if name == job.aggregator or not self._refusal(name)]

    def kept(self, job: Job) -> frozenset[int]:
        """Rounds whose versions stay."""
        newest = job.version.round if job.version else 0
        best = best_round(job.history, job.spec.training.early_stopping)
        return kept_rounds(job.history, newest, job.spec.training.checkpoint, best)

    def _server(self, aggregator: NodeName, last: str) -> Server:
        return Server(aggregator, self._address_of(aggregator) or last)

    async def _find(self, job_id: JobId, round_number: int | None, reach: Reach) -> StoredVersion:
        stored = await self._store.call(lambda store: store.versions(job_id, reach))
        for version in reversed(stored):
            if round_number is None or version.version.round == round_number:
                return version
        there = ", ".join(str(version.version.round) for version in stored) or "none"
        what = "any version" if round_number is None else f"a version of round {round_number}"
        raise NotFoundError(f"job {job_id} has not {what}; there are: {there}")

    async def _pieces(self, job_id: JobId, stored: StoredVersion, server: Server) -> AsyncIterator[bytes]:
        if self._held >= _MAX_HELD:
            raise OverloadedError(f"{self._held} models are being downloaded; allowed at a time are {_MAX_HELD}")
        self._held += 1
        try:
            keys = await self._keys.all(job_id)
            async with self._pulling:
                pulled = await self._aggregators.pull(server, job_id, stored.version.sha256, keys)
            if pulled.arena is None:
                raise NotFoundError(f"job {job_id}: the aggregator sent no model")
            for part in safetensors_parts(pulled.manifest, pulled.arena):
                view = memoryview(part).cast("B")
                for start in range(0, len(view), _PIECE_BYTES):
                    yield bytes(view[start : start + _PIECE_BYTES])
        finally:
            self._held -= 1


def _info(job_id: JobId, stored: StoredVersion) -> VersionInfo:
    version = stored.version
    return VersionInfo(
        job_id=job_id,
        round=version.round,
        sha256=version.sha256,
        manifest_sha256=version.manifest_sha256,
        parameters=version.parameters,
        size_bytes=version.size_bytes,
        metrics=version.metrics,
        created_at=datetime.fromtimestamp(version.created_s, UTC),
    )
