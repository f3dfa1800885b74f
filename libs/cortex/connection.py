"""Finding the network: its coordinator, its discovery service, and the certificate to show them."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cortex.local.layout import DEFAULT_DIR, Layout
from cortex.local.network import LocalNetwork, absolute_tls, read_network
from cortex_common.errors import InvalidArgumentError, NotFoundError, Violation
from cortex_common.identity import Role, TlsFiles

DISCOVERY_PORT = 50052
CONFIG_FILE = Path(".config") / "cortex" / "config.toml"
_ENVIRONMENT = {"ca": "CORTEX_CA", "certificate": "CORTEX_CERTIFICATE", "key": "CORTEX_KEY"}
_CONFIG_KEYS = {"dir", "endpoint", "discovery", "ca", "certificate", "key"}


@dataclass(frozen=True, slots=True)
class Connection:
    """Where a network is and who is calling.

    `source` says in words where this was found; `directory` is that of a local network, None for any other.
    """

    coordinator: str
    discovery: str
    tls: TlsFiles
    source: str
    directory: Path | None = None


def find_connection(
    directory: Path | None = None,
    environment: Mapping[str, str] | None = None,
    working: Path | None = None,
    home: Path | None = None,
) -> Connection:
    """Find the network to talk to.

    In this order: `directory`; CORTEX_DIR; CORTEX_ENDPOINT with CORTEX_CA, CORTEX_CERTIFICATE and CORTEX_KEY; `.cortex`
    in the working directory, where `cortex up` puts a network unless told otherwise; `~/.config/cortex/config.toml`.

    Raises:
        NotFoundError: nothing found; says how to start a network.
        InvalidArgumentError: what was found is incomplete.
    """
    environment = os.environ if environment is None else environment
    working = Path.cwd() if working is None else working
    home = Path.home() if home is None else home
    if directory is not None:
        return _of_directory(directory)
    if environment.get("CORTEX_DIR"):
        return _of_directory(Path(environment["CORTEX_DIR"]))
    if environment.get("CORTEX_ENDPOINT"):
        return _of_environment(environment)
    if (working / DEFAULT_DIR / "network.json").exists():
        return _of_directory(working / DEFAULT_DIR)
    if (home / CONFIG_FILE).exists():
        return _of_config_file(home / CONFIG_FILE)
    raise NotFoundError(
        f"no Cortex network found: no {DEFAULT_DIR} here, neither CORTEX_DIR nor CORTEX_ENDPOINT is set, "
        f"and there is no ~/{CONFIG_FILE}. Start a network on this machine with `cortex up`, or name one with --dir DIR"
    )


def _of_directory(directory: Path) -> Connection:
    layout = Layout.of(directory)
    return connection_of(layout, read_network(layout))


def connection_of(layout: Layout, network: LocalNetwork) -> Connection:
    """The operator's connection to a local network."""
    return Connection(
        coordinator=network.address(Role.COORDINATOR),
        discovery=network.address(Role.DISCOVERY),
        tls=absolute_tls(layout, network),
        source=f"the network in {layout.root}",
        directory=layout.root,
    )


def _of_environment(environment: Mapping[str, str]) -> Connection:
    given = {key: environment.get(variable, "") for key, variable in _ENVIRONMENT.items()}
    document = given | {
        "endpoint": environment["CORTEX_ENDPOINT"],
        "discovery": environment.get("CORTEX_DISCOVERY", ""),
    }
    return _of_document(document, "CORTEX_ENDPOINT", _ENVIRONMENT | {"endpoint": "CORTEX_ENDPOINT"})


def _of_config_file(path: Path) -> Connection:
    try:
        document = tomllib.loads(path.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InvalidArgumentError(f"{path} is not TOML: {error}") from None
    unknown = [
        Violation(key, f"unknown key; allowed: {', '.join(sorted(_CONFIG_KEYS))}")
        for key in document.keys() - _CONFIG_KEYS
    ]
    wrong = [
        Violation(key, f"{value!r} given; allowed: a string")
        for key, value in document.items()
        if key in _CONFIG_KEYS and not isinstance(value, str)
    ]
    if unknown or wrong:
        raise InvalidArgumentError.of(str(path), [*unknown, *wrong])
    if document.get("dir"):
        return _of_directory(Path(document["dir"]))
    return _of_document(document, str(path), {key: key for key in _CONFIG_KEYS})


def _of_document(document: Mapping[str, Any], source: str, names: Mapping[str, str]) -> Connection:
    """A connection from addresses and paths; `names` are what the person calls them."""
    violations = [
        Violation(names[key], "missing; a PEM file is required")
        for key in ("ca", "certificate", "key")
        if not document.get(key)
    ]
    violations += [
        Violation(names[key], f"{document[key]}: no such file")
        for key in ("ca", "certificate", "key")
        if document.get(key) and not Path(document[key]).expanduser().is_file()
    ]
    endpoint = document.get("endpoint") or ""
    host, _, port = endpoint.rpartition(":")
    if not host or not port.isdecimal():
        violations.append(Violation(names["endpoint"], f"{endpoint!r} given; allowed: host:port of the coordinator"))
    if violations:
        raise InvalidArgumentError.of(source, violations)
    tls = TlsFiles(*(Path(document[key]).expanduser() for key in ("ca", "certificate", "key")))
    discovery = document.get("discovery") or f"{host}:{DISCOVERY_PORT}"
    return Connection(coordinator=endpoint, discovery=discovery, tls=tls, source=source)
