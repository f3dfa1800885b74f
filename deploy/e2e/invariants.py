"""Jobs that are disturbed, and what must have come of them all the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from api import Api, job

ENDLESS = 100_000


class Disturbances:
    """One and the same job, disturbed again and again in different ways, and once by nobody."""

    def __init__(self, api: Callable[[], Api], **changes: Any) -> None:
        self._api = api
        self._changes = changes
        self._longest: list[str] = []

    @contextmanager
    def disturbed(self) -> Iterator[str]:
        """The job, going on until this is left; as far as the ones before went, its rounds must be theirs."""
        job_id = self._api().submit(job(ENDLESS, **self._changes))
        try:
            yield job_id
            self._api().gets_further(job_id)
            stopped = self._api().held(job_id)
        finally:
            self._api().cancel(job_id)
        digests = counted_once(stopped)
        print(f"job {job_id}: {len(digests)} rounds, goodput {stopped['goodput']:.2f}")
        self._compare(digests)

    def undisturbed(self) -> dict[str, Any]:
        """The job of as many rounds as any had, left alone: all those rounds must have given the same models."""
        assert self._longest, "no job has been disturbed yet"
        done = self._api().completed(self._api().submit(job(len(self._longest), **self._changes)))
        self._compare(counted_once(done))
        return done

    def _compare(self, digests: Sequence[str]) -> None:
        both = min(len(digests), len(self._longest))
        assert list(digests[:both]) == self._longest[:both]
        self._longest = max(self._longest, list(digests), key=len)


def counted_once(status: dict[str, Any], workers: int = 4) -> list[str]:
    """Digests of the model after each round; each round was counted once, with every worker's update once."""
    history = status["history"]
    assert [entry["round"] for entry in history] == list(range(1, len(history) + 1))
    assert {entry["accepted"] for entry in history} == {workers}
    digests = [str(entry["model_sha256"]) for entry in history]
    assert status["model"]["sha256"] == digests[-1]
    return digests
