"""Whether an audit log is to be believed: it hangs together, and the service whose log it is signed its heads."""

from __future__ import annotations

import datetime as dt
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cortex_common.errors import CorruptError, UnauthenticatedError
from cortex_common.identity import Identity, Role
from cortex_common.security.audit import Head
from cortex_common.security.audit_check import Checked, check_log
from cortex_common.security.certificates import Certificate
from cortex_common.security.issuing import CLOCK_SKEW
from cortex_common.security.signed_heads import HEADS_FILE, SIGN_EVERY_S, SignedHead, read_heads, verified_head

KEEPERS = (Role.DISCOVERY, Role.COORDINATOR, Role.AGGREGATOR, Role.GATEWAY)
"""Services that keep an audit log."""
SEEN_HEAD = "token log"
"""What a gateway records when it has seen a new head of the log of API tokens."""
# Two turns: a busy machine may be late.
_SIGNED_WITHIN_S = 2 * SIGN_EVERY_S
_TOKEN_HEAD = re.compile(r"number=([0-9]+) hash=([0-9a-f]{64})")


@dataclass(frozen=True, slots=True)
class Trust:
    """What the one who checks knows.

    Attributes:
        roots: Every root the network has had, PEM.
        is_revoked: Whether a certificate was known to be shut out at a time (wall seconds).
        now_s: Wall time.
        elsewhere: Heads that were kept where the services cannot change them, as they were signed or logged.
    """

    roots: bytes
    is_revoked: Callable[[Certificate, float], bool]
    now_s: float
    elsewhere: Sequence[Mapping[str, Any]] = ()


@dataclass(slots=True)
class Proof:
    """What is known of a log after a check.

    Attributes:
        first, last: Numbers of the records that are there.
        by: SPIFFE id of the service that signed the heads; empty if none is believed.
        heads: How many heads are believed.
        signed_up_to: The last record that one of them covers.
        problems: Why the log is not to be believed, a sentence each.
        unproven: What can neither be shown nor disproved, a sentence each.
        token_heads: Heads of the log of API tokens that this one, a gateway's, has recorded.
    """

    first: int = 0
    last: int = 0
    by: str = ""
    heads: int = 0
    signed_up_to: int = 0
    problems: list[str] = field(default_factory=list)
    unproven: list[str] = field(default_factory=list)
    token_heads: list[Head] = field(default_factory=list)


def about_head(head: Head) -> str:
    """How a gateway records a head of the log of API tokens."""
    return f"number={head.number} hash={head.hash}"


def prove_log(directory: Path, service: Identity | None, trust: Trust) -> Proof:
    """Check a service's log.

    Args:
        directory: Of the log.
        service: Whose it is; None for whichever service signed its heads.
        trust: What is known of the network.
    """
    proof = Proof()
    known = _believed(directory, service, trust, proof)

    def see(record: Mapping[str, Any]) -> None:
        said = _TOKEN_HEAD.fullmatch(str(record.get("about"))) if record.get("what") == SEEN_HEAD else None
        if said is not None:
            proof.token_heads.append(Head(int(said[1]), said[2]))

    checked = _checked(directory, known, proof, see)
    if not checked.last and not known:
        proof.problems.append("there are no records and no signed head, as a service signs at its start")
    if checked.unsigned_at:
        _add_unsigned(proof, _of_unsigned(proof), checked.unsigned_at, trust.now_s)
    return proof


def prove_token_log(directory: Path, gateways: Sequence[Proof], trust: Trust) -> Proof:
    """Check the log of API tokens, whose heads the gateways record in their own logs.

    Args:
        directory: Of the log.
        gateways: What the check of their logs found.
        trust: What is known of the network.
    """
    proof = Proof()
    known = _by_number([head for gateway in gateways for head in gateway.token_heads], proof)
    proof.by = ", ".join(sorted({gateway.by for gateway in gateways if gateway.token_heads}))
    checked = _checked(directory, known, proof)
    if not checked.last:
        proof.problems.append("there are no records, and the folder is made for the first one")
    elif not gateways:
        told = "no head is known: a gateway signs them in its own log, to be checked together with this one"
        _add_unsigned(proof, told, checked.unsigned_at, trust.now_s)
    elif not known:
        proof.unproven.append("no gateway has signed a head of it, as earlier versions did not: nothing proves it")
    elif checked.unsigned_at:
        # Tokens may be made while no gateway runs.
        proof.unproven.append(f"{_of_unsigned(proof)} yet")
    return proof


