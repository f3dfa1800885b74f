"""What a prune may drop: decisions only."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from cortex_common.ids import JobId, RoundNumber
from services.aggregator.domain import Phase, RoundKey
from services.aggregator.rounds import LiveRound
from services.aggregator.versions import Version, VersionStore


def droppable(
    versions: VersionStore, job_id: JobId, rounds: Iterable[LiveRound], keep: Sequence[RoundNumber], *, ended: bool
) -> Sequence[Version]:
    """Versions that may go.

    Args:
        versions: All that are here.
        job_id: Whose.
        rounds: All that are known here.
        keep: Rounds whose versions stay.
        ended: The job has ended: nothing but `keep` stays. Otherwise versions newer than the last of `keep` stay too,
            which a prune that comes late knows nothing of, and the bases of rounds that are not made into one yet.
    """
    others = [each for each in versions.of_job(job_id) if each.header.round not in keep]
    if ended:
        return others
    last = max(keep, default=-1)
    needed = {
        live.terms.base_sha256 for live in rounds if live.terms.model_job_id == job_id and _needs_base(live, versions)
    }
    return [each for each in others if each.header.round <= last and each.sha256 not in needed]


def is_settled(live: LiveRound, versions: VersionStore, newest: RoundKey) -> bool:
    """Whether nobody needs a round's updates any more: given up, made into a version, passed by a later one."""
    if live.phase is not Phase.SEALED:
        return live.phase is Phase.ABORTED
    return newest.round > live.terms.key.round or (live.terms.upstream is None and _is_made(live, versions))


def _needs_base(live: LiveRound, versions: VersionStore) -> bool:
    """Its workers may fetch the base, or a fold reads it. A region's frozen round is folded one tier up."""
    if live.phase is Phase.SEALED:
        return live.terms.upstream is None and not _is_made(live, versions)
    return live.phase is Phase.OPEN


def _is_made(live: LiveRound, versions: VersionStore) -> bool:
    key = live.terms.key
    version = versions.of_round(key.job_id, key.round)
    return version is not None and version.header.attempt >= key.attempt
