"""Holdings: the versions that are here, and those a region fetches from the round above."""

from __future__ import annotations

from collections.abc import Mapping

from cortex_common.errors import NotFoundError
from cortex_common.ids import JobId, NodeName, RoundNumber
from cortex_common.logging import get_logger
from services.aggregator.domain import RoundKey, RoundTerms, Upstream
from services.aggregator.folding import check_base
from services.aggregator.relaying import Relay
from services.aggregator.rounds import LiveRound
from services.aggregator.strategies import create_strategy
from services.aggregator.uploads import in_thread
from services.aggregator.versions import Version, VersionStore

log = get_logger(__name__)


class Holdings:
    """Finds a version by its digest, wherever it is."""

    def __init__(
        self, name: NodeName, versions: VersionStore, relay: Relay, rounds: Mapping[RoundKey, LiveRound]
    ) -> None:
        self._name = name
        self._versions = versions
        self._relay = relay
        self._rounds = rounds

    async def model(self, job_id: JobId, sha256: str, number: RoundNumber) -> Version:
        """A version to send.

        Raises:
            NotFoundError: it is not here, nor above.
        """
        return await self._find(job_id, sha256, number, self._above(job_id))

    async def base(self, terms: RoundTerms) -> Version:
        """The version a round starts from.

        Raises:
            NotFoundError: it is not here, nor above.
            PreconditionError: it was made with another strategy.
        """
        version = await self._find(terms.model_job_id, terms.base_sha256, terms.key.round, terms.upstream)
        if terms.upstream is None:
            check_base(version, terms, create_strategy(terms.strategy, terms.strategy_options))
        return version

    async def _find(self, job_id: JobId, sha256: str, number: RoundNumber, above: Upstream | None) -> Version:
        try:
            version = self._versions.by_sha256(job_id, sha256)
        except NotFoundError:
            if above is None:
                raise
            return await self._relay.fetch(above, sha256, number)
        if above is None or version.header.sender == self._name:
            return version
        return await self._whole(version, above, number)

    async def _whole(self, copy: Version, above: Upstream, number: RoundNumber) -> Version:
        """A copy with all its bytes: one that lost some is fetched again from where it came."""
        if await in_thread(lambda: self._versions.is_whole(copy)):
            return copy
        log.error("copy_damaged", job_id=copy.header.job_id, round=copy.header.round, sha256=copy.sha256)
        await in_thread(lambda: self._versions.delete(copy))
        return await self._relay.fetch(above, copy.sha256, number)

    def _above(self, job_id: JobId) -> Upstream | None:
        """Where copies of a job's versions come from: the newest round knows best."""
        mine = [
            live.terms for live in self._rounds.values() if live.terms.upstream and live.terms.model_job_id == job_id
        ]
        newest = max(mine, key=lambda terms: (terms.key.round, terms.key.attempt), default=None)
        return newest.upstream if newest else None
