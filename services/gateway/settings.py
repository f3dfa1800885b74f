"""Settings of the gateway."""

from __future__ import annotations

from pathlib import Path
from typing import Self

from pydantic import Field, model_validator

from cortex_common.settings import ServiceSettings


class GatewaySettings(ServiceSettings):
    """Where the gateway listens (`host`, `port`: HTTP) and whom it calls.

    Attributes:
        coordinator: host:port of the coordinator.
        discovery: host:port of discovery.
        tokens: The token file; `<state_dir>/tokens.json` if unset.
        http_certificate: PEM file; HTTPS if set together with `http_key`, plain HTTP if neither is.
        max_event_streams: Event streams open at a time.
        watch_patience_s: An event stream outlives a coordinator that is away for less.
    """

    port: int = Field(default=8080, ge=0, le=65535)
    coordinator: str = Field(pattern=r".+:\d+$")
    discovery: str = Field(pattern=r".+:\d+$")
    tokens: Path | None = None
    http_certificate: Path | None = None
    http_key: Path | None = None
    max_body_bytes: int = Field(default=1 << 20, gt=0)
    max_event_streams: int = Field(default=100, gt=0, le=120)
    watch_patience_s: float = Field(default=60.0, ge=0.0)

    @model_validator(mode="after")
    def _both_or_neither(self) -> Self:
        if (self.http_certificate is None) != (self.http_key is None):
            raise ValueError("http_certificate and http_key: allowed are both (HTTPS) or neither (HTTP)")
        return self

    @property
    def token_file(self) -> Path:
        """Where the tokens are."""
        return self.tokens or self.state_dir / "tokens.json"

    @property
    def scheme(self) -> str:
        """How clients begin the URL: http or https."""
        return "https" if self.http_certificate else "http"
