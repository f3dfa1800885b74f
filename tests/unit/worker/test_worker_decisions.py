"""What a worker decides to do, given what it was told."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from cortex_common.ids import JobId, KeyId, NodeName, RoundNumber, SeatIndex
from cortex_common.job.parse import parse_job
from cortex_common.network.work import Assignment, Evaluate, Evaluated, Failed, Hold, Train
from cortex_common.security.objects import WrappedKey
from services.worker.domain import Finished, Held, forget_old, is_finished, next_work, plan_jobs

SPEC = parse_job({"model": {"input_dim": 64, "output_dim": 10}, "data": {"train": "digits"}})
KEY = WrappedKey(KeyId("k"), 1, bytes(80))
TRAINED = Evaluated(())


def assignment(name: str = "a", job: str = "j", round_number: int = 1, **changes: Any) -> Assignment:
    made = Assignment(
        assignment_id=name,
        job_id=JobId(job),
        transfer_id=JobId(job),
        round=RoundNumber(round_number),
        attempt=0,
        fence=1,
        seat=SeatIndex(0),
        seats=4,
        spec=SPEC,
        data_key=KEY,
        aggregator=NodeName("aggregator-1"),
        aggregator_address="127.0.0.1:1",
        base_sha256="ab",
        chunk_elements=1024,
        work=Train(),
    )
    return replace(made, **changes)


def test_jobs_take_free_slots_in_order_and_the_rest_is_refused() -> None:
    wanted = [assignment("1", "x"), assignment("2", "y"), assignment("3", "y"), assignment("4", "z")]
    plan = plan_jobs(wanted, (), 2)
    assert plan.begin == ("x", "y")
    assert [each.assignment_id for each in plan.refused] == ["4"]


def test_a_job_that_is_here_stays_and_one_not_wanted_ends() -> None:
    plan = plan_jobs([assignment("1", "new"), assignment("2", "here")], (JobId("gone"), JobId("here")), 2)
    assert (plan.end, plan.begin, plan.refused) == (("gone",), ("new",), ())


@given(
    wanted=st.lists(st.sampled_from("abcdef"), max_size=8),
    present=st.sets(st.sampled_from("abcdef"), max_size=3),
    slots=st.integers(3, 4),
)
def test_slots_are_never_overbooked_and_nothing_is_lost(wanted: list[str], present: set[str], slots: int) -> None:
    plan = plan_jobs([assignment(str(i), job) for i, job in enumerate(wanted)], tuple(map(JobId, present)), slots)
    after = (present - set(plan.end)) | set(plan.begin)
    refused = {each.job_id for each in plan.refused}
    assert len(after) <= slots
    assert after | refused == set(wanted)
    assert not after & refused
    assert not refused or len(after) == slots


def test_the_same_work_under_another_id_is_not_done_again() -> None:
    done = {assignment("1").key: Finished("1", TRAINED)}
    assert next_work([assignment("2")], done) is None
    assert next_work([assignment("2", attempt=1)], done) is not None
    assert next_work([assignment("2", round_number=2)], done) is not None


def test_a_failure_is_tried_again_only_under_a_new_id() -> None:
    failed = {assignment("1").key: Finished("1", Failed("crashed", False))}
    assert is_finished(assignment("1"), failed)
    assert not is_finished(assignment("2"), failed)


def test_holding_comes_after_real_work() -> None:
    hold, work = assignment("1", work=Hold()), assignment("2", work=Evaluate((0,), 4))
    assert next_work([hold, work], {}) == work
    assert next_work([hold], {}) == hold
    assert next_work([hold], {hold.key: Finished("1", Held())}) is None


def test_other_slices_are_other_work() -> None:
    done = {assignment(work=Evaluate((0,), 4)).key: Finished("a", TRAINED)}
    assert next_work([assignment(work=Evaluate((0, 1), 4))], done) is not None


def test_outcomes_of_old_rounds_are_forgotten() -> None:
    done = {assignment(round_number=number).key: Finished("a", TRAINED) for number in range(1, 8)}
    assert sorted(key.round for key in forget_old(done, [assignment(round_number=7)])) == [6, 7]
    assert forget_old(done, []) == done
