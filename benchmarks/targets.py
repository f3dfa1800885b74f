"""What was to be reached, and what was: one table for a reader in a hurry."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks import worker_memory
from benchmarks.comparison_tables import null_period_s, period_s, row, seconds_of, seconds_to
from benchmarks.memory import allowed_bytes
from benchmarks.summary import Summary
from benchmarks.workloads import Kind, size_label

Entry = Mapping[str, Any]
Results = Mapping[str, Sequence[Entry]]
_M = 1_000_000
_IDLE_S = 0.025
_SEALED = 0.85


@dataclass(frozen=True, slots=True)
class NullTarget:
    """Of rounds without training: seconds, how many times faster than a peer, how many times Gloo's all-reduce."""

    parameters: int
    codec: str
    seconds: float
    flower: float
    nvflare: float | None = None
    gloo: float | None = None


NULL_TARGETS = (
    NullTarget(1 * _M, "int8", 0.12, 80),
    NullTarget(10 * _M, "none", 0.6, 20, gloo=5),
    NullTarget(10 * _M, "int8", 0.30, 45, nvflare=12, gloo=3),
    NullTarget(50 * _M, "int8", 1.2, 22, nvflare=8),
)


def table(results: Results) -> str | None:
    """All targets of which something was measured; None if there is none."""
    rows = [*_null_rows(results), *_training_rows(results), *_other_rows(results)]
    if not rows:
        return None
    head = ["### Targets", "", "| work | target | measured | |", "|---|---|---|---|"]
    return "\n".join(head + [row(cells) for cells in rows])


def _null_rows(results: Results) -> Iterator[tuple[str, str, str, str]]:
    entries = results.get("peers", ())
    for target in NULL_TARGETS:
        entry = _found(entries, system="cortex", parameters=target.parameters, codec=target.codec, kind=Kind.NULL)
        if entry is None:
            continue
        name = f"null round {size_label(target.parameters)} {target.codec} sealed, 4 workers"
        yield _at_most(name, seconds_of(entry).median, target.seconds)
        period = period_s(entry)
        for peer, factor in (("flower", target.flower), ("nvflare", target.nvflare)):
            theirs = null_period_s(entries, peer, target.parameters)
            if theirs and factor:
                yield _at_least(f"{name}: faster than {peer}", theirs / period, factor)
        gloo = null_period_s(entries, "gloo", target.parameters)
        if gloo and target.gloo:
            yield _at_most(f"{name}: of a Gloo all-reduce of the float32 vector", period / gloo, target.gloo, "×")


def _training_rows(results: Results) -> Iterator[tuple[str, str, str, str]]:
    entries = results.get("training", ())
    for goal in (0.85, 0.87):
        fedavg = _reached(entries, goal, system="cortex", algorithm="fedavg")
        for peer, share in (("flower", 1 / 8), ("nvflare", 0.6)):
            theirs = _reached(entries, goal, system=peer)
            if fedavg and theirs:
                name = f"Fashion-MNIST to {goal:.0%}, FedAvg: share of the time of {peer}"
                yield _at_most(name, fedavg / theirs, share, "×")
            elif fedavg and _found(entries, system=peer):
                yield f"Fashion-MNIST to {goal:.0%}", f"{share:.3g}× of {peer}", f"{peer} does not reach it", "met"
        for algorithm in ("fedavg", "diloco"):
            ours = _reached(entries, goal, system="cortex", algorithm=algorithm)
            bare = _reached(entries, goal, system="gloo", algorithm=algorithm)
            if ours and bare:
                name = f"Fashion-MNIST to {goal:.0%}, {algorithm}: of the same over Gloo without services"
                yield _at_most(name, ours / bare, 1.3, "×")


def _other_rows(results: Results) -> Iterator[tuple[str, str, str, str]]:
    idle = _found(results.get("rounds", ()), parameters=1_000, codec="none", kind=Kind.NULL)
    if idle:
        yield _at_most("idle round, 1k parameters, 4 workers", seconds_of(idle).median, _IDLE_S)
    worst = max(results.get("memory", ()), key=_memory_share, default=None)
    if worst:
        name = f"aggregator's peak memory, worst case ({size_label(worst['parameters'])}, {worst['codec']}, "
        allowed = allowed_bytes(worst["parameters"], worst["workers"])
        yield _at_most(f"{name}{worst['workers']} workers), MB", _peak(worst) / 1e6, allowed / 1e6, "")
    worker = max(results.get("worker_memory", ()), key=worker_memory.share_of_allowed, default=None)
    if worker:
        name = f"worker's memory above training, worst case ({size_label(worker['parameters'])}, {worker['codec']}), MB"
        allowed = worker_memory.allowed_bytes(worker["model_bytes"])
        yield _at_most(name, worker_memory.above_bytes(worker) / 1e6, allowed / 1e6, "")
    for entry in results.get("sealing", ()):
        sealed, unsealed = (
            Summary.of([value for run in entry[name] for value in run["seconds"]]).median
            for name in ("sealed", "unsealed")
        )
        name = f"sealed against unsealed throughput, {size_label(entry['parameters'])} {entry['codec']}"
        yield _at_least(name, unsealed / sealed, _SEALED, 2)


def _peak(entry: Entry) -> float:
    return float(max(run["peak_bytes"] for run in entry["runs"]))


def _memory_share(entry: Entry) -> float:
    return _peak(entry) / allowed_bytes(entry["parameters"], entry["workers"])


def _found(entries: Sequence[Entry], **wanted: object) -> Entry | None:
    return next((each for each in entries if all(each[name] == value for name, value in wanted.items())), None)


def _reached(entries: Sequence[Entry], goal: float, **wanted: object) -> float | None:
    entry = _found(entries, **wanted, codec="none")
    return seconds_to(entry, goal) if entry else None


def _at_most(work: str, value: float, target: float, unit: str = " s") -> tuple[str, str, str, str]:
    digits = 0 if value > 100 else 2 if value > 1 else 3
    verdict = "met" if value <= target else "**missed**"
    return work, f"≤ {target:.4g}{unit}", f"{value:.{digits}f}{unit}", verdict


def _at_least(work: str, value: float, target: float, digits: int = 0) -> tuple[str, str, str, str]:
    return work, f"≥ {target:g}×", f"{value:.{digits}f}×", "met" if value >= target else "**missed**"
