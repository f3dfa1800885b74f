"""Early stopping, the best round, and which versions stay."""

from __future__ import annotations

import pytest

from cortex_common.job.spec import CheckpointSpec, EarlyStoppingSpec
from cortex_common.job.status import RoundReport
from services.coordinator.domain.ending import best_round, kept_rounds, stopping_reason


def history(metric: str, *values: float) -> list[RoundReport]:
    return [RoundReport(round=index, metrics={metric: value}) for index, value in enumerate(values, start=1)]


def test_no_rule_never_stops():
    assert stopping_reason(history("test_accuracy", 0.5, 0.4, 0.3), None) is None


def test_training_stops_after_patience_rounds_without_improvement():
    rule = EarlyStoppingSpec(patience=2)
    assert stopping_reason(history("test_accuracy", 0.5, 0.6, 0.6), rule) is None
    assert "0.6000" in (stopping_reason(history("test_accuracy", 0.5, 0.6, 0.6, 0.59), rule) or "")


def test_a_gain_below_min_delta_is_none():
    rule = EarlyStoppingSpec(patience=1, min_delta=0.01)
    assert stopping_reason(history("test_accuracy", 0.5, 0.505), rule) is not None
    assert stopping_reason(history("test_accuracy", 0.5, 0.52), rule) is None


def test_a_loss_is_better_when_lower():
    rule = EarlyStoppingSpec(metric="test_loss", patience=1)
    assert stopping_reason(history("test_loss", 0.5, 0.4), rule) is None
    assert stopping_reason(history("test_loss", 0.5, 0.6), rule) is not None


@pytest.mark.parametrize(("metric", "value", "target"), [("test_accuracy", 0.9, 0.9), ("test_loss", 0.1, 0.2)])
def test_the_target_stops_training(metric, value, target):
    rule = EarlyStoppingSpec(metric=metric, target=target)
    assert "target" in (stopping_reason(history(metric, value), rule) or "")


def test_the_best_round_is_by_the_metric_of_the_rule():
    assert best_round(history("test_accuracy", 0.5, 0.9, 0.7), None) == 2
    assert best_round(history("test_loss", 0.5, 0.9, 0.2), EarlyStoppingSpec(metric="test_loss")) == 3
    assert best_round(history("train_loss", 0.5), None) is None


@pytest.mark.parametrize(
    ("keep", "every", "best", "kept"),
    [(3, 1, None, {8, 7, 6}), (3, 1, 2, {8, 2, 7}), (2, 4, 8, {8, 4}), (1, 1, 3, {8}), (9, 2, None, {8, 6, 4, 2})],
)
def test_versions_kept(keep, every, best, kept):
    rounds = history("test_accuracy", *[0.1] * 8)
    assert kept_rounds(rounds, 8, CheckpointSpec(every=every, keep=keep), best) == kept
