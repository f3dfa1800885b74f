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
        "state_dir": tmp_path,
        "gateway_url": "ws://127.0.0.1:9",
        "node_token": NodeToken.fresh().encode(),
    }
    with pytest.raises(InvalidArgumentError) as caught:
        EmbeddedWorker(facts, loader_for(job), job, "own", SealingKey("cortex"), serves_metrics=False)
    assert says in caught.value.message
