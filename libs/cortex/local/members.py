"""Who belongs to a local network, and on which ports: pure decisions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from pydantic import BaseModel, ConfigDict

from cortex_common.errors import InvalidArgumentError, Violation
from cortex_common.identity import Role

HOST = "127.0.0.1"
# How far above a default port another one is looked for, before giving up.
SEARCH = 400
# Services in the order they are started; they are stopped in the opposite one.
ORDER = (Role.DISCOVERY, Role.COORDINATOR, Role.AGGREGATOR, Role.GATEWAY, Role.WORKER)
# First port tried, by role and use; the metrics ports of all members share one range.
_DEFAULTS: Mapping[Role, Mapping[str, int]] = {
    Role.DISCOVERY: {"grpc": 50052, "enrolment": 50053},
    Role.COORDINATOR: {"grpc": 50051},
    Role.AGGREGATOR: {"grpc": 50054},
    Role.GATEWAY: {"http": 8080, "websocket": 8765},
    Role.WORKER: {},
}
# Not 9090: that is where Prometheus itself listens, and a CortexManager by default.
_FIRST_METRICS_PORT = 9190


class Member(BaseModel):
    """One process of the network."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    service: Role
    name: str
    region: str
    ports: dict[str, int] = {}

    def address(self, use: str = "grpc") -> str | None:
        """host:port of one of its listeners, or None when it has no such listener."""
        port = self.ports.get(use)
        return None if port is None else f"{HOST}:{port}"


def members_of(regions: Sequence[str], workers: int) -> tuple[Member, ...]:
    """The processes of a network: an aggregator a region, workers dealt to the regions in turn.

    Raises:
        InvalidArgumentError: no region, a region twice, or fewer than one worker.
    """
    violations = []
    if not regions or len(set(regions)) != len(regions) or not all(regions):
        violations.append(Violation("regions", f"{','.join(regions)!r} given; allowed are different names, e.g. eu,us"))
    if workers < 1:
        violations.append(Violation("workers", f"{workers} given; allowed is 1 or more"))
    if violations:
        raise InvalidArgumentError.of("the network", violations)
    home = regions[0]
    core = [
        Member(service=Role.DISCOVERY, name="discovery", region=home),
        Member(service=Role.COORDINATOR, name="coordinator", region=home),
        *(Member(service=Role.AGGREGATOR, name=f"aggregator-{region}", region=region) for region in regions),
        Member(service=Role.GATEWAY, name="gateway", region=home),
    ]
    return (*core, *_workers(regions, workers))


def _workers(regions: Sequence[str], count: int) -> list[Member]:
    named = [(regions[i % len(regions)], 1 + i // len(regions)) for i in range(count)]
    return [Member(service=Role.WORKER, name=f"{region}-{number}", region=region) for region, number in named]


def assign_ports(
    members: Sequence[Member], previous: Mapping[str, Mapping[str, int]], claim: Callable[[int], bool]
) -> tuple[tuple[Member, ...], tuple[str, ...]]:
    """Give every listener a port: the one it had before, else its default, else the next free one.

    Args:
        members: The network; their own ports are ignored.
        previous: Ports of an earlier start, by member name and use.
        claim: Takes a port of this machine; False when it is not to be had.

    Returns:
        The members with ports, and what is to be told about ports that are not the expected ones.

    Raises:
        InvalidArgumentError: no free port near a default one.
    """
    used: set[int] = set()
    notices: list[str] = []
    placed = []
    for position, member in enumerate(members):
        wanted = {**_DEFAULTS[member.service], "metrics": _FIRST_METRICS_PORT + position}
        before = previous.get(member.name, {})
        ports = {}
        for use, default in wanted.items():
            expected = before.get(use, default)
            ports[use] = _next_free(expected, used, claim)
            if ports[use] != expected and expected not in used:
                notices.append(f"{member.name} {use} {ports[use]} (not {expected})")
            used.add(ports[use])
        placed.append(member.model_copy(update={"ports": ports}))
    return tuple(placed), (f"some ports are taken; used instead: {', '.join(notices)}",) if notices else ()


def _next_free(first: int, used: set[int], claim: Callable[[int], bool]) -> int:
    for port in range(first, min(first + SEARCH, 65536)):
        if port not in used and claim(port):
            return port
    raise InvalidArgumentError(f"no free port from {first} to {min(first + SEARCH, 65536) - 1} on {HOST}")
