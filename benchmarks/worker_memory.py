"""What taking part in rounds costs a worker in memory, above what PyTorch alone takes to train the same network."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Any

from benchmarks.bare_training import training_bytes
from benchmarks.network import BenchmarkError, RunningNetwork, running_network
from benchmarks.processes import peak_of_all, reset_peak, tree_of
from benchmarks.workloads import Kind, Workload, job_of, size_label
from cortex.client import Client
from cortex_common.codec import WeightCompressor, warm_up
from cortex_common.job.status import JobPhase, JobStatus

WORKER_MEMORY_KEY = ("parameters", "codec")
_SMALL = 1_000
_RESYNC_EVERY = 3
_FOR_ROUNDS = Workload(_SMALL, kind=Kind.EXCHANGE, workers=1, warm_up=4, rounds=6, cool_down=3)
# The loops are compiled beside the first rounds, or read from the cache; those of a tiny network are over in no time.
_UNTIL_COMPILED = replace(_FOR_ROUNDS, warm_up=60)


@dataclass(frozen=True, slots=True)
class WorkerCost:
    """Memory of one worker with all its processes, in bytes; peaks over several rounds, the first ones left out.

    Attributes:
        idle_bytes: Of the same job with a network of a thousand parameters: interpreters, libraries, compiled loops.
        peak_bytes: With a network of the size asked for.
        training_bytes: What PyTorch takes to train that, in a process with nothing of Cortex.
        model_bytes: Of its numbers, as float32.
    """

    idle_bytes: int
    peak_bytes: int
    training_bytes: int
    model_bytes: int


def above_bytes(entry: Mapping[str, Any]) -> int:
    """What comes on top of training, because there are rounds."""
    return int(entry["peak_bytes"] - entry["idle_bytes"] - entry["training_bytes"])


def allowed_bytes(model_bytes: int) -> float:
    """What may come on top: one and a half models, and 8 MB for windows and chunks in work."""
    return 1.5 * model_bytes + 8e6


def share_of_allowed(entry: Mapping[str, Any]) -> float:
    """How much of what is allowed was taken."""
    return above_bytes(entry) / allowed_bytes(entry["model_bytes"])


def measure(sizes: Sequence[int], codecs: Sequence[str]) -> Iterator[dict[str, Any]]:
    """One worker, each codec up and down with error feedback; one entry a size and codec."""
    with running_network(1) as network:
        training = {size: training_bytes(size) for size in sizes}
        for codec in codecs:
            warm_up(WeightCompressor.create(codec))
            idle_bytes, _ = _peak(network, replace(_UNTIL_COMPILED, codec=codec))
            for size in sizes:
                workload = replace(_FOR_ROUNDS, parameters=size, codec=codec)
                peak_bytes, parameters = _peak(network, workload)
                cost = WorkerCost(idle_bytes, peak_bytes, training[size], 4 * parameters)
                yield {**asdict(workload), **asdict(cost)}


def _peak(network: RunningNetwork, workload: Workload) -> tuple[int, int]:
    """Peak of the worker's processes over the rounds that count, and the parameters of the network.

    Raises:
        BenchmarkError: the job failed, or was over before it could be measured.
    """
    (worker,) = network.groups()["workers"]
    peak_bytes, pids = 0, frozenset[int]()
    last: JobStatus | None = None
    with Client(directory=network.directory) as client:
        job_id = client.submit(_job_of(workload))
        for last in client.watch(job_id):
            done = len(last.history)
            if done >= workload.warm_up and not pids:
                pids = tree_of(worker)
                for pid in pids:
                    reset_peak(pid)
            elif pids and done >= workload.warm_up + workload.rounds and not peak_bytes:
                # A trainer ends with its job.
                with suppress(OSError):
                    peak_bytes = peak_of_all(pids)
    if last is None or last.status is not JobPhase.COMPLETED or last.model is None:
        raise BenchmarkError(f"{workload.label}: {last.error if last else 'no status'}")
    if not peak_bytes:
        raise BenchmarkError(f"{workload.label}: the job was over before its memory could be read")
    return peak_bytes, last.model.parameters


def _job_of(workload: Workload) -> Mapping[str, object]:
    """The workload's job with its codec both ways, error feedback, and now and then a whole version."""
    job = job_of(workload)
    download = {"codec": workload.codec, "resync_every": _RESYNC_EVERY} if workload.codec != "none" else {}
    return {**job, "compression": {"codec": workload.codec, "download": download}}


def table(entries: Sequence[Mapping[str, Any]]) -> str:
    """A row for each size and codec."""
    lines = [
        "### Peak memory of a worker, above what training alone takes",
        "",
        "| parameters | codec, both ways | model MB | training alone MB | with rounds MB | above MB | of the model "
        "| allowed MB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    return "\n".join(lines + [row(entry) for entry in entries])


def row(entry: Mapping[str, Any]) -> str:
    """One of them."""
    model, training = entry["model_bytes"], entry["training_bytes"]
    above, allowed = above_bytes(entry), allowed_bytes(model)
    sizes = " | ".join(f"{value / 1e6:.0f}" for value in (model, training, training + above, above))
    verdict = f"{allowed / 1e6:.0f} {'met' if above <= allowed else '**missed**'}"
    return f"| {size_label(entry['parameters'])} | {entry['codec']} | {sizes} | {above / model:.2f}× | {verdict} |"
