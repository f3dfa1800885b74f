"""Leases run out, are renewed, replaced and forgotten as promised."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cortex_common.errors import AlreadyExistsError, ForbiddenError, InvalidArgumentError
from cortex_common.identity import Identity, Role
from cortex_common.ids import NodeName
from services.discovery.domain import (
    Announcement,
    Event,
    Health,
    LeaseRules,
    Registry,
    authorise,
    remembered,
    restored,
)

RULES = LeaseRules()
W1 = Announcement(NodeName("w1"), Role.WORKER, "eu", "", "first", b"w1")
W2 = Announcement(NodeName("w2"), Role.WORKER, "us", "", "first", b"w2")


def events(changes) -> list[Event]:
    return [change.event for change in changes]


def pass_time(registry: Registry, start_s: float, end_s: float, step_s: float = 0.5) -> list[Event]:
    """Let the sweeper run from `start_s` to `end_s`."""
    found, now_s = [], start_s
    while now_s <= end_s:
        found += events(registry.advance(now_s))
        now_s += step_s
    return found


def health_of(registry: Registry, now_s: float) -> dict[str, Health]:
    return {view.node.name: view.health for view in registry.view(now_s)}


def test_a_punctual_node_stays_live():
    registry = Registry(RULES, 0.0)
    assert events(registry.heartbeat(W1, 0.0, 0.0)) == [Event.JOINED]
    for second in range(3, 60, 3):
        assert pass_time(registry, second - 2.5, second) == []
        assert registry.heartbeat(W1, second, 0.0) == []
    assert health_of(registry, 57.0) == {"w1": Health.LIVE}


def test_silence_makes_suspect_then_expired_then_forgotten():
    registry = Registry(RULES, 0.0)
    registry.heartbeat(W1, 0.0, 0.0)
    assert pass_time(registry, 0.5, 6.5) == []
    assert pass_time(registry, 7.0, 9.5) == [Event.SUSPECTED]
    assert health_of(registry, 9.5) == {"w1": Health.SUSPECT}
    assert pass_time(registry, 10.0, 12.0) == [Event.EXPIRED]
    (view,) = registry.view(12.0)
    assert view.health is Health.EXPIRED
    assert view.lease_left_s == -2.0
    assert pass_time(registry, 12.5, 10.0 + 3599.0, step_s=1.0) == []
    assert pass_time(registry, 3609.5, 3610.5) == [Event.FORGOTTEN]
    assert registry.view(3611.0) == ()


def test_a_late_heartbeat_revives():
    registry = Registry(RULES, 0.0)
    registry.heartbeat(W1, 0.0, 0.0)
    pass_time(registry, 0.5, 8.0)
    assert events(registry.heartbeat(W1, 8.0, 0.0)) == [Event.REVIVED]
    assert pass_time(registry, 8.5, 20.0) == [Event.SUSPECTED, Event.EXPIRED]
    (change,) = registry.heartbeat(W1, 21.0, 0.0)
    assert (change.event, change.reason) == (Event.REVIVED, "heartbeat 3.0 s after its lease ran out")
    assert health_of(registry, 21.0) == {"w1": Health.LIVE}


def test_another_incarnation_replaces():
    registry = Registry(RULES, 0.0)
    registry.heartbeat(W1, 0.0, 0.0)
    (change,) = registry.heartbeat(replace(W1, incarnation="second", description=b"new"), 1.0, 0.0)
    assert (change.event, change.reason) == (Event.REPLACED, "incarnation second instead of first")
    assert [view.node.description for view in registry.view(1.0)] == [b"new"]
    assert registry.leave(W1.name, W1.role, "first", 1.0) == []  # the goodbye of the replaced one comes too late
    assert len(registry.view(1.0)) == 1


def test_leaving_ends_the_lease_at_once_and_twice_is_once():
    registry = Registry(RULES, 0.0)
    registry.heartbeat(W1, 0.0, 0.0)
    assert events(registry.leave(W1.name, W1.role, "first", 1.0)) == [Event.LEFT]
    assert registry.leave(W1.name, W1.role, "first", 1.0) == []
    assert registry.view(1.0) == ()


def test_a_move_to_another_address_is_a_change_but_new_words_are_not():
    registry = Registry(RULES, 0.0)
    registry.heartbeat(W1, 0.0, 0.0)
    assert registry.heartbeat(replace(W1, description=b"busy"), 1.0, 0.0) == []
    assert events(registry.heartbeat(replace(W1, address="10.0.0.1:5"), 2.0, 0.0)) == [Event.MOVED]


def test_a_name_held_by_a_live_node_of_another_role_is_refused():
    registry = Registry(RULES, 0.0)
    registry.heartbeat(W1, 0.0, 0.0)
    with pytest.raises(AlreadyExistsError, match="in use by the worker"):
        registry.heartbeat(replace(W1, role=Role.AGGREGATOR), 1.0, 0.0)
    pass_time(registry, 1.0, 12.0)
    registry.heartbeat(replace(W1, role=Role.AGGREGATOR, incarnation="x"), 12.0, 0.0)
    assert registry.view(12.0)[0].node.role is Role.AGGREGATOR


def test_nobody_is_blamed_for_silence_while_discovery_itself_was_away():
    registry = Registry(RULES, 0.0)
    registry.heartbeat(W1, 0.0, 0.0)
    assert registry.advance(600.0) == []  # stopped for ten minutes: no sweep came in between
    assert pass_time(registry, 600.5, 606.5) == []
    assert registry.heartbeat(W1, 606.5, 0.0) == []
    assert pass_time(registry, 607.0, 616.0) == [Event.SUSPECTED]


def test_after_a_restart_everyone_gets_one_lease_and_the_expired_stay_expired():
    before = Registry(RULES, 0.0)
    before.heartbeat(W1, 0.0, 5000.0)
    pass_time(before, 0.5, 15.0)
    before.heartbeat(W2, 15.0, 5015.0)
    memory = remembered(before, 20.0, 5020.0)
    after = restored(RULES, memory, 100.0, 5120.0)
    assert health_of(after, 100.0) == {"w1": Health.EXPIRED, "w2": Health.LIVE}
    assert {view.node.name: view.lease_left_s for view in after.view(100.0)} == {"w1": -110.0, "w2": 10.0}
    assert pass_time(after, 100.5, 109.5) == [Event.SUSPECTED]
    assert pass_time(after, 110.0, 110.0) == [Event.EXPIRED]
    assert [view.seen_wall_s for view in after.view(110.0)] == [5000.0, 5015.0]


def test_a_wall_clock_that_went_back_does_not_expire_into_the_future():
    before = Registry(RULES, 0.0)
    before.heartbeat(W1, 0.0, 5000.0)
    pass_time(before, 0.5, 15.0)
    after = restored(RULES, remembered(before, 15.0, 5015.0), 0.0, 1000.0)
    assert after.view(0.0)[0].lease_left_s == 0.0


def test_views_select_by_role_and_region():
    registry = Registry(RULES, 0.0)
    registry.heartbeat(W1, 0.0, 0.0)
    registry.heartbeat(W2, 0.0, 0.0)
    registry.heartbeat(Announcement(NodeName("a"), Role.AGGREGATOR, "eu", "", "i", b""), 0.0, 0.0)
    names = [view.node.name for view in registry.view(0.0)]
    assert names == ["a", "w1", "w2"]
    assert [view.node.name for view in registry.view(0.0, Role.WORKER, "eu")] == ["w1"]
    assert [view.node.name for view in registry.view(0.0, region="eu")] == ["a", "w1"]


def test_a_node_speaks_only_for_itself():
    caller = Identity("cortex", Role.WORKER, NodeName("w1"))
    authorise(caller, "w1", Role.WORKER, "heartbeat")
    with pytest.raises(ForbiddenError, match=r"worker 'w2' given; the caller's certificate says worker 'w1'"):
        authorise(caller, "w2", Role.WORKER, "heartbeat")
    with pytest.raises(ForbiddenError, match="aggregator 'w1' given"):
        authorise(caller, "w1", Role.AGGREGATOR, "heartbeat")
    with pytest.raises(ForbiddenError, match="leave: 'w2' given"):
        authorise(caller, "w2", None, "leave")


@pytest.mark.parametrize(("lease_s", "heartbeat_s", "forget_s"), [(6.0, 3.0, 1.0), (10.0, 0.0, 1.0), (10.0, 3.0, 0.0)])
def test_rules_that_would_suspect_punctual_nodes_are_refused(lease_s, heartbeat_s, forget_s):
    with pytest.raises(InvalidArgumentError, match="allowed"):
        LeaseRules(lease_s, heartbeat_s, forget_s)
