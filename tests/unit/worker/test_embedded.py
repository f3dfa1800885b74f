"""What a program's own worker finds out before it connects."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from cortex_common.errors import InvalidArgumentError
from cortex_common.job.parse import parse_job
from cortex_common.security.node_tokens import NodeToken
from cortex_common.security.sealing import SealingKey
from services.worker.embedded import EmbeddedWorker
from tests.integration.manager.embedded import loader_for


def worker_of(folder: Path, training: Mapping[str, Any]) -> EmbeddedWorker:
    """A program's worker for a job that trains so, not connected to anything."""
    job = parse_job(
        {
            "name": "own",
            "model": {"input_dim": 8, "output_dim": 4},
            "data": {"train": "own"},
            "training": {"optimizer": "adam", **training},
        }
    )
    facts = {
        "name": "n1",
        "state_dir": folder,
        "gateway_url": "ws://127.0.0.1:9",
        "node_token": NodeToken.fresh().encode(),
    }
    return EmbeddedWorker(facts, loader_for(job), job, SealingKey("cortex"), serves_metrics=False)


@pytest.mark.parametrize(
    ("training", "says"),
    [
        ({"optimizer_options": {"momentun": 0.9}}, "training.optimizer_options: momentun given; adam allows: "),
        ({"optimizer_options": {"betas": [2, 3]}}, "training: adam refuses its options: Invalid beta"),
        ({"device": "cuda:99"}, "training.device: cuda:99 given; this node has: cpu"),
    ],
)
def test_training_that_cannot_go_well_is_refused_before_anything_is_submitted(
    tmp_path: Path, training: Mapping[str, Any], says: str
) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        worker_of(tmp_path, training)
    assert says in caught.value.message


@pytest.mark.parametrize(("batch_size", "warnings"), [(32, 0), (64, 1)])
def test_who_sets_another_batch_size_than_the_dataloaders_is_told_once_that_it_does_not_count_here(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, batch_size: int, warnings: int
) -> None:
    worker_of(tmp_path, {"batch_size": batch_size})
    told = [record for record in caplog.records if "batch_size_not_used" in str(record.msg)]
    assert [record.levelname for record in told] == ["WARNING"] * warnings
    assert all("the DataLoader's batches of 32" in str(record.msg) for record in told)
