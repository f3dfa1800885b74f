"""Between which statuses of a job a benchmark counts."""

from __future__ import annotations

import pytest

from benchmarks.contestants import Counting
from benchmarks.network import BenchmarkError
from benchmarks.processes import Usage


def counted(told: list[int], begins: int, ends: int) -> tuple[float, int]:
    """Seconds and rounds counted when these numbers of rounds are told, one each second."""
    counting = Counting(begins, ends)
    for second, done in enumerate(told):
        counting.see(done, lambda at_s=float(second): Usage(at_s, {}, 0.0))  # type: ignore[misc]
    used, rounds = counting.between("the job")
    return used.at_s, rounds


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        ([0, 1, 2, 3, 4, 5], (3, 3)),  # each round told of
        ([0, 0, 1, 1, 4, 4, 5], (2, 3)),  # some together
        ([0, 2, 5], (1, 3)),
        ([4, 5], (1, 1)),  # those that count ended together: one that cools down is counted instead
    ],
)
def test_it_counts_between_the_first_statuses_that_tell_of_enough_rounds(
    told: list[int], expected: tuple[float, int]
) -> None:
    assert counted(told, begins=1, ends=4) == expected


def test_rounds_that_were_over_when_the_first_was_told_of_are_not_counted() -> None:
    with pytest.raises(BenchmarkError, match="the job: its rounds ended before a status told of them"):
        counted([0, 5, 5], begins=1, ends=4)
