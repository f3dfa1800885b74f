"""Which audit logs a command means, whose they are, and what is known to check them by."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from cortex.local.joining import OPERATOR
from cortex.local.layout import Layout
from cortex.local.network import LocalNetwork, read_network
from cortex_common.clock import SystemClock
from cortex_common.errors import InvalidArgumentError, NotFoundError
from cortex_common.identity import Identity
from cortex_common.ids import NodeName
from cortex_common.network.membership import read_denials
from cortex_common.security.audit_proof import KEEPERS, Proof, Trust, prove_log, prove_token_log
from cortex_common.security.authority import Authority
from cortex_common.security.certificates import Certificate, fingerprints, read_file
from cortex_common.security.signed_heads import heads_elsewhere
from cortex_common.security.tokens import TokenStore

_TOKENS = "tokens"


@dataclass(frozen=True, slots=True)
class AskedLog:
    """A log that is to be read: what it is called, where it is, and whose it is, if that is known."""

    name: str
    folder: Path
    service: Identity | None = None
    is_of_tokens: bool = False


def asked_logs(given: Sequence[Path] | None, service: str | None, layout: Layout) -> list[AskedLog]:
    """The logs in the folders given, or else those of the network in a directory.

    Raises:
        NotFoundError: a folder, or the network, is not there.
        InvalidArgumentError: a service is given, and not one log.
    """
    if service is not None and len(given or ()) != 1:
        raise InvalidArgumentError(f"--service with {len(given or ())} --log given; allowed: with one")
    network = read_network(layout) if layout.network_file.exists() or not given else None
    of_network = list(_of_network(network, layout)) if network else []
    if not given:
        return of_network
    if missing := [str(path) for path in given if not path.is_dir()]:
        raise NotFoundError(f"no audit log at {', '.join(missing)}")
    known = {log.folder.resolve(): log for log in of_network}
    named = Identity.parse(service) if service is not None else None
    return [_asked(path, named, known.get(path.resolve())) for path in given]


def trust_of(
    logs: Sequence[AskedLog], roots: Sequence[Path] | None, heads: Sequence[Path] | None, layout: Layout
) -> Trust:
    """What the logs are checked by.

    Raises:
        NotFoundError: no roots are known, or a file is not there.
        CorruptError: a file holds something else.
        InvalidArgumentError: heads of other services only are given.
    """
    elsewhere = [head for path in heads or () for head in heads_elsewhere(path)]
    services = {log.service.uri for log in logs if log.service}
    if elsewhere and all(log.service for log in logs) and not services & {head["by"] for head in elsewhere}:
        others = ", ".join(sorted({head["by"] for head in elsewhere}))
        raise InvalidArgumentError(f"heads of {others} given; the logs are of {', '.join(sorted(services))}")
    states = {log.folder.parent for log in logs} | {layout.state(OPERATOR)}
    denials = [denial for state in states for denial in read_denials(state / "denials.json")]

    def is_revoked(certificate: Certificate, at_s: float) -> bool:
        return any(denial.covers(certificate) and denial.at_s <= at_s for denial in denials)

    return Trust(_roots(roots, layout), is_revoked, SystemClock().wall_s(), elsewhere)


def prove_all(logs: Sequence[AskedLog], trust: Trust) -> list[tuple[AskedLog, Proof]]:
    """What the check of each log found; that of API tokens comes last, by what gateways have recorded of it."""
    found = [(log, _proof(log, trust)) for log in logs if not log.is_of_tokens]
    gateways = [proof for log, proof in found if proof.token_heads or _is_gateways(log, proof)]
    tokens = [
        (log, prove_token_log(log.folder, gateways, trust) if log.folder.is_dir() else _gone(log))
        for log in logs
        if log.is_of_tokens
    ]
    return [*found, *tokens]


def _proof(log: AskedLog, trust: Trust) -> Proof:
    return prove_log(log.folder, log.service, trust) if log.folder.is_dir() else _gone(log)


def _gone(log: AskedLog) -> Proof:
    return Proof(problems=[f"there is no audit log at {log.folder}, where there has been one"])


def _is_gateways(log: AskedLog, proof: Proof) -> bool:
    return (log.service.uri if log.service else proof.by).split("/")[-2:-1] == ["gateway"]


def _of_network(network: LocalNetwork, layout: Layout) -> Iterator[AskedLog]:
    """Every log that should be there: of whoever was started, and of the tokens, if some were made."""
    tokens = TokenStore(layout.tokens_file).audit_directory
    if layout.tokens_file.exists() or tokens.is_dir():
        yield AskedLog(_TOKENS, tokens, is_of_tokens=True)
    for member in network.members:
        folder = layout.state(member.name) / "audit"
        if member.service in KEEPERS and (folder.is_dir() or layout.log(member.name).exists()):
            yield AskedLog(member.name, folder, Identity(network.network, member.service, NodeName(member.name)))


def _asked(path: Path, service: Identity | None, known: AskedLog | None) -> AskedLog:
    if known is not None:
        return replace(known, service=service or known.service)
    # `<file>.audit` stands beside a file of tokens; a service's log is called `audit`.
    return AskedLog(path.parent.name, path, service, is_of_tokens=path.suffix == ".audit")


def _roots(given: Sequence[Path] | None, layout: Layout) -> bytes:
    paths = list(given or ())
    if not paths and (layout.authority / "ca.pem").exists():
        paths = [layout.authority]
    if not paths and os.environ.get("CORTEX_CA"):
        paths = [Path(os.environ["CORTEX_CA"])]
    if not paths:
        raise NotFoundError("no roots are known to check the signers by; allowed: --roots FILE, --dir DIR, CORTEX_CA")
    found = b"\n".join(Authority.load(path).every_root if path.is_dir() else read_file(path, "roots") for path in paths)
    fingerprints(found)  # refuses what are no certificates
    return found
