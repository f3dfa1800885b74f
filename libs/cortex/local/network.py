"""The file that describes a local network: who is in it, on which ports; chosen once, kept across restarts."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from cortex.local.files import write_text
from cortex.local.layout import Layout
from cortex.local.members import Member
from cortex_common.errors import CorruptError, NotFoundError
from cortex_common.identity import Role, TlsFiles
from cortex_common.security.authority import ISSUING_LIFE, LEAF_LIFE, ROOT_LIFE, Lives

DEFAULT_REGIONS = ("eu", "us")
DEFAULT_WORKERS = 4


class OperatorFiles(BaseModel):
    """The certificate people use, relative to the network's directory so that it may be moved."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    ca: Path
    certificate: Path
    key: Path


class CertificateLives(BaseModel):
    """How long certificates hold, in seconds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    leaf_s: float = LEAF_LIFE.total_seconds()
    issuing_s: float = ISSUING_LIFE.total_seconds()
    root_s: float = ROOT_LIFE.total_seconds()

    def as_settings(self) -> dict[str, float]:
        """As discovery reads them."""
        return {"leaf_life_s": self.leaf_s, "issuing_life_s": self.issuing_s, "root_life_s": self.root_s}

    def as_lives(self) -> Lives:
        """As the authority takes them.

        Raises:
            InvalidArgumentError: a leaf could outlive its authority.
        """
        return Lives(*(timedelta(seconds=life_s) for life_s in (self.leaf_s, self.issuing_s, self.root_s)))


class LocalNetwork(BaseModel):
    """A network of processes on this machine.

    `catalogue` is the file of the workers' own datasets, an absolute path; `{name}` in it stands for the worker's name.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    network: str = "cortex"
    regions: tuple[str, ...] = DEFAULT_REGIONS
    workers: int = DEFAULT_WORKERS
    catalogue: str | None = None
    members: tuple[Member, ...] = ()
    operator: OperatorFiles | None = None
    lives: CertificateLives = CertificateLives()

    def of_role(self, role: Role) -> tuple[Member, ...]:
        """The members with this role."""
        return tuple(member for member in self.members if member.service is role)

    def address(self, role: Role, use: str = "grpc") -> str:
        """host:port of the first member with this role."""
        for member in self.of_role(role):
            address = member.address(use)
            if address is not None:
                return address
        raise NotFoundError(f"no {role.value} with a {use} port in this network")

    def ports(self) -> dict[str, dict[str, int]]:
        """Ports by member name and use."""
        return {member.name: dict(member.ports) for member in self.members}


def read_network(layout: Layout) -> LocalNetwork:
    """Read the network file of a directory.

    Raises:
        NotFoundError: there is no network in this directory.
        CorruptError: the file is not what `cortex up` writes.
    """
    path = layout.network_file
    try:
        return LocalNetwork.model_validate_json(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise NotFoundError(
            f"no Cortex network in {layout.root}; start one with `cortex up --dir {layout.root}`"
        ) from None
    except ValidationError as error:
        raise CorruptError(
            f"{path} is not a network file of this version ({error.error_count()} mistakes); "
            f"remove it and run `cortex up --dir {layout.root}`"
        ) from None


def write_network(layout: Layout, network: LocalNetwork) -> None:
    """Write the network file atomically."""
    write_text(layout.network_file, network.model_dump_json(indent=2) + "\n")


def known_network(layout: Layout) -> LocalNetwork:
    """The network of a directory, or the default one when there is none yet."""
    return read_network(layout) if layout.network_file.exists() else LocalNetwork()


def changed(
    network: LocalNetwork, workers: int | None, regions: Sequence[str] | None, catalogue: Path | None
) -> LocalNetwork:
    """The same network with another number of workers, other regions or another catalogue, where given."""
    changes: dict[str, object] = {}
    if catalogue is not None:
        changes["catalogue"] = str(catalogue.expanduser().absolute())
    if workers is not None:
        changes["workers"] = workers
    if regions:
        changes["regions"] = tuple(regions)
    return network.model_copy(update=changes)


def absolute_tls(layout: Layout, network: LocalNetwork) -> TlsFiles:
    """The operator's certificate.

    Raises:
        CorruptError: the network file does not name one.
    """
    if network.operator is None:
        raise CorruptError(f"{layout.network_file} names no operator certificate; run `cortex up --dir {layout.root}`")
    files = network.operator
    return TlsFiles(layout.root / files.ca, layout.root / files.certificate, layout.root / files.key)
