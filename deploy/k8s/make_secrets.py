#!/usr/bin/env python3
"""The Secrets that the overlays need.

    python deploy/k8s/make_secrets.py | kubectl apply -f -                           `dev`: all of them
    python deploy/k8s/make_secrets.py --only tokens,database | kubectl apply -f -    `prod`: these, no identities

Certificates of every service, an API token, the database's password. Running it again makes certificates anew, which
services take up without a restart, and keeps everything else. What is kept, and the operator's certificate and token,
is in FOLDER: whoever has it has the network.
"""

from __future__ import annotations

import argparse
import base64
import json
import secrets
import sys
from collections.abc import Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

from cortex_common.identity import Identity, Role, TlsFiles
from cortex_common.ids import NodeName
from cortex_common.security.authority import Authority
from cortex_common.security.tokens import TokenStore
from cortex_common.storage.durable import write_durably

HOSTS = ("localhost", "127.0.0.1", "::1")
PARTS = ("identities", "tokens", "database")


def main() -> None:
    """Print a List of Secrets."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--folder", type=Path, default=Path(__file__).parent / "secrets")
    options.add_argument("--network", default="cortex")
    options.add_argument("--workers", type=int, default=4)
    options.add_argument("--aggregators", type=int, default=1)
    options.add_argument("--days", type=int, default=30)
    options.add_argument("--only", type=_parts, default=PARTS, metavar="PART,…", help=", ".join(PARTS))
    given = options.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    items = [_secret(name, content) for name, content in _contents(given)]
    json.dump({"apiVersion": "v1", "kind": "List", "items": items}, sys.stdout)


def _parts(text: str) -> tuple[str, ...]:
    parts = tuple(text.split(","))
    if not set(parts) <= set(PARTS):
        raise argparse.ArgumentTypeError(f"{text} given; allowed: {', '.join(PARTS)}, separated by commas")
    return parts


def _contents(given: argparse.Namespace) -> Iterator[tuple[str, Mapping[str, bytes]]]:
    if "identities" in given.only:
        yield from _identities(Authority.open(given.network, given.folder / "authority"), given.folder, given)
    if "tokens" in given.only:
        yield "tokens", _tokens(given.folder)
    if "database" in given.only:
        yield "database", {"password": _password(given.folder / "database-password")}


def _identities(
    authority: Authority, folder: Path, given: argparse.Namespace
) -> Iterator[tuple[str, Mapping[str, bytes]]]:
    life = timedelta(days=given.days)

    def issue(role: Role, name: str) -> TlsFiles:
        hosts = (*HOSTS, name, f"{name}.{role.value}")
        return authority.issue(Identity(given.network, role, NodeName(name)), hosts, folder / name, life)

    for role in (Role.COORDINATOR, Role.DISCOVERY, Role.GATEWAY):
        files = issue(role, role.value)
        pair = {"tls.crt": files.certificate.read_bytes(), "tls.key": files.key.read_bytes()}
        yield f"identity-{role.value}", {"ca.crt": authority.bundle, **pair}
    for role, count in ((Role.AGGREGATOR, given.aggregators), (Role.WORKER, given.workers)):
        content = {"ca.crt": authority.bundle}
        for number in range(count):
            name = f"{role.value}-{number}"
            files = issue(role, name)
            content |= {f"{name}.crt": files.certificate.read_bytes(), f"{name}.key": files.key.read_bytes()}
        yield f"identity-{role.value}", content
    issue(Role.OPERATOR, "operator")


def _tokens(folder: Path) -> Mapping[str, bytes]:
    store, own = folder / "tokens.json", folder / "operator" / "token"
    if not _is_filled(own):
        own.parent.mkdir(exist_ok=True, mode=0o700)
        write_durably(own, TokenStore(store).create("operator", ["admin"]).encode() + b"\n", mode=0o600)
    return {file.name: file.read_bytes() for file in (store, store.with_name(f"{store.name}.pepper"))}


def _password(file: Path) -> bytes:
    if not _is_filled(file):
        write_durably(file, secrets.token_urlsafe(24).encode(), mode=0o600)
    return file.read_bytes()


def _is_filled(file: Path) -> bool:
    """Whether there is more than what a run of an earlier version that was broken off may have left."""
    return file.exists() and bool(file.read_bytes().strip())


def _secret(name: str, content: Mapping[str, bytes]) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {
            "name": f"cortex-{name}",
            "namespace": "cortex",
            "labels": {"app.kubernetes.io/part-of": "cortex"},
        },
        "data": {key: base64.b64encode(value).decode() for key, value in content.items()},
    }


if __name__ == "__main__":
    main()
