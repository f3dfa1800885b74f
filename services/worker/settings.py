"""Settings of a worker."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field, field_validator

from cortex_common.data import default_cache_dir
from cortex_common.settings import Bandwidth, ServiceSettings

Address = Annotated[str, Field(pattern=r"^.+:\d{1,5}$")]


class WorkerSettings(ServiceSettings):
    """What a worker needs to know besides what every service does.

    Attributes:
        coordinator: host:port to get work from.
        discovery: host:port to announce this node to.
        slots: Jobs at a time; each has its own trainer process.
        threads: Of each trainer. Results depend on it in the last bits: the same on all workers of a network.
        device: What `training.device: auto` means here: auto | cpu | cuda | cuda:N.
        cache_dir: Where fetched datasets are; shared by all workers of a machine.
        catalogue: This node's own datasets (see cortex_common.data.files).
        max_model_bytes: Largest model to accept.
        bandwidth: Most that updates take on the way up, and model versions on the way down.
    """

    coordinator: Address
    discovery: Address
    slots: int = Field(default=1, ge=1, le=64)
    threads: int = Field(default=1, ge=1, le=1024)
    device: str = Field(default="auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    cache_dir: Path = Field(default_factory=default_cache_dir)
    catalogue: Path | None = None
    max_model_bytes: int = Field(default=64 << 30, ge=1 << 20)
    bandwidth: Bandwidth = Bandwidth()

    @field_validator("cache_dir", "catalogue")
    @classmethod
    def _absolute(cls, path: Path | None) -> Path | None:
        return path.expanduser().absolute() if path is not None else None
