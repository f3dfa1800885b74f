"""Holdings: the versions that are here, and those a region fetches from the round above."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from cortex_common.errors import CorruptError, NotFoundError, OverloadedError
from cortex_common.identity import Identity, Role
from cortex_common.ids import JobId, NodeName, RoundNumber
from cortex_common.logging import get_logger
from cortex_common.tensors import Manifest
from services.aggregator.domain import RoundKey, RoundTerms, Upstream, missing_version, stranger_error
from services.aggregator.folding import check_base
from services.aggregator.relaying import Relay
from services.aggregator.rounds import LiveRound, members_of, newest_of
from services.aggregator.strategies import create_strategy
from services.aggregator.uploads import in_thread
from services.aggregator.versions import SealedPart, Version, VersionStore

log = get_logger(__name__)
_FETCHES = 4
"""One that somebody else had begun for another part, one of one's own, and the same again for a copy that went bad."""


class Holdings:
    """Finds a version by its digest, wherever it is."""

    def __init__(
        self, name: NodeName, versions: VersionStore, relay: Relay, rounds: Mapping[RoundKey, LiveRound]
    ) -> None:
        self._name = name
        self._versions = versions
        self._relay = relay
        self._rounds = rounds

    async def model(
        self, caller: Identity, job_id: JobId, sha256: str, held_sha256: str, number: RoundNumber
    ) -> SealedPart:
        """What to send to who wants a version and holds another one: a delta, or all of it.

        A worker gets versions of a job while it holds a seat there, and those of rounds it had one in.

        Raises:
            ForbiddenError: the caller is another worker.
            NotFoundError: it is not here, nor above.
        """
        if caller.role is Role.WORKER and not self._is_reader(caller.name, job_id, sha256):
            raise stranger_error(job_id, caller)
        above = self._above(job_id)
        for _ in range(_FETCHES):
            try:
                version = self._versions.by_sha256(job_id, sha256)
            except NotFoundError:
                if above is None:
                    raise
                version = await self._relay.fetch(above, sha256, held_sha256, number)
            part = await self._sound_part(version, held_sha256)
            if part is not None:
                return part
            if above is None or version.header.sender == self._name:
                raise CorruptError(f"{version.what} has lost its blob")
            # What there is of it does not help this caller: the delta from another version, or a copy that went bad.
            await self._relay.fetch(above, sha256, held_sha256, number)
        raise CorruptError(f"version {sha256[:12]} of job {job_id} does not stay whole on this disk")

    async def layout(self, terms: RoundTerms) -> Manifest:
        """The layout of the version a round starts from, which a region need not have yet: its workers will ask for it.

        Raises:
            NotFoundError: it is not here, nor anything of its job above, or nothing is known to be above.
            PreconditionError: it was made with another strategy.
        """
        job_id = terms.model_job_id
        if terms.upstream is None:
            version = self._versions.by_sha256(job_id, terms.base_sha256)
            check_base(version, terms, create_strategy(terms.strategy, terms.strategy_options))
            return version.manifest
        copies = self._versions.of_job(job_id)
        if copies:
            return copies[-1].manifest
        above = self._above(job_id) if terms.upstream.aggregator == self._name else terms.upstream
        if above is None:
            raise missing_version(job_id, terms.base_sha256, [])
        return (await self._relay.fetch(above, terms.base_sha256, "", terms.key.round)).manifest

    def follow(self, job_id: JobId) -> None:
        """Let downloads of a job's versions go on from where its newest round has them from."""
        above = self._above(job_id)
        if above is not None:
            self._relay.redirect(above)

    async def remember_members(self, job_id: JobId) -> None:
        """Write down with the versions of a job that ends who may download them when its rounds are forgotten."""
        ending = {live.terms.model_job_id for key, live in self._rounds.items() if key.job_id == job_id}
        for model_job in {job_id, *ending}:
            members = members_of(self._rounds, model_job)
            try:
                for version in self._versions.of_job(model_job):
                    await in_thread(partial(self._versions.admit, model_job, version.header.round, members))
            except OverloadedError as error:
                # What comes next makes room, and must not wait for it.
                log.warning("members_not_remembered", job_id=model_job, reason=error.message)

    def _is_reader(self, worker: NodeName, job_id: JobId, sha256: str) -> bool:
        versions = self._versions.of_job(job_id)
        last = newest_of(self._rounds, job_id) or versions[-1:]
        if any(each.has_member(worker) for each in last):
            return True
        return any(each.sha256 == sha256 and each.has_member(worker) for each in versions)

    async def _sound_part(self, version: Version, held_sha256: str) -> SealedPart | None:
        """What suits the caller and has all its bytes on the disk."""
        for part in filter(None, (self._versions.delta_from(version, held_sha256), version.whole)):
            if await in_thread(lambda part=part: self._versions.is_whole(part)):  # type: ignore[misc]
                return part
            header = part.header
            log.error("part_damaged", job_id=header.job_id, round=header.round, part=header.kind, blob=part.blob)
        return None

    def _above(self, job_id: JobId) -> Upstream | None:
        """Where copies of a job's versions come from: the newest round knows best that does not say from here."""
        mine = [live.terms for live in self._rounds.values() if live.terms.model_job_id == job_id]
        known = [(terms.key, up) for terms in mine if (up := terms.upstream) and up.aggregator != self._name]
        newest = max(known, key=lambda pair: (pair[0].round, pair[0].attempt), default=None)
        return newest[1] if newest else None
