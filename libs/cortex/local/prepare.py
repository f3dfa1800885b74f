"""Make a directory ready for its services: ports, certificates, token, configuration files."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from cortex.local.configuration import service_config
from cortex.local.files import write_text
from cortex.local.joining import OPERATOR, permit_joining
from cortex.local.layout import Layout
from cortex.local.members import Member, assign_ports, members_of
from cortex.local.network import LocalNetwork, OperatorFiles, write_network
from cortex_common.clock import Clock, SystemClock
from cortex_common.data.files import read_catalogue
from cortex_common.identity import Role


@dataclass(frozen=True, slots=True)
class Prepared:
    """A network ready to be started, and what a person should be told about it."""

    network: LocalNetwork
    notices: tuple[str, ...]


def prepare(
    layout: Layout, network: LocalNetwork, claim: Callable[[int], bool], clock: Clock | None = None
) -> Prepared:
    """Write everything the services need into the directory; what is there already is kept.

    Args:
        layout: The directory.
        network: What is known of the network; its ports are kept where they are free.
        claim: Takes a port; False when it is not to be had.
        clock: Tells which certificates have expired.

    Raises:
        InvalidArgumentError: impossible regions, workers, ports or catalogue.
    """
    members, notices = assign_ports(members_of(network.regions, network.workers), network.ports(), claim)
    _check_catalogues(network, members)
    layout.root.mkdir(parents=True, exist_ok=True)
    layout.root.chmod(0o700)
    (layout.root / ".gitignore").write_text("*\n")
    operator = layout.tls(OPERATOR)
    relative = {kind: getattr(operator, kind).relative_to(layout.root) for kind in ("ca", "certificate", "key")}
    network = network.model_copy(update={"members": members, "operator": OperatorFiles(**relative)})
    permit_joining(layout, network, clock or SystemClock())
    for member in members:
        config = service_config(network, member, layout)
        write_text(layout.config(member.name), yaml.safe_dump(config, sort_keys=False), mode=0o600)
        layout.state(member.name).mkdir(parents=True, exist_ok=True)
    layout.logs.mkdir(exist_ok=True)
    write_network(layout, network)
    return Prepared(network, notices)


def _check_catalogues(network: LocalNetwork, members: Sequence[Member]) -> None:
    """Read the workers' catalogues as they will, so that a mistake is told before anything starts."""
    if network.catalogue is None:
        return
    workers = [member.name for member in members if member.service is Role.WORKER]
    for path in {Path(network.catalogue.replace("{name}", name)) for name in workers}:
        for entry in read_catalogue(path).values():
            entry.info()


def wipe(layout: Layout) -> None:
    """Empty a network's directory of everything `prepare` and the services put there, and of nothing else."""
    for folder in (
        layout.authority,
        layout.certificates,
        layout.config("x").parent,
        layout.state("x").parent,
        layout.logs,
        layout.tokens_file.with_name(f"{layout.tokens_file.name}.audit"),
    ):
        shutil.rmtree(folder, ignore_errors=True)
    for file in (layout.network_file, layout.token_file, *layout.root.glob(f"{layout.tokens_file.name}*")):
        file.unlink(missing_ok=True)
