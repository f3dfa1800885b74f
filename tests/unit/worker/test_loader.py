"""What a program's own DataLoader may give, and what is said of one that gives something else."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
)

from cortex_common.errors import InvalidArgumentError
from cortex_common.job.spec import ModelSpec
from services.worker.failures import WorkFailedError
from services.worker.trainer.loader import LoaderData

MODEL = ModelSpec(input_dim=4, hidden_dims=(3,), output_dim=2)
INPUTS, LABELS = torch.ones(6, 4), torch.tensor([0, 1, 0, 1, 0, 1])
DATA = TensorDataset(INPUTS, LABELS)
CPU = torch.device("cpu")


def loader(*tensors: Tensor) -> DataLoader:
    return DataLoader(TensorDataset(*tensors), batch_size=2)


@pytest.mark.parametrize("inputs", [INPUTS.double(), INPUTS.to(torch.uint8), INPUTS.view(6, 1, 2, 2), INPUTS.half()])
@pytest.mark.parametrize("labels", [LABELS, LABELS.int(), LABELS.to(torch.uint8)])
def test_any_numbers_become_what_training_takes(inputs, labels):
    part = LoaderData(loader(inputs, labels), MODEL).training_part(0, 1, CPU)
    assert (len(part), part.steps_per_epoch(32)) == (6, 3)
    given, classes = next(part.endless_batches(32, seed=0))
    assert (given.dtype, classes.dtype, classes.tolist()) == (torch.float32, torch.int64, [0, 1])


def test_a_list_of_batches_will_do():
    part = LoaderData([(INPUTS, LABELS)], MODEL).training_part(0, 1, CPU)
    batches = part.endless_batches(32, seed=0)
    assert [len(next(batches)[1]) for _ in range(3)] == [6, 6, 6]
    assert len(part) == 6


def test_the_size_of_batches_is_told_where_it_is_known():
    data = TensorDataset(INPUTS, LABELS)
    sampled = DataLoader(data, batch_sampler=BatchSampler(SequentialSampler(data), 3, drop_last=False))
    whole = DataLoader([(INPUTS, LABELS)], batch_size=None)
    sizes = [
        LoaderData(each, MODEL).batch_size for each in (loader(INPUTS, LABELS), sampled, whole, [(INPUTS, LABELS)])
    ]
    assert sizes == [2, 3, None, None]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (5, "int given; allowed: a torch DataLoader"),
        (iter([(INPUTS, LABELS)]), "list_iterator given; allowed: a torch DataLoader"),
        ([], "gives no batch"),
        (loader(INPUTS[:0], LABELS[:0]), "gives no batch"),
        ([(INPUTS[:0], LABELS[:0])], "a batch of nothing"),
        (loader(INPUTS), "a list of 1; allowed: pairs"),
        (loader(INPUTS, LABELS, LABELS), "a list of 3; allowed: pairs"),
        (loader(INPUTS[:, :3], LABELS), "3 values each; training.input_dim is 4"),
        (loader(INPUTS * math.nan, LABELS), "not finite; allowed: neither NaN nor infinity"),
        (loader(INPUTS, LABELS.float()), "labels.long() makes such of these"),
        (loader(INPUTS, LABELS.view(6, 1)), "labels.flatten() makes such of these"),
        (loader(INPUTS, torch.eye(2)[LABELS].long()), "labels.argmax(1) makes such of these"),
        (loader(INPUTS, LABELS + 1), "labels from 1 to 2; training.output_dim 2 allows 0 to 1"),
        (loader(INPUTS, LABELS - 1), "labels from -1 to 0"),
    ],
)
def test_what_the_model_does_not_take_is_said_at_once(given, says):
    with pytest.raises(InvalidArgumentError) as raised:
        LoaderData(given, MODEL)
    assert says in str(raised.value)


@pytest.mark.parametrize(
    ("spoilt", "says"),
    [
        ((INPUTS, torch.tensor([0, 1, 0, 1, 0, 7])), "labels from 0 to 7"),
        ((torch.cat([INPUTS[:5], INPUTS[5:] / 0]), LABELS), "not finite"),
    ],
)
def test_what_comes_later_fails_the_work_for_good_with_the_same_words(spoilt, says):
    batches = LoaderData(loader(*spoilt), MODEL).training_part(0, 1, CPU).endless_batches(32, seed=0)
    assert len(next(batches)[1]) == 2
    assert len(next(batches)[1]) == 2
    with pytest.raises(WorkFailedError) as raised:
        next(batches)
    assert says in str(raised.value)
    assert raised.value.is_permanent


class Stream(IterableDataset):
    """Gives its examples as long as it has any: once."""

    def __init__(self, examples: int) -> None:
        self._left = iter([(INPUTS[0], LABELS[0])] * examples)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self._left


@pytest.mark.parametrize("examples", [1, 2, 8])
def test_data_that_can_be_gone_through_once_only_is_told_and_not_waited_for(examples):
    given = LoaderData(DataLoader(Stream(examples), batch_size=2), MODEL)

    def train() -> None:
        next(given.training_part(0, 1, CPU).endless_batches(32, seed=0))

    with pytest.raises((InvalidArgumentError, WorkFailedError), match="gives no batch when it is gone through again"):
        train()


class Counted(IterableDataset):
    """Five examples, as often as they are asked for; counts that."""

    passes = 0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.passes += 1
        return iter([(INPUTS[0], LABELS[0])] * 5)


def test_a_loader_without_a_length_is_counted_once():
    data = Counted()
    given = LoaderData(DataLoader(data, batch_size=2), MODEL)
    parts = [given.training_part(0, 1, CPU) for _ in range(3)]
    assert [(len(part), part.steps_per_epoch(32)) for part in parts] == [(5, 3)] * 3
    assert data.passes == 2, "a look at the first batch, and the count"


@pytest.mark.parametrize(
    ("loader", "examples"),
    [
        (DataLoader(DATA, batch_size=2, sampler=SubsetRandomSampler([0, 1, 2])), 3),
        (DataLoader(DATA, batch_size=2, sampler=RandomSampler(DATA, num_samples=4)), 4),
        (DataLoader(DATA, batch_sampler=BatchSampler(SubsetRandomSampler([0, 1, 2]), 2, drop_last=False)), 3),
        (DataLoader([(INPUTS, LABELS), (INPUTS, LABELS)], batch_size=None), 12),
        (DataLoader(DATA, batch_size=4), 6),
    ],
)
def test_the_weight_of_an_update_is_what_its_loader_gives(loader, examples):
    assert len(LoaderData(loader, MODEL).training_part(0, 1, CPU)) == examples
