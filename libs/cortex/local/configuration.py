"""The configuration file of each service of a local network."""

from __future__ import annotations

from typing import Any

from cortex.local.layout import Layout
from cortex.local.members import HOST, Member
from cortex.local.network import LocalNetwork
from cortex_common.data import default_cache_dir
from cortex_common.identity import Role


def service_config(network: LocalNetwork, member: Member, layout: Layout) -> dict[str, Any]:
    """Settings of one member, as its settings class reads them."""
    joining = (
        {"join_token_file": str(layout.join_token(member.name))} if layout.join_token(member.name).exists() else {}
    )
    return _common(network, member, layout) | joining | _own(network, member, layout)


def _common(network: LocalNetwork, member: Member, layout: Layout) -> dict[str, Any]:
    tls = layout.tls(member.name)
    config: dict[str, Any] = {
        "network": network.network,
        "name": member.name,
        "region": member.region,
        "host": HOST,
        "ca": str(tls.ca),
        "certificate": str(tls.certificate),
        "key": str(tls.key),
        "state_dir": str(layout.state(member.name)),
        "metrics_port": member.ports["metrics"],
        "ready_file": str(layout.ready(member.name)),
    }
    port = member.ports.get("grpc")
    return config if port is None else config | {"port": port}


def _own(network: LocalNetwork, member: Member, layout: Layout) -> dict[str, Any]:
    """What only this kind of service is told."""
    discovery = {"discovery": network.address(Role.DISCOVERY)}
    coordinator = {"coordinator": network.address(Role.COORDINATOR)}
    match member.service:
        case Role.DISCOVERY:
            return {
                "authority": str(layout.authority),
                "enrolment_port": member.ports["enrolment"],
                "join_tokens": str(layout.join_tokens_file),
                **network.lives.as_settings(),
            }
        case Role.COORDINATOR | Role.AGGREGATOR:
            return discovery
        case Role.GATEWAY:
            ports = {"port": member.ports["http"], "websocket_port": member.ports["websocket"]}
            return discovery | coordinator | ports | {"tokens": str(layout.tokens_file)}
        case _:
            catalogue = {"catalogue": network.catalogue.replace("{name}", member.name)} if network.catalogue else {}
            return discovery | coordinator | catalogue | {"cache_dir": str(default_cache_dir())}
