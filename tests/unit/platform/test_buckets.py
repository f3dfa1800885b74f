"""Token buckets: nobody gets more than their rate, whatever the order of their requests."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cortex_common.buckets import Allowance, Buckets


def test_a_burst_passes_and_then_the_rate_does() -> None:
    buckets = Buckets(Allowance(per_s=2, burst=3))
    assert [buckets.wait_s("a", 10.0) for _ in range(4)] == [0, 0, 0, 0.5]
    assert buckets.wait_s("a", 10.4) > 0
    assert buckets.wait_s("a", 10.5) == 0
    assert buckets.wait_s("b", 10.5) == 0, "everybody has their own"


def test_a_bucket_holds_no_more_than_the_burst() -> None:
    buckets = Buckets(Allowance(per_s=1, burst=2))
    buckets.wait_s("a", 0.0)
    assert [buckets.wait_s("a", 1e6) for _ in range(3)] == [0, 0, 1]


def test_what_costs_more_than_a_burst_takes_the_whole_bucket() -> None:
    buckets = Buckets(Allowance(per_s=1, burst=2))
    assert buckets.wait_s("a", 0.0, cost=5) == 0
    assert buckets.wait_s("a", 0.0) > 0


def test_only_so_many_are_remembered() -> None:
    buckets = Buckets(Allowance(per_s=1, burst=1), max_keys=2)
    for key in "abc":
        buckets.wait_s(key, 0.0)
    assert buckets.wait_s("a", 0.0) == 0, "forgotten, so full again"
    assert buckets.wait_s("c", 0.0) == 1


@given(
    per_s=st.floats(0.1, 100),
    burst=st.floats(1, 50),
    pauses=st.lists(st.floats(0, 5), min_size=1, max_size=200),
)
def test_in_any_time_at_most_burst_and_rate_are_let_through(per_s: float, burst: float, pauses: list[float]) -> None:
    buckets, now_s, passed = Buckets(Allowance(per_s, burst)), 0.0, 0
    for pause_s in pauses:
        now_s += pause_s
        passed += buckets.wait_s("a", now_s) == 0
    assert passed <= burst + per_s * now_s + 1e-6
