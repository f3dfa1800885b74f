"""Settings of a worker."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, SecretStr, field_validator, model_validator

from cortex_common.data import default_cache_dir
from cortex_common.settings import Bandwidth, ServiceSettings

_NOWHERE = Path()
_CERTIFIED = ("coordinator", "discovery", "ca", "certificate", "key")
_TOKENS = ("node_token", "node_token_file")
Address = Annotated[str, Field(pattern=r"^.+:\d{1,5}$")]


_ALLOWED = f"allowed are either {', '.join(_CERTIFIED)}, or gateway_url with one of {' and '.join(_TOKENS)}"


class WorkerSettings(ServiceSettings):
    """What a worker needs to know besides what every service does.

    It reaches its network in one of two ways. With a certificate: `coordinator`, `discovery`, `ca`, `certificate` and
    `key` are needed. Or through a gateway, over WebSocket, where only outgoing HTTP(S) is to be had: `gateway_url` and
    a node token are needed.

    Attributes:
        gateway_url: ws://host:port or wss://host:port of a gateway.
        node_token: From `cortex node token --gateway`; or in `node_token_file`.
        gateway_ca: PEM file of the authorities to trust for wss; the system's by default.
        gateway_proxy: The URL of an HTTP proxy (or a SOCKS one, with the package python-socks), `environment`
            (HTTPS_PROXY …), or `none`.
        gateway_timeout_s: Each attempt to connect there may take so long.
        gateway_attempts: Give up after so many that failed in a row; never, if unset.
        coordinator: host:port to get work from.
        discovery: host:port to announce this node to.
        slots: Jobs at a time; each has its own trainer process.
        threads: Of each trainer. Results depend on it in the last bits: the same on all workers of a network.
        fork_trainers: Make each trainer a copy of one process that has imported torch, instead of a new one (Linux).
        keep_updates: Keep a finished update on disk, sealed, until it is accepted: a node that is killed while it sends
            one goes on with it and does not train again. Unset: behind a gateway only.
        device: What `training.device: auto` means here: auto | cpu | cuda | cuda:N.
        cache_dir: Where fetched datasets are; shared by all workers of a machine.
        catalogue: This node's own datasets (see cortex_common.data.files).
        site_policy: This site's rules for jobs (docs/signed-jobs.md); read again when it changes.
        max_data_bytes: Most memory that sealed data of a job may take once they are opened.
        max_model_bytes: Largest model to accept.
        bandwidth: Most that updates take on the way up, and model versions on the way down.
    """

    coordinator: Address | None = None
    discovery: Address | None = None
    ca: Path = _NOWHERE
    certificate: Path = _NOWHERE
    key: Path = _NOWHERE
    gateway_url: str | None = Field(default=None, pattern=r"^wss?://.+$")
    node_token: SecretStr | None = None
    node_token_file: Path | None = None
    gateway_ca: Path | None = None
    gateway_proxy: str = Field(default="environment", pattern=r"^(environment|none|[a-z0-9]+://.+)$")
    gateway_timeout_s: float = Field(default=30.0, gt=0)
    gateway_attempts: int | None = Field(default=None, ge=1)
    slots: int = Field(default=1, ge=1, le=64)
    threads: int = Field(default=1, ge=1, le=1024)
    fork_trainers: bool = True
    keep_updates: bool | None = None
    device: str = Field(default="auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    cache_dir: Path = Field(default_factory=default_cache_dir)
    catalogue: Path | None = None
    site_policy: Path | None = None
    max_data_bytes: int = Field(default=16 << 30, ge=1 << 20)
    max_model_bytes: int = Field(default=64 << 30, ge=1 << 20)
    bandwidth: Bandwidth = Bandwidth()

    @property
    def updates(self) -> Path | None:
        """Where an update is kept until it is accepted, a folder a job; None where none is.

        By default only behind a gateway: the line is slow there, and the process often a person's own program.
        """
        keeps = self.gateway_url is not None if self.keep_updates is None else self.keep_updates
        return self.state_dir / "updates" if keeps else None

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if self.gateway_url is None:
            missing = [name for name in _CERTIFIED if getattr(self, name) in (None, _NOWHERE)]
            if missing:
                raise ValueError(f"{missing[0]}: {', '.join(missing)} missing; {_ALLOWED}")
        elif (self.node_token is None) == (self.node_token_file is None):
            raise ValueError(f"node_token: {'both' if self.node_token else 'none'} of {', '.join(_TOKENS)}; {_ALLOWED}")
        return self

    @field_validator("cache_dir", "catalogue", "site_policy")
    @classmethod
    def _absolute(cls, path: Path | None) -> Path | None:
        return path.expanduser().absolute() if path is not None else None
