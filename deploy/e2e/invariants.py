"""Jobs that are disturbed, and what must have come of them all the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from api import Api, job

ENDLESS = 100_000


class Undisturbed:
    """The digests of the model after each round of a job that nobody disturbed, made as far as they are asked for."""

    def __init__(self, api: Callable[[], Api], **changes: Any) -> None:
        self._api = api
        self._changes = changes
        self._digests: list[str] = []

    def digests(self, rounds: int) -> list[str]:
        """Of that many rounds."""
        if len(self._digests) < rounds:
            done = self._api().completed(self._api().submit(job(rounds, **self._changes)))
            self._digests = [entry["model_sha256"] for entry in done["history"]]
        return self._digests[:rounds]

    @contextmanager
    def disturbed(self) -> Iterator[str]:
        """The same job, going on until this is left; then it must have gone as if nobody had disturbed it."""
        job_id = self._api().submit(job(ENDLESS, **self._changes))
        try:
            yield job_id
            self._api().gets_further(job_id)
            stopped = self._api().held(job_id)
        finally:
            self._api().cancel(job_id)
        print(f"job {job_id}: {len(stopped['history'])} rounds, goodput {stopped['goodput']:.2f}")
        assert_nothing_was_lost(stopped, self.digests(len(stopped["history"])))


def assert_nothing_was_lost(status: dict[str, Any], digests: Sequence[str], workers: int = 4) -> None:
    """Each round once, each with every worker's update once, and after each the model of an undisturbed run."""
    history = status["history"]
    assert [entry["round"] for entry in history] == list(range(1, len(history) + 1))
    assert {entry["accepted"] for entry in history} == {workers}
    assert [entry["model_sha256"] for entry in history] == list(digests)
    assert status["model"]["sha256"] == digests[-1]
