from __future__ import annotations

import io
from datetime import UTC, datetime

import pytest
from rich.console import Console

from cortex.cli.live import PlainView, picture
from cortex.cli.network import totals
from cortex.cli.tables import nodes_table, size
from cortex.views import DatasetView, GpuView, NodeView, ResourcesView
from cortex_common.job.status import Dropped, JobPhase, JobStatus, RoundReport, WorkerActivity
from tests.fakes import ManualClock

NOW = datetime(2026, 1, 1, tzinfo=UTC)
ROUNDS = tuple(
    RoundReport(
        round=n,
        seconds=2.0,
        bytes_up=2048,
        participants=4,
        accepted=4,
        metrics={"train_loss": 1 / n, "test_accuracy": 0.8},
    )
    for n in (1, 2, 3)
)


def status(phase: JobPhase, done: int = 0, **more: object) -> JobStatus:
    return JobStatus(
        job_id="j1", name="tiny", status=phase, round=done, rounds=3, history=ROUNDS[:done], submitted_at=NOW, **more
    )


@pytest.fixture
def screen() -> Console:
    return Console(file=io.StringIO(), width=160, highlight=False, markup=False)


def lines(screen: Console) -> list[str]:
    assert isinstance(screen.file, io.StringIO)
    return screen.file.getvalue().splitlines()


def test_without_a_terminal_each_round_is_one_line(screen):
    view = PlainView(screen, ManualClock())

    view.show(status(JobPhase.SUBMITTED, waiting_for="4 workers"))
    view.show(status(JobPhase.TRAINING, 1))
    view.show(status(JobPhase.AGGREGATING, 1))
    view.show(status(JobPhase.COMPLETED, 3))

    told = lines(screen)
    assert told[0] == "submitted: round 0/3, waiting for 4 workers"
    assert [line.split(":")[0] for line in told[1:]] == ["round 1/3", "round 2/3", "round 3/3", "completed"]
    assert "loss 1.0000, accuracy 0.8000, 2.0 s" in told[1]
    assert "4/4 accepted" in told[1]


async def test_a_long_wait_is_told_with_its_reason(screen):
    clock = ManualClock()
    view = PlainView(screen, clock)
    view.show(status(JobPhase.TRAINING, 1))

    await clock.advance(60)
    view.show(status(JobPhase.TRAINING, 1, waiting_for="worker eu-2 (training, 60 s)"))

    assert lines(screen)[-1] == "training: round 1/3, waiting for worker eu-2 (training, 60 s)"


def test_an_absent_coordinator_is_told_once(screen):
    view = PlainView(screen, ManualClock())

    view.away("coordinator cannot be reached")
    view.away("coordinator cannot be reached")

    assert lines(screen) == ["coordinator cannot be reached; trying again"]


def test_who_was_left_out_of_a_round_is_told(screen):
    report = ROUNDS[0].model_copy(update={"dropped": (Dropped(worker="us-1", reason="late"),)})

    PlainView(screen, ManualClock()).show(status(JobPhase.TRAINING).model_copy(update={"history": (report,)}))

    assert "dropped us-1 (late)" in lines(screen)[0]


def test_the_live_picture_shows_rounds_workers_and_what_is_waited_for(screen):
    worker = WorkerActivity(seat=0, worker="eu-1", region="eu", activity="training [fast]", since_s=4.2)

    screen.print(picture(status(JobPhase.TRAINING, 2, waiting_for="worker eu-1", workers=(worker,))))

    text = "\n".join(lines(screen))
    assert all(part in text for part in ("waiting  for worker eu-1", "0.5000", "2.0 KiB", "training [fast]", "4 s"))


def test_resources_count_live_workers_only():
    gpu = GpuView(name="H100", memory_bytes=80, memory_used_bytes=1, utilisation=0.5)
    owned = ResourcesView(cpu_cores=4, cpu_utilisation=0.5, slots=1, free_slots=1, gpus=(gpu,))
    digits = (DatasetView(name="digits", input_shape=(8, 8), classes=10, examples=1438),)
    nodes = [
        NodeView(name="eu-1", role="worker", region="eu", health="live", resources=owned, datasets=digits),
        NodeView(name="eu-2", role="worker", region="eu", health="expired", resources=owned),
        NodeView(name="us-1", role="worker", region="us", health="live", resources=owned),
        NodeView(name="coordinator", role="coordinator", region="eu", health="live", resources=owned),
    ]

    total, europe = totals(nodes, None), totals(nodes, "eu")

    assert (total["workers"], total["cpu_cores"], total["gpus"], total["cpu_utilisation"]) == (2, 8, 2, 0.5)
    assert (europe["workers"], europe["datasets"]) == (1, ["digits"])


def test_nodes_without_resources_are_shown_all_the_same(screen):
    screen.print(nodes_table([NodeView(name="gateway", role="gateway", region="eu", health="suspect")]))

    assert "gateway" in lines(screen)[1]


@pytest.mark.parametrize(("count", "text"), [(0, "0 B"), (1023, "1023 B"), (2048, "2.0 KiB"), (5 << 30, "5.0 GiB")])
def test_sizes_are_told_in_a_fitting_unit(count, text):
    assert size(count) == text