def _believed(directory: Path, service: Identity | None, trust: Trust, proof: Proof) -> Mapping[int, str]:
    """Hashes of records by number, as the heads that are believed say; 0 stands for the empty log."""
    try:
        statements = read_heads(directory / HEADS_FILE)
    except CorruptError as error:
        statements = []
        proof.problems.append(error.message)
    elsewhere = [said for said in trust.elsewhere if service is None or said["by"] == service.uri]
    # A log line has no certificate: it counts because it was kept where the service could not change it.
    heads = [(said["by"], Head(said["number"], said["hash"])) for said in elsewhere if "certificate" not in said]
    refused: Counter[str] = Counter()
    late = 0
    for said in (*statements, *(said for said in elsewhere if "certificate" in said)):
        try:
            signed = _signed(said, service, trust)
        except (CorruptError, UnauthenticatedError) as error:
            refused[error.message] += 1
            continue
        if signed.is_late:
            late += 1
        else:
            heads.append((signed.by.identity.uri, signed.head))
    proof.problems += [f"{_are(number)} not believed: {reason}" for reason, number in refused.items()]
    if late:
        proof.unproven.append(f"{_are(late)} of no use: signed with a certificate that had ended")
    signers = sorted({by for by, _ in heads})
    if len(signers) > 1:
        proof.problems.append(f"the heads are of {' and '.join(signers)}, and a log has one service")
    proof.by = ", ".join(signers)
    return _by_number([head for _, head in heads], proof)


def _are(heads: int) -> str:
    return "1 head is" if heads == 1 else f"{heads} heads are"


def _signed(said: Mapping[str, Any], service: Identity | None, trust: Trust) -> SignedHead:
    """A head whose signer is the service whose log it is.

    Raises:
        CorruptError: it is no head, or its signature is wrong.
        UnauthenticatedError: it is signed by somebody who may not.
    """
    signed = verified_head(said)
    by = signed.by.identity
    signed.require_root(trust.roots)
    if service is not None and by != service:
        raise UnauthenticatedError(f"signed by {by.uri}, and this is the log of {service.uri}")
    if by.role not in KEEPERS:
        raise UnauthenticatedError(f"signed by {by.uri}, which keeps no audit log")
    if trust.is_revoked(signed.by, signed.at_s):
        raise UnauthenticatedError(f"signed by {by.uri} when its certificate was revoked")
    return signed


def _by_number(heads: Sequence[Head], proof: Proof) -> Mapping[int, str]:
    known: dict[int, str] = {}
    for head in heads:
        if known.setdefault(head.number, head.hash) != head.hash:
            proof.problems.append(f"two heads say different things of record {head.number}")
    proof.heads = len(heads)
    return known


def _checked(
    directory: Path, known: Mapping[int, str], proof: Proof, see: Callable[[Mapping[str, Any]], None] | None = None
) -> Checked:
    """The chain of a log, checked against its heads; what was found is in the proof."""
    checked = check_log(directory, {number: hashed for number, hashed in known.items() if number}, see)
    proof.first, proof.last = checked.first, checked.last
    proof.signed_up_to = min(max(known, default=0), checked.last)
    proof.problems += checked.problems
    proof.unproven += checked.unproven
    if checked.removed_by > proof.signed_up_to:
        proof.problems.append(f"no signed head covers record {checked.removed_by}, which says that others were removed")
    return checked


def _of_unsigned(proof: Proof) -> str:
    """The records that no head covers."""
    first = proof.signed_up_to + 1
    records = f"record {first} is" if proof.last == first else f"records {first} to {proof.last} are"
    return f"{records} covered by no signed head"


def _add_unsigned(proof: Proof, told: str, since: str, now_s: float) -> None:
    """That a head is missing is a problem; while it may be on its way, it is only not proven."""
    try:
        age_s = now_s - dt.datetime.fromisoformat(since).timestamp()
    except (ValueError, OverflowError):
        proof.problems.append(f"{told}, and nothing says since when")
        return
    if -CLOCK_SKEW.total_seconds() <= age_s <= _SIGNED_WITHIN_S:
        proof.unproven.append(f"{told} yet")
    else:
        proof.problems.append(f"{told} since {since}, and one is signed every minute")
