"""What goes wrong with containers: they are killed, they stand still, they lose a network, their link is bad."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from api import until
from compose import Compose

LINKS = "cortex-e2e-links"
# Longer than a lease, where nothing but the time that passed tells that it ended.
LONG_S = 12.0

Fault = Callable[[Compose], None]


def killed(name: str) -> Fault:
    """Gone at once, and back."""

    def fault(network: Compose) -> None:
        network.docker("kill", network.container(name))
        network.docker("start", network.container(name))

    return fault


def paused(name: str) -> Fault:
    """Still for so long that others take it for dead."""

    def fault(network: Compose) -> None:
        network.docker("pause", network.container(name))
        try:
            _until_one_is_gone(network)
        finally:
            network.docker("unpause", network.container(name))

    return fault


def cut_off_from_data(name: str) -> Fault:
    """It still says that it lives, and reaches nobody who has weights."""

    def fault(network: Compose) -> None:
        with _disconnected(network, name, "data"):
            time.sleep(LONG_S)

    return fault


def cut_off_from_control(name: str, alias: str) -> Fault:
    """It works, and nobody who plans knows it any more."""

    def fault(network: Compose) -> None:
        with _disconnected(network, name, "control", alias):
            _until_one_is_gone(network)

    return fault


@contextmanager
def slow_link(network: Compose, name: str, rate_kbit: int, loss: float) -> Iterator[str]:
    """All that the container sends goes over such a link meanwhile; gives what makes it so.

    With netem where the kernel has it (and 40 ms more, each way), else with a token bucket and a packet filter.
    """

    def inside(command: str) -> str:
        shared = ("--network", f"container:{network.container(name)}", "--cap-add", "NET_ADMIN")
        return network.docker("run", "--rm", *shared, LINKS, "sh", "-euc", command)

    devices = "for device in $(ls /sys/class/net | grep -v lo); do"
    netem = f"netem delay 40ms 5ms loss {loss:%} rate {rate_kbit}kbit"
    bucket = f"tbf rate {rate_kbit}kbit burst 4kb latency 1s"
    drop = f"OUTPUT ! -o lo -m statistic --mode random --probability {loss} -j DROP"
    made = inside(
        f"if tc qdisc add dev lo root netem delay 1ms 2>/dev/null; then tc qdisc del dev lo root;"
        f" {devices} tc qdisc replace dev $device root {netem}; done; echo netem;"
        f" else {devices} tc qdisc replace dev $device root {bucket}; done; iptables -A {drop}; echo tbf; fi"
    )
    try:
        yield made.strip()
    finally:
        inside(f"{devices} tc qdisc del dev $device root; done; iptables -D {drop} 2>/dev/null || true")


@contextmanager
def _disconnected(network: Compose, name: str, net: str, *aliases: str) -> Iterator[None]:
    where = network.network(net)
    network.docker("network", "disconnect", where, network.container(name))
    try:
        yield
    finally:
        network.docker("network", "connect", *(f"--alias={each}" for each in aliases), where, network.container(name))


def _until_one_is_gone(network: Compose) -> None:
    until("a node's lease ends", lambda: network.api.get("/api/v1/network/status")["expired"] >= 1)
