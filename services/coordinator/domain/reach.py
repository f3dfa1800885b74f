"""Whose jobs a caller may see and steer; every question about a job carries the answer into its query."""

from __future__ import annotations

from dataclasses import dataclass

from cortex_common.ids import DEFAULT_ORG
from services.coordinator.domain.job import Job


@dataclass(frozen=True, slots=True)
class Reach:
    """The jobs of one organisation, or, without one, of all."""

    org: str | None

    def covers(self, job: Job) -> bool:
        """Whether the job is one of them."""
        return self.org is None or job.org == self.org


EVERYTHING = Reach(None)


@dataclass(frozen=True, slots=True)
class Caller:
    """Somebody who asks: `name` owns what they submit, for `org`."""

    name: str
    org: str = DEFAULT_ORG
    reach: Reach = EVERYTHING
