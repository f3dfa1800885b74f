"""How a person, or a program, is told about a local network."""

from __future__ import annotations

from typing import Any

from cortex.local.layout import DEFAULT_DIR, Layout
from cortex.local.network import LocalNetwork
from cortex_common.identity import Role


def facts_of(layout: Layout, network: LocalNetwork, token: str) -> dict[str, Any]:
    """Addresses and secrets of a network as JSON knows them."""
    return {
        "dir": str(layout.root),
        "network": network.network,
        "coordinator": network.address(Role.COORDINATOR),
        "discovery": network.address(Role.DISCOVERY),
        "aggregators": {member.name: member.address() for member in network.of_role(Role.AGGREGATOR)},
        "gateway": f"http://{network.address(Role.GATEWAY, 'http')}",
        "websocket": websocket_url(network),
        "workers": [member.name for member in network.of_role(Role.WORKER)],
        "token": token,
        "token_file": str(layout.token_file),
        "tensorboard": str(layout.tensorboard),
    }


def websocket_url(network: LocalNetwork) -> str:
    """Where it takes nodes without a certificate."""
    return f"ws://{network.address(Role.GATEWAY, 'websocket')}"


def describe(layout: Layout, network: LocalNetwork, token: str, *, detached: bool) -> str:
    """What `cortex up` prints once everything is healthy."""
    facts = facts_of(layout, network, token)
    is_default = layout == Layout.of(DEFAULT_DIR)
    where = "" if is_default else f" --dir {layout.root}"
    aggregators = ", ".join(f"{address} ({name})" for name, address in facts["aggregators"].items())
    end = f"stop it:      cortex down{where}" if detached else "stop it:      Ctrl-C"
    return f"""
every service is healthy
  gateway      {facts["gateway"]}  (HTTP API; its documentation at /docs)
               {facts["websocket"]}  (WebSocket, for nodes without a certificate)
  coordinator  {facts["coordinator"]}  (gRPC, mTLS; operator certificate in {layout.certificates / "operator"})
  discovery    {facts["discovery"]}
  aggregators  {aggregators}
  workers      {", ".join(facts["workers"])}
  token        {token}  (also in {layout.token_file})

try it:
  cortex submit JOB.yaml --wait{where}
  curl -H "Authorization: Bearer $(cat {layout.token_file})" {facts["gateway"]}/api/v1/network/status
  tensorboard --logdir {layout.tensorboard}
{end}
"""
