"""What a machine has, as data."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Gpu:
    """One accelerator; `utilisation` is 0 to 1."""

    name: str
    memory_bytes: int
    memory_used_bytes: int
    utilisation: float


@dataclass(frozen=True, slots=True)
class Resources:
    """A node's resources, measured by the node itself; inside a container, what the container may use.

    Attributes:
        cpu_utilisation: Share of the machine's cores in use since an earlier probe, 0 to 1; 0 at the first.
        slots: Jobs a worker can train at a time; 0 for other nodes.
    """

    cpu_cores: int
    cpu_utilisation: float
    memory_bytes: int
    memory_available_bytes: int
    disk_free_bytes: int
    network_sent_bytes: int
    network_received_bytes: int
    gpus: tuple[Gpu, ...] = ()
    slots: int = 0
    free_slots: int = 0
