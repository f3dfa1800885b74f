"""`python -m benchmarks.bare_training`: what PyTorch alone takes to train a network of this size."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Annotated

import typer

from benchmarks.network import BenchmarkError, child_environment
from benchmarks.processes import peak_bytes, reset_peak
from benchmarks.workloads import INPUT_DIM, Kind, Workload, job_of

_STEPS = 3


def training_bytes(parameters: int) -> int:
    """Memory that a process's training of the workloads' network takes, in a process of its own with nothing of Cortex.

    Weights, gradients, the optimiser's state and activations; not PyTorch itself.

    Raises:
        BenchmarkError: it failed.
    """
    command = [sys.executable, "-m", "benchmarks.bare_training", str(parameters)]
    done = subprocess.run(command, env=child_environment(), capture_output=True, text=True)
    if done.returncode:
        raise BenchmarkError(f"training without Cortex failed:\n{done.stderr[-2000:]}")
    return int(done.stdout)


def main(parameters: Annotated[int, typer.Argument(help="Of the network, within 5 %.")]) -> None:
    """Take a few steps as an exchange round's job does; print by how many bytes the peak rose."""
    import torch

    from cortex_common.job.parse import parse_job
    from cortex_common.model import build_model
    from services.worker.trainer.optimisers import build_optimizer

    def train(size: int) -> None:
        spec = parse_job(job_of(Workload(size, kind=Kind.EXCHANGE)))
        model = build_model(spec.model, seed=0)
        optimizer = build_optimizer(model, spec.training)
        for _ in range(_STEPS):
            loss = torch.nn.functional.cross_entropy(model(torch.ones(1, INPUT_DIM)), torch.zeros(1, dtype=torch.long))
            optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(loss)
            optimizer.step()

    torch.set_num_threads(1)
    train(1000)
    reset_peak(os.getpid())
    before = peak_bytes(os.getpid())
    train(parameters)
    typer.echo(peak_bytes(os.getpid()) - before)


if __name__ == "__main__":
    typer.run(main)
