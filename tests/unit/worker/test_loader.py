"""What a program's own DataLoader may give, and what is said of one that gives something else."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler, TensorDataset

from cortex_common.errors import InvalidArgumentError
from cortex_common.job.spec import ModelSpec
from services.worker.failures import WorkFailedError
from services.worker.trainer.loader import LoaderData

MODEL = ModelSpec(input_dim=4, hidden_dims=(3,), output_dim=2)
INPUTS, LABELS = torch.ones(6, 4), torch.tensor([0, 1, 0, 1, 0, 1])
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
