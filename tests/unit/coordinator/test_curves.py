"""Gauges of where jobs stand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cortex_common.job.status import RoundReport
from cortex_common.telemetry.metrics import REGISTRY
from services.coordinator.curves import Curves
from services.coordinator.domain.job import Job
from services.coordinator.observers import Observers
from tests.unit.coordinator.jobs import new_job


def after_round(name: str, number: int, **metrics: float) -> Job:
    job = new_job()
    spec = job.spec.model_copy(update={"name": name})
    return replace(job, spec=spec, history=(RoundReport(round=number, metrics=metrics),))


def shown(what: str, **labels: str) -> float | None:
    return REGISTRY.get_sample_value(f"cortex_coordinator_job_{what}", labels)


def test_the_newest_round_of_a_job_is_shown():
    curves = Curves()
    curves.round_finished(after_round("a", 1, train_loss=2.0, test_accuracy=0.25), 0.0)
    curves.round_finished(after_round("a", 2, train_loss=1.5, test_accuracy=0.75), 0.0)

    assert shown("round", name="a") == 2
    assert shown("progress_ratio", name="a") == 1.0
    assert shown("loss", name="a", part="train") == pytest.approx(1.5)
    assert shown("accuracy_ratio", name="a", part="test") == pytest.approx(0.75)
    assert shown("loss", name="a", part="test") is None


def test_scalars_that_cannot_be_written_cost_neither_job_nor_gauges(tmp_path):
    root = tmp_path / "tensorboard"
    root.write_text("a file where the folder should be")
    observers = Observers(root)
    observers.round_finished(after_round("unwritten", 1, train_loss=2.0), 0.0)
    assert shown("round", name="unwritten") == 1
    root.unlink()
    observers.round_finished(after_round("unwritten", 2, train_loss=1.0), 0.0)
    observers.close()
    assert len(list(root.glob("*/events*"))) == 1, "as soon as it can be"


def test_goodput_is_the_share_of_time_that_went_into_rounds_that_counted():
    rounds = tuple(RoundReport(round=number, seconds=3.0) for number in (1, 2))
    job = replace(after_round("goodput", 1), started_s=100.0, history=rounds)

    Curves().round_finished(job, 108.0)

    assert shown("goodput_ratio", name="goodput") == job.goodput(108.0) == pytest.approx(0.75)
    assert replace(job, finished_s=106.0).goodput(1000.0) == 1.0
    assert replace(job, started_s=None).goodput(1000.0) == 0.0


def test_the_job_that_finished_a_round_longest_ago_makes_room():
    curves = Curves(most=2)
    for name in ("old", "kept", "old", "new"):
        curves.round_finished(after_round(name, 1, train_loss=1.0), 0.0)

    assert shown("round", name="kept") is None
    assert shown("goodput_ratio", name="kept") is None
    assert shown("loss", name="kept", part="train") is None
    assert shown("round", name="old") == shown("round", name="new") == 1
