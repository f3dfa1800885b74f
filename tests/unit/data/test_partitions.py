"""Dealing examples to seats."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cortex_common.data import Partition, partition
from cortex_common.data.partition import shuffled
from cortex_common.errors import InvalidArgumentError

LABELS = np.arange(1000) * 7 % 10

deals = st.one_of(
    st.builds(Partition, st.just("iid"), st.integers(0, 2**63 - 1)),
    st.builds(Partition, st.just("dirichlet"), st.integers(0, 2**63 - 1), st.floats(1e-3, 1e3)),
    st.builds(Partition, st.just("shards"), st.integers(0, 2**63 - 1), st.none(), st.integers(1, 4)),
)


@given(
    deal=deals,
    seats=st.integers(1, 25),
    labels=st.lists(st.integers(0, 9), min_size=100, max_size=300).map(np.asarray),
)
@settings(max_examples=150, deadline=None)
def test_every_example_is_in_exactly_one_seat_and_no_seat_is_empty(
    deal: Partition, seats: int, labels: np.ndarray
) -> None:
    parts = partition(labels, deal, seats)
    assert len(parts) == seats
    assert all(len(part) and np.all(np.diff(part) > 0) for part in parts)
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(len(labels)))


@given(deal=deals)
@settings(max_examples=20, deadline=None)
def test_the_deal_is_the_same_whoever_computes_it(deal: Partition) -> None:
    for mine, theirs in zip(partition(LABELS, deal, 5), partition(LABELS.copy(), deal, 5), strict=True):
        assert np.array_equal(mine, theirs)


def test_another_seed_gives_another_deal() -> None:
    first, second = (partition(LABELS, Partition("iid", seed), 4)[0] for seed in (0, 1))
    assert not np.array_equal(first, second)


def test_the_deal_does_not_change_between_versions() -> None:
    """A node with another version of Cortex or numpy must deal alike; these digests are of the first release."""
    digest = hashlib.sha256(partition(LABELS, Partition("iid", 42), 4)[1].astype("<i8").tobytes()).hexdigest()
    assert digest[:16] == "dcc3aec2244ba4a1"
    digest = hashlib.sha256(partition(LABELS, Partition("shards", 42), 4)[1].astype("<i8").tobytes()).hexdigest()
    assert digest[:16] == "18076aa4f390f963"  # pragma: allowlist secret


def test_iid_parts_are_equal_to_one_example() -> None:
    sizes = [len(part) for part in partition(np.zeros(1003), Partition(), 4)]
    assert max(sizes) - min(sizes) <= 1


def test_a_small_alpha_is_uneven_and_a_large_one_even() -> None:
    def spread(alpha: float) -> float:
        parts = partition(LABELS, Partition("dirichlet", 3, alpha), 5)
        shares = np.array([np.bincount(LABELS[part], minlength=10) for part in parts]) / 100
        return float(shares.std())

    assert spread(0.05) > 0.25 > 0.05 > spread(100.0)


def test_shards_limit_the_classes_of_a_seat() -> None:
    parts = partition(LABELS, Partition("shards", 1, per_worker=2), 5)
    assert all(len(np.unique(LABELS[part])) <= 4 for part in parts)
    assert {len(part) for part in parts} == {200}


def test_local_gives_every_node_all_it_has() -> None:
    for part in partition(LABELS, Partition("local"), 3):
        assert np.array_equal(part, np.arange(len(LABELS)))


@pytest.mark.parametrize(
    ("deal", "seats", "named"),
    [
        (Partition("alphabetic"), 4, "allowed: iid, dirichlet, shards, local"),
        (Partition("dirichlet", 0, -1.0), 4, "alpha"),
        (Partition("shards", 0, None, 500), 4, "allowed: 1 to 250"),
        (Partition(), 0, "at least 1"),
        (Partition(), 1001, "1000 examples cannot be dealt to 1001 workers"),
    ],
)
def test_an_impossible_deal_says_what_is_allowed(deal: Partition, seats: int, named: str) -> None:
    with pytest.raises(InvalidArgumentError, match=named.replace("(", "\\(")):
        partition(LABELS, deal, seats)


def test_shuffling_is_a_permutation() -> None:
    assert np.array_equal(np.sort(shuffled((1, 2), 1000)), np.arange(1000))
