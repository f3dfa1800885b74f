"""Training on a GPU: arenas stay in main memory, numbers agree with the CPU's, the same work gives the same bytes.

Run where PyTorch finds a CUDA device, skipped elsewhere.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from cortex_common.telemetry.resources import probe_resources
from services.worker.trainer.device import choose_device
from tests.unit.worker.test_model_trainer import Bench, job

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
GPU = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def deterministic(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a worker's trainer process."""
    monkeypatch.setitem(os.environ, "CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    torch.use_deterministic_algorithms(True)


def test_auto_means_the_gpu_and_one_too_many_is_refused_with_what_there_is() -> None:
    assert choose_device("auto", "auto").type == "cuda"
    assert choose_device("auto", "cpu").type == "cpu"
    with pytest.raises(Exception, match="this node has: cpu, cuda:0"):
        choose_device("cuda:77", "auto")


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_a_few_steps_agree_with_the_cpu(tmp_path: Path, optimizer: str) -> None:
    spec = job(optimizer=optimizer, local_steps=20)
    gpu, cpu = Bench(spec, tmp_path, device=GPU), Bench(spec, tmp_path)
    on_gpu, on_cpu = gpu.train(), cpu.train()
    assert on_gpu.steps == on_cpu.steps == 20
    assert on_gpu.metrics == pytest.approx(on_cpu.metrics, rel=1e-3)
    np.testing.assert_allclose(gpu.result.values, cpu.result.values, atol=2e-3)
    assert not np.array_equal(gpu.result.values, gpu.base.values)
    assert gpu.accuracy() == pytest.approx(cpu.accuracy(), abs=0.01)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_same_work_gives_the_same_bytes_also_with_dropout(tmp_path: Path, precision: str) -> None:
    spec = job({"dropout": 0.2}, local_steps=30, precision=precision)
    runs = [Bench(spec, tmp_path, device=GPU) for _ in range(2)]
    for run in runs:
        torch.rand(3, device=GPU)  # What went before on the device has no influence.
        run.train()
    np.testing.assert_array_equal(runs[0].result.values, runs[1].result.values)


def test_it_learns_in_bf16(tmp_path: Path) -> None:
    bench = Bench(job(local_epochs=10, precision="bf16"), tmp_path, device=GPU)
    bench.train(seats=1)
    assert bench.accuracy() > 0.85


def test_random_numbers_of_the_program_around_it_stay_as_they_would_have_been(tmp_path: Path) -> None:
    torch.cuda.manual_seed(5)
    expected = torch.rand(4, device=GPU)
    torch.cuda.manual_seed(5)
    Bench(job({"dropout": 0.2}, local_steps=2), tmp_path, device=GPU).train()
    assert torch.equal(torch.rand(4, device=GPU), expected)


def test_the_node_says_which_gpu_it_has() -> None:
    (gpu, *_) = probe_resources().gpus
    assert gpu.name
    assert 0 < gpu.memory_used_bytes <= gpu.memory_bytes
