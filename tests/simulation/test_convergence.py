"""Every codec trains Fashion-MNIST to within half a point of float32, through the very code that a job runs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cortex_common.data import default_cache_dir, fashion
from cortex_common.errors import NotFoundError
from tests.simulation.federation import Data, Federation, Outcome, Plan

EXAMPLES, ROUNDS = 4000, 14
HALF_A_POINT = 0.005
TOPK = {"codec": "topk", "options": {"density": 0.1}, "warm_up_rounds": 4}

# Compression, and how many times fewer bytes it sends up and down than float32, at least.
WITHIN: dict[str, tuple[Mapping[str, Any], float, float]] = {
    "bf16": ({"codec": "bf16"}, 1.9, 1),
    "int8": ({"codec": "int8"}, 3.8, 1),
    "int8 stochastic": ({"codec": "int8", "options": {"stochastic": True}}, 3.8, 1),
    "int4": ({"codec": "int4"}, 7.4, 1),
    "int4 stochastic": ({"codec": "int4", "options": {"stochastic": True}}, 7.4, 1),
    "int4 without feedback": ({"codec": "int4", "error_feedback": False}, 7.4, 1),
    "topk 10 %": (TOPK, 14, 1),
    "topk 5 %": ({"codec": "topk", "options": {"density": 0.05}, "warm_up_rounds": 6}, 20, 1),
    "bf16 both ways": ({"codec": "bf16", "download": {"codec": "bf16"}}, 1.9, 1.8),
    "int8 both ways": ({"codec": "int8", "download": {"codec": "int8"}}, 3.8, 3.2),
    "int4 both ways": ({"codec": "int4", "download": {"codec": "int4"}}, 7.4, 5),
    "topk both ways": ({**TOPK, "download": {"codec": "topk", "options": {"density": 0.2}}}, 14, 5.5),
}


@pytest.fixture(scope="module")
def data() -> Data:
    torch.set_num_threads(1)
    try:
        fashion.fetch(default_cache_dir())
    except NotFoundError as error:
        pytest.skip(f"Fashion-MNIST is not to be had here: {error.message}")

    def images(part: str, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        pixels, labels = fashion.read(part, default_cache_dir())
        rows = torch.from_numpy(np.array(pixels[:count])).reshape(count, -1).float() / 255
        return (rows - 0.286) / 0.353, torch.from_numpy(labels[:count])

    return Data(*images("train", EXAMPLES), *images("test", 10_000))


@pytest.fixture(scope="module")
def exact(data: Data, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    return Federation(Plan.of({}, ROUNDS), data, tmp_path_factory.mktemp("exact")).run()


@pytest.mark.parametrize("name", WITHIN)
def test_within_half_a_point_of_float32(name: str, data: Data, exact: Outcome, tmp_path: Path) -> None:
    compression, up, down = WITHIN[name]
    outcome = Federation(Plan.of(compression, ROUNDS), data, tmp_path).run()
    assert outcome.settled() > exact.settled() - HALF_A_POINT
    assert sum(exact.bytes_up) > up * sum(outcome.bytes_up)
    assert sum(exact.bytes_down) >= down * sum(outcome.bytes_down)


def test_one_in_a_hundred_from_the_first_round_on_is_too_few(data: Data, exact: Outcome, tmp_path: Path) -> None:
    """What the documentation warns of; it also shows that the tests above can fail."""
    outcome = Federation(Plan.of({"codec": "topk"}, ROUNDS), data, tmp_path).run()
    assert outcome.settled() < exact.settled() - 2 * HALF_A_POINT
