"""Identities on the wire and in the domain."""

from __future__ import annotations

from collections.abc import Iterable

from google.protobuf.timestamp_pb2 import Timestamp

from cortex_common.errors import InvalidArgumentError, Violation
from cortex_common.identity import REGION, Role
from cortex_common.pb.v1 import identity_pb2 as pb
from cortex_common.rpc.denial import Denial
from services.discovery.identities import Identities
from services.discovery.wire import role_from_proto

_REGIONS = "{!r} given; allowed: 1 to 63 letters, digits, '.', '_' and '-'"


def token_request(request: pb.CreateJoinTokenRequest) -> tuple[Role, str, str]:
    """Role, name and region that a token is asked for.

    Raises:
        InvalidArgumentError: lists what is missing or not allowed.
    """
    mistakes = []
    role = role_from_proto(request.role)
    if role is None:
        mistakes.append(Violation("role", f"missing; allowed: {', '.join(Role)}"))
    if not REGION.fullmatch(request.region or "local"):
        mistakes.append(Violation("region", _REGIONS.format(request.region)))
    if mistakes or role is None:
        raise InvalidArgumentError.of("join token", mistakes)
    return role, request.name, request.region or "local"


def region_of(given: str, what: str) -> str:
    """The region a token is asked for.

    Raises:
        InvalidArgumentError: it is not allowed.
    """
    if not REGION.fullmatch(given or "local"):
        raise InvalidArgumentError.of(what, [Violation("region", _REGIONS.format(given))])
    return given or "local"


def trust_to_proto(roots: bytes, denials: Iterable[Denial]) -> pb.WatchTrustResponse:
    """What every node is told."""
    return pb.WatchTrustResponse(
        roots=roots,
        denials=[
            pb.Denial(
                identity=denial.identity.uri,
                serials=sorted(f"{serial:x}" for serial in denial.serials),
                reason=denial.reason,
                at=_time(denial.at_s),
            )
            for denial in denials
        ],
    )


def identities_to_proto(state: Identities) -> pb.ListIdentitiesResponse:
    """Everything a person may know."""
    answer = pb.ListIdentitiesResponse(
        tokens=[
            pb.OpenJoinToken(
                token_id=ticket.token_id,
                identity=ticket.identity.uri,
                region=ticket.region,
                expires_at=_time(ticket.expires_s),
            )
            for ticket in state.tickets.values()
            if not ticket.used_by
        ]
    )
    for identity in sorted({*state.issued, *state.revoked}, key=lambda each: each.uri):
        made = state.issued.get(identity, ())
        shown = answer.identities.add(
            identity=identity.uri, region=state.regions.get(identity, ""), live_certificates=len(made)
        )
        if made:
            newest = max(made, key=lambda each: each.issued_s)
            shown.serial = f"{newest.serial:x}"
            shown.issued_at.CopyFrom(_time(newest.issued_s))
            shown.expires_at.CopyFrom(_time(newest.expires_s))
        revocation = state.revoked.get(identity)
        if revocation is not None and not revocation.serials:
            shown.revoked_at.CopyFrom(_time(revocation.at_s))
            shown.revoked_reason = revocation.reason
    return answer


def _time(at_s: float) -> Timestamp:
    stamp = Timestamp()
    stamp.FromMicroseconds(round(at_s * 1e6))
    return stamp
