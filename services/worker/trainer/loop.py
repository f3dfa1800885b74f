"""ModelTrainer: local training of one round, and evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from cortex_common.clock import Clock
from cortex_common.job.spec import JobSpec
from cortex_common.model import CortexModel, bind_to_arena, build_model, copy_from_arena, copy_to_arena
from cortex_common.tensors import Arena
from services.worker.failures import WorkFailedError
from services.worker.trainer.batches import LocalWork, TrainingExamples, local_seed
from services.worker.trainer.examples import Examples
from services.worker.trainer.optimisers import build_optimizer

_REPORT_EVERY_S = 0.5


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a training is.

    Attributes:
        share: 0 to 1.
        loss: Mean over the examples seen so far.
        steps_per_s: Mean so far.
    """

    share: float
    steps: int
    loss: float
    steps_per_s: float


@dataclass(frozen=True, slots=True)
class TrainingResult:
    """What a training did.

    Attributes:
        steps: Optimiser steps.
        examples: Examples seen, repetitions counted.
        seconds: Of training alone.
        metrics: train_loss and train_accuracy, means over the examples seen; empty without a step.
    """

    steps: int
    examples: int
    seconds: float
    metrics: dict[str, float]


@dataclass(frozen=True, slots=True)
class Score:
    """Sums over a part of the test set."""

    examples: int
    loss_sum: float
    correct: int


