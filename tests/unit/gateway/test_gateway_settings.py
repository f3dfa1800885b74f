"""What the gateway's settings allow together."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from services.gateway.settings import GatewaySettings

NEEDED = {
    "name": "g", "state_dir": ".", "ca": "a", "certificate": "b", "key": "c", "coordinator": "c:1", "discovery": "d:2",
}  # fmt: skip


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.7", "gateway.example", ""])
def test_plain_http_beyond_loopback_wants_to_be_allowed(host: str) -> None:
    with pytest.raises(ValidationError, match=f"host: {host!r} is not loopback.*allow_plain_http"):
        GatewaySettings(**NEEDED, host=host)
    assert GatewaySettings(**NEEDED, host=host, allow_plain_http=True).scheme == "http"
    assert GatewaySettings(**NEEDED, host=host, http_certificate="x", http_key="y").scheme == "https"


@pytest.mark.parametrize("host", ["127.0.0.1", "127.3.2.1", "::1", "localhost"])
def test_plain_http_on_loopback_needs_no_permission(host: str) -> None:
    assert GatewaySettings(**NEEDED, host=host).scheme == "http"
