"""A job under crashes, lost workers, lost messages and time: whatever happens, its books stay right and it ends.

The coordinator is the real state machine over a store that survives; the aggregator, the workers and the network are
simulated, each with the freedom the real ones have. Invariants are those of the design (I1 to I4, I7, I12).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from cortex_common.ids import JobId, NodeName, SeatIndex
from services.coordinator.domain.advance import Now, advance
from services.coordinator.domain.assignments import Work, assignments
from services.coordinator.domain.job import Contribution, Job, Note, Stage, Trained
from services.coordinator.domain.reach import EVERYTHING
from services.coordinator.domain.seen import (
    AggregatedVersion,
    AggregatorView,
    Failure,
    Rules,
    Seen,
    SliceScore,
    World,
)
from services.coordinator.memory_store import MemoryStore
from tests.unit.coordinator.jobs import new_job, update, worker

NAMES = [NodeName(name) for name in ("a", "b", "c", "d")]
RULES = Rules(attempts=1000, tries=3)


@dataclass
class Aggregator:
    """What the aggregator has on disk."""

    open_round: tuple[int, int] | None = None
    seats: dict[SeatIndex, NodeName] = field(default_factory=dict)
    accepted: dict[tuple[int, int], dict[SeatIndex, Contribution]] = field(default_factory=dict)
    folded: dict[int, tuple[int, tuple[Contribution, ...], str]] = field(default_factory=dict)

    def open(self, job: Job) -> None:
        if self.open_round is None or (job.round, job.attempt) >= self.open_round:
            self.open_round, self.seats = (job.round, job.attempt), dict(job.members)

    def push(self, round_number: int, attempt: int, seat: SeatIndex, name: NodeName) -> None:
        is_open = self.open_round == (round_number, attempt) and self.seats.get(seat) == name
        if is_open and round_number not in self.folded:
            self.accepted.setdefault((round_number, attempt), {}).setdefault(seat, update(seat, name))

    def seal(self, job: Job) -> AggregatedVersion:
        sealed = tuple(replace(entry, trained=None) for entry in job.sealed)
        here = self.accepted.get((job.round, job.attempt), {})
        assert all(here.get(entry.seat) == entry for entry in sealed), "I1: only accepted updates are sealed"
        earlier = self.folded.get(job.round)
        if earlier is not None:
            assert earlier[:2] == (job.attempt, sealed), "I4: a round is folded from one list only"
            return AggregatedVersion(earlier[2], "m" * 64, 10, 40, 1.0)
        base = self.folded[job.round - 1][2] if job.round else ""
        digest = f"{abs(hash((base, sealed))):064x}"[:64]
        self.folded[job.round] = (job.attempt, sealed, digest)
        return AggregatedVersion(digest, "m" * 64, 10, 40, 1.0)


class JobMachine(RuleBasedStateMachine):
    """Random schedules of everything that can happen to one job."""

    @initialize(minimum=st.integers(1, 3), quorum=st.sampled_from([0.5, 1.0]), tested=st.booleans())
    def submit(self, minimum, quorum, tested):
        data = {"train": "digits", "test": "digits-test"} if tested else {"train": "digits"}
        job = new_job(
            data=data,
            training={"rounds": 3},
            placement={"workers": 3, "min_workers": minimum},
            aggregation={"quorum": quorum, "deadline": 60, "grace": 5},
        )
        self.store = MemoryStore()
        self.epoch = self.store.acquire("one", 0.0)
        self.store.insert(job, None, Note("job_submitted", 0, ""), self.epoch, 0.0)
        self.job = job
        self.now_s = 1000.0
        self.aggregator = Aggregator()
        self.lost: dict[NodeName, float] = {}
        self.seen = Seen(since_s=self.now_s)
        self.ended: Job | None = None

    def _world(self) -> World:
        views = {name: worker(name, lost_since_s=self.lost.get(name)) for name in NAMES}
        return World(views, {NodeName("agg"): AggregatorView(NodeName("agg"), "eu", "x:1", is_live=True)})

    def _settle(self) -> None:
        for _ in range(20):
            verdict = advance(self.job, self.seen, self._world(), RULES, Now(self.now_s, self.now_s))
            if verdict.job is self.job:
                return
            before, self.job = self.job, verdict.job
            self.store.commit(before, self.job, verdict.notes, self.epoch, self.now_s)
            key = (before.stage, before.round, before.attempt)
            if key != (self.job.stage, self.job.round, self.job.attempt):
                self.seen = Seen(since_s=self.now_s)
        raise AssertionError("the machine does not come to rest")

    def _orders(self):
        return assignments(self.job, self.seen, self._world(), RULES, self.now_s)

    @rule()
    def decide(self):
        self._settle()

    @rule()
    def the_round_is_opened(self):
        if self.job.stage is Stage.COLLECTING:
            self.aggregator.open(self.job)
            self.seen = replace(self.seen, open_seats=dict(self.job.members))

    @rule(index=st.integers(0, 3), reported=st.booleans())
    def a_worker_does_its_work(self, index, reported):
        name = NAMES[index]
        order = self._orders().get(name)
        if order is None or name in self.lost:
            return
        if order.work in (Work.TRAIN, Work.INITIALISE):
            self.aggregator.push(order.round, order.attempt, order.seat, name)
            if reported and self.job.stage is Stage.COLLECTING:
                trained = Trained(name, 1.0, 0.1, 10, 5, {"train_loss": 1.0}, 5)
                self.seen = replace(self.seen, trained={**self.seen.trained, order.seat: trained})
        elif order.work is Work.EVALUATE and reported:
            scores = {index: SliceScore(10, 1.0, 5) for index in order.slices}
            self.seen = replace(self.seen, scores={**self.seen.scores, **scores})

    @rule(index=st.integers(0, 3))
    def an_old_worker_uploads_late(self, index):
        for seat, name in list(self.aggregator.seats.items()):
            if name == NAMES[index] and self.aggregator.open_round is not None:
                self.aggregator.push(self.aggregator.open_round[0], self.aggregator.open_round[1] - 1, seat, name)

    @rule()
    def progress_arrives(self):
        if self.job.stage is Stage.COLLECTING:
            here = self.aggregator.accepted.get((self.job.round, self.job.attempt), {})
            fresh = {seat: entry for seat, entry in here.items() if seat not in self.seen.accepted}
            self.seen = replace(
                self.seen,
                accepted={**self.seen.accepted, **fresh},
                accepted_at={**self.seen.accepted_at, **dict.fromkeys(fresh, self.now_s)},
            )

    @rule(answered=st.booleans())
    def the_list_is_folded(self, answered):
        if self.job.stage is Stage.SEALED:
            made = self.aggregator.seal(self.job)
            if answered:
                self.seen = replace(self.seen, aggregated=made)

    @rule(index=st.integers(0, 3))
    def a_worker_is_lost(self, index):
        self.lost.setdefault(NAMES[index], self.now_s)

    @rule(index=st.integers(0, 3))
    def a_worker_returns(self, index):
        self.lost.pop(NAMES[index], None)

    @rule(index=st.integers(0, 3))
    def a_worker_fails(self, index):
        order = self._orders().get(NAMES[index])
        if order is not None and NAMES[index] not in self.lost:
            failure = Failure(NAMES[index], "trainer died", is_permanent=False)
            known = self.seen.failures.get(order.seat, ())
            self.seen = replace(self.seen, failures={**self.seen.failures, order.seat: (*known, failure)})

    @rule(seconds=st.sampled_from([0.5, 3.0, 6.0, 11.0, 61.0]))
    def time_passes(self, seconds):
        self.now_s += seconds

    @rule()
    def the_coordinator_is_killed_and_started_again(self):
        self.epoch = self.store.acquire("next", self.now_s)
        stored = self.store.get(JobId("j1"), EVERYTHING)
        assert stored is not None
        assert stored == self.job, "what was decided had been stored before"
        self.job = stored
        self.seen = Seen(since_s=self.now_s)

    @invariant()
    def books_are_right(self):
        if not hasattr(self, "job"):
            return
        rounds = [report.round for report in self.job.history]
        assert rounds == list(range(1, len(rounds) + 1)), "each round ends once, in order"
        for report in self.job.history:
            _, sealed, digest = self.aggregator.folded[report.round]
            assert report.model_sha256 == digest, "I3: a version is what its list gives"
            assert report.accepted == len(sealed) == len({entry.seat for entry in sealed}), "I2: nobody counts twice"
            assert len({entry.worker for entry in sealed}) == len(sealed)
        held = [name for name in self.job.seats if name is not None]
        assert len(held) == len(set(held)), "a worker holds one seat"
        if self.ended is not None:
            assert replace(self.job, cleaned=False) == self.ended, "I7: an end is final"
        elif self.job.stage.is_terminal:
            self.ended = self.job

    def teardown(self):
        """I12: once faults stop, the job ends well."""
        if not hasattr(self, "job"):
            return
        self.lost.clear()
        for _ in range(200):
            if self.job.stage.is_terminal:
                break
            self._settle()
            self.the_round_is_opened()
            for index in range(len(NAMES)):
                self.a_worker_does_its_work(index, True)
            self.progress_arrives()
            self.the_list_is_folded(True)
            self.now_s += 1.0
            self.books_are_right()
        if self.job.stage is Stage.FAILED:
            assert "failed 3 times" in (self.job.error or ""), "only workers that keep failing end a job here"
            return
        assert self.job.stage is Stage.COMPLETED, (self.job.stage, self.job.error)
        assert len(self.job.history) == 3


JobMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)
TestJobMachine = JobMachine.TestCase
