"""Certificates of a network that exists for one measurement."""

from __future__ import annotations

from pathlib import Path

from cortex_common.identity import Identity, Role, TlsFiles
from cortex_common.ids import NodeName
from cortex_common.security.authority import Authority

NETWORK = "bench"
HOST = "127.0.0.1"


class Certificates:
    """Issues certificates below a directory, one for each node that asks."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._authority = Authority.create(NETWORK, directory / "authority")

    def of(self, role: Role, name: str) -> TlsFiles:
        """The certificate of a node."""
        out = self._directory / f"{role.value}-{name}"
        return self._authority.issue(Identity(NETWORK, role, NodeName(name)), [HOST], out)
