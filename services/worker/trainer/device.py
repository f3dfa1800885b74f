"""Where to train."""

from __future__ import annotations

import torch

from services.worker.failures import WorkFailedError


def choose_device(wanted: str, rule: str) -> torch.device:
    """The device for a job.

    Args:
        wanted: By the job: auto | cpu | cuda | cuda:N.
        rule: Of this node, decides what `auto` means: auto | cpu | cuda | cuda:N.

    Raises:
        WorkFailedError: this node has no such device; another may.
    """
    name = wanted if wanted != "auto" else rule
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            here = ", ".join(["cpu", *(f"cuda:{index}" for index in range(count))])
            raise WorkFailedError(f"training.device: {name} given; this node has: {here}", is_permanent=False)
    return device
