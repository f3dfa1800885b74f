"""What is said where no connection to a gateway can even be tried."""

from __future__ import annotations

import pytest

from cortex_common.errors import InvalidArgumentError
from cortex_common.network.messages import Hello
from cortex_common.network.websocket_link import GatewayAccess, open_link
from cortex_common.security.node_tokens import NodeToken


@pytest.mark.parametrize(
    ("url", "proxy", "says"),
    [
        ("ws://gateway:8765", "proxy:3128", "proxy"),
        ("ws://gateway:8765", "socks5://127.0.0.1:9", "python-socks"),
        ("ws://gateway..example.org:8765", None, "label"),
    ],
)
async def test_a_proxy_or_a_name_that_cannot_be_used_is_a_mistake_that_is_told(
    url: str, proxy: str | None, says: str
) -> None:
    access = GatewayAccess(url, NodeToken.fresh(), Hello("w1", "eu", "1"), "ab" * 32, proxy=proxy)
    with pytest.raises(InvalidArgumentError, match=says):
        await open_link(access, attends=True)