class ModelTrainer:
    """Trains the network of a job on one node.

    Everything random is seeded by (job seed, round, seat) and the optimiser is fresh each round, so that on a CPU with
    the same number of threads the same work gives the same bytes, whoever does it and however often.

    >>> import torch
    >>> from cortex import ModelTrainer, parse_job
    >>> from cortex_common.clock import SystemClock
    >>> from cortex_common.model import copy_to_arena, manifest_of
    >>> from cortex_common.tensors import Arena
    >>> from services.worker.trainer.examples import Examples
    >>> job = parse_job({
    ...     "model": {"input_dim": 10, "hidden_dims": [16], "output_dim": 10},
    ...     "data": {"train": "digits"},
    ...     "training": {"learning_rate": 0.05, "local_epochs": 5, "batch_size": 20},
    ... })
    >>> trainer = ModelTrainer(job, torch.device("cpu"), SystemClock())
    >>> layout = manifest_of(trainer.model)
    >>> base, result = Arena.zeros(layout), Arena.zeros(layout)
    >>> copy_to_arena(trainer.model, base)
    >>> labels = torch.arange(200) % 10
    >>> examples = Examples(torch.nn.functional.one_hot(labels, 10).float(), labels)
    >>> trained = trainer.train(base, result, examples, round_number=1, seat=0)
    >>> trained.steps, trained.examples, sorted(trained.metrics)
    (50, 1000, ['train_accuracy', 'train_loss'])
    >>> [score] = trainer.evaluate(result, [examples])
    >>> score.correct
    200
    """

    def __init__(self, spec: JobSpec, device: torch.device, clock: Clock) -> None:
        """Build the network.

        Args:
            spec: The job.
            device: Where to train; the arenas stay in main memory.
            clock: Measures and limits the training.
        """
        self.model: CortexModel = build_model(spec.model, spec.training.seed)
        self._spec = spec
        self._device = device
        self._clock = clock
        self.model.to(device)

    def train(
        self,
        base: Arena,
        result: Arena,
        examples: TrainingExamples,
        *,
        round_number: int,
        seat: int,
        check: Callable[[], None] = lambda: None,
        tell: Callable[[Progress], None] = lambda _: None,
    ) -> TrainingResult:
        """Train from `base` into `result`.

        Args:
            base: The version to start from; not changed.
            result: Receives the trained numbers.
            examples: What to train on, on the trainer's device.
            round_number: Part of the seed.
            seat: Part of the seed.
            check: Called before each batch; raises to stop.
            tell: Called about twice a second.

        Raises:
            WorkFailedError: the training diverged.
            InvalidArgumentError: optimiser or options are not known.
        """
        seed = local_seed(self._spec.training.seed, round_number, seat)
        self._start_from(base, result)
        self.model.train()
        with _random_numbers(self._device, seed):
            optimizer = build_optimizer(self.model, self._spec.training)
            outcome = self._steps(optimizer, examples, seed, check, tell)
            # As large as the model, and of no use until the next round's first step.
            optimizer.zero_grad(set_to_none=True)
        if self._device.type != "cpu":
            copy_to_arena(self.model, result)
        if not np.isfinite(result.values.sum(dtype=np.float64)):
            raise self._diverged(outcome.steps)
        return outcome

    def evaluate(
        self, version: Arena, parts: Iterable[Examples], check: Callable[[], None] = lambda: None
    ) -> list[Score]:
        """Score a version on parts of the test set, in fp32 whatever the job's precision.

        Args:
            version: Not changed.
            parts: Each on the trainer's device.
            check: Called before each batch; raises to stop.
        """
        self._start_from(version, version)
        self.model.eval()
        scores = [self._score(part, check) for part in parts]
        if not all(np.isfinite(score.loss_sum) for score in scores):
            raise WorkFailedError(
                "training diverged: the version gives no finite loss on the test set; a smaller learning_rate may help",
                is_permanent=True,
            )
        return scores

    @torch.no_grad()
    def _score(self, examples: Examples, check: Callable[[], None]) -> Score:
        loss_sum, correct = 0.0, 0
        for inputs, labels in examples.batches():
            check()
            logits = self.model(inputs)
            loss_sum += float(nn.functional.cross_entropy(logits.double(), labels, reduction="sum"))
            correct += int((logits.argmax(1) == labels).sum())
        return Score(len(examples), loss_sum, correct)

    def _start_from(self, base: Arena, result: Arena) -> None:
        if result is not base:
            np.copyto(result.values, base.values)
            np.copyto(result.counters, base.counters)
        if self._device.type == "cpu":
            bind_to_arena(self.model, result)
        else:
            copy_from_arena(self.model, base)

    def _steps(
        self,
        optimizer: torch.optim.Optimizer,
        examples: TrainingExamples,
        seed: int,
        check: Callable[[], None],
        tell: Callable[[Progress], None],
    ) -> TrainingResult:
        work = LocalWork.of(self._spec.training, examples)
        batches = examples.endless_batches(self._spec.training.batch_size, seed)
        tally = _Tally(self._device)
        started_s = told_s = self._clock.monotonic_s()
        elapsed_s = 0.0
        while not work.is_done(tally.steps, elapsed_s):
            check()
            self._step(optimizer, *next(batches), tally)
            now_s = self._clock.monotonic_s()
            elapsed_s = now_s - started_s
            if now_s - told_s >= _REPORT_EVERY_S:
                told_s = now_s
                loss = tally.mean_loss()
                if not np.isfinite(loss):
                    raise self._diverged(tally.steps)
                tell(Progress(work.progress(tally.steps, elapsed_s), tally.steps, loss, tally.steps / elapsed_s))
        metrics = tally.metrics()
        if not all(np.isfinite(value) for value in metrics.values()):
            raise self._diverged(tally.steps)
        return TrainingResult(tally.steps, tally.examples, self._clock.monotonic_s() - started_s, metrics)

    def _step(self, optimizer: torch.optim.Optimizer, inputs: Tensor, labels: Tensor, tally: _Tally) -> None:
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._spec.training.precision == "bf16"):
            logits = self.model(inputs)
        loss = nn.functional.cross_entropy(logits.float(), labels)
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        optimizer.step()
        tally.add(loss.detach(), logits.detach(), labels)

    def _diverged(self, steps: int) -> WorkFailedError:
        training = self._spec.training
        return WorkFailedError(
            f"training diverged (not a finite number after {steps} steps with {training.optimizer}, learning_rate "
            f"{training.learning_rate:g}, precision {training.precision}); a smaller learning_rate may help",
            is_permanent=True,
        )


@contextmanager
def _random_numbers(device: torch.device, seed: int) -> Iterator[None]:
    """Seed what a device draws from; afterwards all is as it was, for the sake of the program around this."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


class _Tally:
    """Running sums, kept on the device: reading them there would stop a GPU at every step."""

    def __init__(self, device: torch.device) -> None:
        # Not every accelerator has float64.
        precise = torch.float64 if device.type in {"cpu", "cuda"} else torch.float32
        self._loss = torch.zeros((), dtype=precise, device=device)
        self._correct = torch.zeros((), dtype=torch.int64, device=device)
        self.steps = 0
        self.examples = 0

    def add(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Count a step."""
        self._loss += loss * len(labels)
        self._correct += (logits.argmax(1) == labels).sum()
        self.steps += 1
        self.examples += len(labels)

    def mean_loss(self) -> float:
        """Over the examples seen."""
        return float(self._loss) / self.examples

    def metrics(self) -> dict[str, float]:
        """Means over the examples seen; nothing without any."""
        if not self.examples:
            return {}
        return {"train_loss": self.mean_loss(), "train_accuracy": int(self._correct) / self.examples}
