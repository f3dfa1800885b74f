"""The registry against a model of it, under any order of heartbeats, silences, pauses, restarts and goodbyes."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from cortex_common.identity import Role
from cortex_common.ids import NodeName
from services.discovery.domain import Announcement, Event, Health, LeaseRules, Registry, remembered, restored

RULES = LeaseRules(lease_s=10.0, heartbeat_s=3.0, forget_s=60.0)
TICK_S = 0.5
NAMES = st.sampled_from(["a", "b", "c"])
INCARNATIONS = st.sampled_from(["1", "2"])


class Discovery(RuleBasedStateMachine):
    """The model counts, for each node, the ticks of silence that discovery was there to hear."""

    @initialize()
    def start(self):
        self.now_s = 1000.0
        self.registry = Registry(RULES, self.now_s)
        self.silent_ticks: dict[str, int] = {}
        self.expired_ticks: dict[str, int] = {}
        self.incarnation: dict[str, str] = {}
        self.suspected: set[str] = set()

    @rule(name=NAMES, incarnation=INCARNATIONS)
    def beat(self, name, incarnation):
        changes = self.registry.heartbeat(
            Announcement(NodeName(name), Role.WORKER, "eu", "", incarnation, b""), self.now_s, self.now_s
        )
        if name not in self.incarnation:
            assert [change.event for change in changes] == [Event.JOINED]
        elif self.incarnation[name] != incarnation:
            assert [change.event for change in changes] == [Event.REPLACED]
        self.silent_ticks[name] = 0
        self.suspected.discard(name)
        self.expired_ticks.pop(name, None)
        self.incarnation[name] = incarnation

    @rule(name=NAMES, incarnation=INCARNATIONS)
    def leave(self, name, incarnation):
        changes = self.registry.leave(NodeName(name), Role.WORKER, incarnation, self.now_s)
        known = self.incarnation.get(name) == incarnation
        assert [change.event for change in changes] == ([Event.LEFT] if known else [])
        if known:
            self._drop(name)

    @rule(ticks=st.integers(1, 30))
    def be_silent(self, ticks):
        for _ in range(ticks):
            self.now_s += TICK_S
            self.registry.advance(self.now_s)
            for name in list(self.incarnation):
                self._age(name)

    @rule(away_s=st.floats(3.5, 1000.0))
    def pause(self, away_s):
        """Discovery is stopped and goes on: no silence counts; the suspect and the expired stay so until heard."""
        away_s = round(away_s / TICK_S) * TICK_S
        self.now_s += away_s
        self.registry.advance(self.now_s)
        self._away(int(away_s / TICK_S))

    @rule(away_s=st.floats(0.0, 100.0))
    def restart(self, away_s):
        """Discovery ends and another process takes up its snapshot; the monotonic clock starts anywhere."""
        away_s = round(away_s / TICK_S) * TICK_S
        memory = remembered(self.registry, self.now_s, self.now_s)
        self.now_s += away_s
        self.registry = restored(RULES, memory, self.now_s, self.now_s)
        self.registry.advance(self.now_s)
        self.suspected.clear()
        self._away(int(away_s / TICK_S))

    def _away(self, ticks: int) -> None:
        for name in list(self.incarnation):
            if name in self.expired_ticks:
                self.expired_ticks[name] += ticks
                if self.expired_ticks[name] * TICK_S >= RULES.forget_s:
                    self._drop(name)
            else:
                self.silent_ticks[name] = 0

    def _age(self, name: str) -> None:
        if name in self.expired_ticks:
            self.expired_ticks[name] += 1
            if self.expired_ticks[name] * TICK_S >= RULES.forget_s:
                self._drop(name)
            return
        self.silent_ticks[name] += 1
        if self.silent_ticks[name] * TICK_S >= RULES.suspect_s:
            self.suspected.add(name)
        if self.silent_ticks[name] * TICK_S >= RULES.lease_s:
            self.expired_ticks[name] = 0

    def _drop(self, name: str) -> None:
        for book in (self.silent_ticks, self.expired_ticks, self.incarnation):
            book.pop(name, None)
        self.suspected.discard(name)

    @invariant()
    def health_is_what_silence_says(self):
        found = {view.node.name: view for view in self.registry.view(self.now_s)}
        assert set(found) == set(self.incarnation)
        for name, view in found.items():
            silence_s = self.silent_ticks[name] * TICK_S
            if name in self.expired_ticks:
                assert view.health is Health.EXPIRED
                assert view.lease_left_s == -self.expired_ticks[name] * TICK_S
                continue
            assert view.health is (Health.SUSPECT if name in self.suspected else Health.LIVE)
            assert view.lease_left_s == RULES.lease_s - silence_s
            assert view.node.incarnation == self.incarnation[name]


TestDiscovery = Discovery.TestCase
TestDiscovery.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
