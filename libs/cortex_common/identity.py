"""Who a node is: role and name in a network, as written in its certificate."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from cortex_common.errors import InvalidArgumentError
from cortex_common.ids import NodeName

INTERNAL_DOMAIN = "cortex.internal"
REGION = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?")
"""What names of regions look like."""
_NAME = re.compile(r"[a-z0-9]([a-z0-9._-]{0,61}[a-z0-9])?")
_URI = re.compile(r"spiffe://(?P<network>[^/]+)/(?P<role>[^/]+)/(?P<name>[^/]+)")


class Role(StrEnum):
    """What a node is; decides which RPCs it may call."""

    COORDINATOR = "coordinator"
    DISCOVERY = "discovery"
    AGGREGATOR = "aggregator"
    WORKER = "worker"
    GATEWAY = "gateway"
    OPERATOR = "operator"

    @property
    def server_name(self) -> str:
        """DNS name in every certificate of this role: a client that expects it has the server's role proven by TLS."""
        return f"{self.value}.{INTERNAL_DOMAIN}"


@dataclass(frozen=True, slots=True)
class Identity:
    """A node's identity, equal to the URI SAN of its certificate."""

    network: str
    role: Role
    name: NodeName

    def __post_init__(self) -> None:
        """Refuse names that would not survive in a URI or a file name."""
        for what, value in (("network", self.network), ("name", self.name)):
            if not _NAME.fullmatch(value):
                raise InvalidArgumentError(
                    f"{what} {value!r}: allowed are 1 to 63 of a-z, 0-9, '.', '_', '-', both ends alphanumeric"
                )

    @property
    def uri(self) -> str:
        """`spiffe://<network>/<role>/<name>`."""
        return f"spiffe://{self.network}/{self.role.value}/{self.name}"

    @classmethod
    def parse(cls, uri: str) -> Identity:
        """Read a SPIFFE id.

        Raises:
            InvalidArgumentError: not a Cortex identity.
        """
        match = _URI.fullmatch(uri)
        if match is None or match["role"] not in set(Role):
            raise InvalidArgumentError(f"{uri!r} is not a Cortex identity; allowed is spiffe://<network>/<role>/<name>")
        return cls(match["network"], Role(match["role"]), NodeName(match["name"]))


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """Where a process finds its certificate: PEM files that may be replaced while it runs."""

    ca: Path
    certificate: Path
    key: Path
