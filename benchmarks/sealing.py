"""Sealed against unsealed: the same rounds by the same network with AES-256-GCM, and with a copy in its place."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.contestants import Cortex
from benchmarks.network import running_network
from benchmarks.workloads import Workload

SEALING_KEY = ("parameters", "codec", "kind", "workers")
UNSEALED = Path(__file__).resolve().parent / "unsealed"


def measure(cases: list[Workload], repeat: int) -> list[dict[str, Any]]:
    """Seconds of rounds, sealed and not, turn by turn; one entry a case."""
    found: list[dict[str, Any]] = [{**asdict(case), "sealed": [], "unsealed": []} for case in cases]
    for _ in range(repeat):
        for name, path in (("sealed", ()), ("unsealed", (UNSEALED,))):
            with running_network(cases[0].workers, path) as network:
                cortex = Cortex(network)
                for case, entry in zip(cases, found, strict=True):
                    entry[name].append(asdict(cortex.run(case)))
    return found
