"""Local training on real digits: determinism, amounts of work, failures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cortex_common.clock import SystemClock
from cortex_common.errors import CortexError, InvalidArgumentError
from cortex_common.job.parse import parse_job
from cortex_common.job.spec import JobSpec
from cortex_common.model import copy_to_arena, manifest_of
from cortex_common.tensors import Arena
from services.worker.failures import WorkCancelledError, WorkFailedError
from services.worker.trainer.batches import LocalWork, batch_indices, local_seed
from services.worker.trainer.device import choose_device
from services.worker.trainer.examples import DataCache
from services.worker.trainer.loop import ModelTrainer, Progress, TrainingResult
from services.worker.trainer.optimisers import build_optimizer, optimisers
from tests.fakes import ManualClock

CPU = torch.device("cpu")


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> None:
    torch.set_num_threads(1)


def job(model: dict[str, Any] | None = None, data: dict[str, Any] | None = None, **training: Any) -> JobSpec:
    return parse_job(
        {
            "model": {"input_dim": 64, "hidden_dims": [32], "output_dim": 10, **(model or {})},
            "data": {"train": "digits", "test": "digits-test", **(data or {})},
            "training": {"learning_rate": 0.01, **training},
        }
    )


class Bench:
    """A trainer with its arenas and data, as the child has them."""

    def __init__(self, spec: JobSpec, folder: Path, clock: Any = None, device: torch.device = CPU) -> None:
        self.device = device
        self.trainer = ModelTrainer(spec, device, clock or SystemClock())
        self.data = DataCache(spec, folder, None)
        manifest = manifest_of(self.trainer.model)
        self.base, self.result = Arena.zeros(manifest), Arena.zeros(manifest)
        copy_to_arena(self.trainer.model, self.base)

    def train(self, seat: int = 0, seats: int = 4, round_number: int = 1, **hooks: Any) -> TrainingResult:
        examples = self.data.training_part(seat, seats, self.device)
        return self.trainer.train(self.base, self.result, examples, round_number=round_number, seat=seat, **hooks)

    def accuracy(self) -> float:
        (score,) = self.trainer.evaluate(self.result, [self.data.test_slice(0, 1, self.device)])
        return score.correct / score.examples


@pytest.fixture
def bench(tmp_path: Path) -> Callable[..., Bench]:
    def make(*args: Any, clock: Any = None, **training: Any) -> Bench:
        return Bench(job(*args, **training), tmp_path, clock)

    return make


def test_training_learns_digits(bench: Callable[..., Bench]) -> None:
    one = bench(local_epochs=5)
    result = one.train(seats=1)
    assert one.accuracy() > 0.93
    assert result.examples == 5 * 1438
    assert result.steps == 5 * 45
    assert result.metrics["train_loss"] < 1
    assert 0.8 < result.metrics["train_accuracy"] <= 1


@pytest.mark.parametrize("settings", [{"dropout": 0.3}, {"dropout": 0.0}])
def test_the_same_work_gives_the_same_bytes(bench: Callable[..., Bench], settings: dict[str, Any]) -> None:
    one, two = bench(settings), bench(settings)
    one.train(seat=1, round_number=3)
    torch.manual_seed(99)
    two.train(seat=0, round_number=1)
    two.train(seat=1, round_number=3)
    assert one.result.values.tobytes() == two.result.values.tobytes()


def test_another_round_seat_or_seed_gives_another_order() -> None:
    seeds = {local_seed(*each) for each in [(0, 1, 0), (0, 1, 1), (0, 2, 0), (1, 1, 0), (0, 11, 0), (0, 1, 10)]}
    assert len(seeds) == 6


def test_each_seat_trains_on_its_own_part(bench: Callable[..., Bench]) -> None:
    one = bench()
    one.train(seat=0)
    first = one.result.values.copy()
    one.train(seat=1)
    assert not np.array_equal(first, one.result.values)


def test_the_base_is_not_touched(bench: Callable[..., Bench]) -> None:
    one = bench()
    before = one.base.values.tobytes()
    one.train()
    assert one.base.values.tobytes() == before


def test_no_steps_leave_the_model_as_it_is(bench: Callable[..., Bench]) -> None:
    one = bench(local_steps=0)
    result = one.train()
    assert one.result.values.tobytes() == one.base.values.tobytes()
    assert (result.steps, result.examples, result.metrics) == (0, 0, {})


def test_frozen_parameters_stay(bench: Callable[..., Bench]) -> None:
    one = bench({"freeze": ["hidden_1.*"]})
    one.train()
    views = [arena.views(manifest_of(one.trainer.model)) for arena in (one.base, one.result)]
    assert np.array_equal(views[0]["hidden_1.weight"], views[1]["hidden_1.weight"])
    assert not np.array_equal(views[0]["output.weight"], views[1]["output.weight"])


@pytest.mark.parametrize(
    ("training", "steps"),
    [
        ({}, 12),
        ({"local_epochs": 0.5}, 6),
        ({"local_epochs": 0.001}, 1),
        ({"local_epochs": 2.25}, 27),
        ({"local_steps": 7}, 7),
        ({"local_steps": 30}, 30),
    ],
)
def test_the_amount_of_work_is_the_jobs(bench: Callable[..., Bench], training: dict[str, Any], steps: int) -> None:
    assert bench(**training).train().steps == steps


def test_a_time_limit_ends_training(bench: Callable[..., Bench]) -> None:
    clock = ManualClock()
    one = bench(local_seconds=1.0, clock=clock)
    told: list[Progress] = []
    one.train(check=lambda: clock._move_to(clock.monotonic_s() + 0.1), tell=told.append)
    assert told[-1].share == pytest.approx(1.0)


def test_progress_is_told_twice_a_second(bench: Callable[..., Bench]) -> None:
    clock = ManualClock()
    one = bench(local_steps=100, clock=clock)
    told: list[Progress] = []
    one.train(check=lambda: clock._move_to(clock.monotonic_s() + 0.05), tell=told.append)
    assert 9 <= len(told) <= 10
    assert [each.share for each in told] == sorted(each.share for each in told)
    assert told[0].steps_per_s == pytest.approx(20, rel=0.2)
    assert np.isfinite(told[0].loss)


def test_each_epoch_sees_every_example_once_in_a_new_order() -> None:
    batches = batch_indices(100, 32, 7)
    epochs = [torch.cat([next(batches) for _ in range(4)]) for _ in range(2)]
    assert all(sorted(epoch.tolist()) == list(range(100)) for epoch in epochs)
    assert not torch.equal(*epochs)


def test_divergence_is_reported_as_the_jobs_fault(bench: Callable[..., Bench]) -> None:
    one = bench(learning_rate=1e30, optimizer="sgd", local_steps=20)
    with pytest.raises(WorkFailedError, match=r"training diverged .* learning_rate 1e\+30") as caught:
        one.train()
    assert caught.value.is_permanent


def test_training_stops_between_batches(bench: Callable[..., Bench]) -> None:
    calls = iter(range(100))

    def stop_at_five() -> None:
        if next(calls) == 5:
            raise WorkCancelledError("enough")

    with pytest.raises(WorkCancelledError):
        bench().train(check=stop_at_five)


def test_bf16_trains_too(bench: Callable[..., Bench]) -> None:
    one = bench(precision="bf16", local_epochs=4)
    one.train(seats=1)
    assert one.accuracy() > 0.85
    assert one.result.values.dtype == np.float32


def test_slices_add_up_to_the_whole(bench: Callable[..., Bench]) -> None:
    one = bench()
    one.train()
    (whole,) = one.trainer.evaluate(one.result, [one.data.test_slice(0, 1, CPU)])
    parts = one.trainer.evaluate(one.result, [one.data.test_slice(index, 7, CPU) for index in range(7)])
    assert sum(part.examples for part in parts) == whole.examples == 359
    assert sum(part.correct for part in parts) == whole.correct
    assert sum(part.loss_sum for part in parts) == pytest.approx(whole.loss_sum)
    assert one.trainer.evaluate(one.result, [one.data.test_slice(0, 1, CPU)]) == [whole]


def test_evaluation_agrees_with_torch(bench: Callable[..., Bench]) -> None:
    one = bench()
    examples = one.data.test_slice(0, 1, CPU)
    (score,) = one.trainer.evaluate(one.base, [examples])
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(one.trainer.model(examples.inputs), examples.labels)
    assert score.loss_sum / 359 == pytest.approx(float(loss), rel=1e-5)


@pytest.mark.parametrize(
    ("data", "model", "named"),
    [
        ({"train": "cats"}, {}, "data.train: dataset 'cats' is not on this node"),
        ({}, {"input_dim": 784}, "digits has inputs of 64 values and 10 classes; the model takes input_dim 784"),
        ({}, {"output_dim": 5}, "output_dim 5"),
    ],
)
def test_data_that_is_missing_or_does_not_fit_is_named(
    bench: Callable[..., Bench], data: dict[str, Any], model: dict[str, Any], named: str
) -> None:
    with pytest.raises(WorkFailedError, match=named):
        bench(model, data).train()


@pytest.mark.parametrize("name", ["adam", "AdamW", "SGD", "rmsprop", "Adagrad", "nadam", "adamax", "radam"])
def test_any_optimiser_of_torch_can_be_named(bench: Callable[..., Bench], name: str) -> None:
    one = bench(optimizer=name, local_steps=3, weight_decay=0.01)
    assert one.train().steps == 3
    assert not np.array_equal(one.base.values, one.result.values)


def test_options_reach_the_optimiser(bench: Callable[..., Bench]) -> None:
    one = bench(optimizer="sgd", optimizer_options={"momentum": 0.9, "nesterov": True})
    assert build_optimizer(one.trainer.model, one.trainer._spec.training).defaults["momentum"] == 0.9
    one = bench(optimizer_options={"betas": [0.8, 0.99]})
    assert build_optimizer(one.trainer.model, one.trainer._spec.training).defaults["betas"] == (0.8, 0.99)


@pytest.mark.parametrize(
    ("training", "named"),
    [
        ({"optimizer_options": {"momentum": 0.9}}, "momentum given; adam allows: amsgrad, betas"),
        ({"optimizer_options": {"betas": [2, 3]}}, "adam refuses its options: Invalid beta"),
        ({"optimizer": "sgd", "optimizer_options": {"nesterov": True}}, "Nesterov"),
        (
            {"optimizer": "sgd", "optimizer_options": {"momentum": True}},
            r"optimizer_options\.momentum: True given; allowed: a number",
        ),
    ],
)
def test_options_an_optimiser_does_not_take_are_named(
    bench: Callable[..., Bench], training: dict[str, Any], named: str
) -> None:
    with pytest.raises(InvalidArgumentError, match=named):
        bench(**training).train()


def test_an_unknown_optimiser_lists_the_known_ones(bench: Callable[..., Bench]) -> None:
    one = bench()
    wrong = one.trainer._spec.training.model_copy(update={"optimizer": "adamm"})
    with pytest.raises(InvalidArgumentError, match=r"'adamm' given; allowed: adadelta, .*sgd"):
        build_optimizer(one.trainer.model, wrong)
    assert {"adam", "sgd"} <= set(optimisers())
    assert "lbfgs" not in optimisers()


def test_zero_examples_cannot_be_asked_for(tmp_path: Path) -> None:
    with pytest.raises(CortexError, match="cannot be dealt"):
        DataCache(job(), tmp_path, None).training_part(0, 5000, CPU)


def test_a_device_this_node_lacks_is_not_the_jobs_fault() -> None:
    assert choose_device("auto", "cpu") == CPU
    assert choose_device("cpu", "auto") == CPU
    with pytest.raises(WorkFailedError, match="cuda:97 given; this node has: cpu") as caught:
        choose_device("cuda:97", "auto")
    assert not caught.value.is_permanent


def test_progress_of_no_work_is_done() -> None:
    assert LocalWork(0).is_done(0, 0.0)
    assert LocalWork(0).progress(0, 0.0) == 1.0


def test_a_version_without_a_finite_loss_is_the_jobs_fault_too(bench: Callable[..., Bench]) -> None:
    one = bench()
    one.base.values.fill(1e30)
    with pytest.raises(WorkFailedError, match="gives no finite loss on the test set") as caught:
        one.trainer.evaluate(one.base, [one.data.test_slice(0, 1, CPU)])
    assert caught.value.is_permanent
