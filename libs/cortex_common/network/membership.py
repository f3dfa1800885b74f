"""A node's standing in the network: its certificate kept fresh, the roots it trusts, and who is shut out."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Iterable, Sequence
from pathlib import Path

from cortex_common.clock import Clock
from cortex_common.errors import CorruptError, CortexError, InvalidArgumentError
from cortex_common.identity import Identity, Role, TlsFiles
from cortex_common.logging import get_logger
from cortex_common.network.enrolment import is_enrolled, keep_certificate
from cortex_common.pb.v1 import identity_pb2, identity_pb2_grpc
from cortex_common.rpc.channel import open_channel
from cortex_common.rpc.denial import Denial, DenyList
from cortex_common.rpc.errors import calling
from cortex_common.rpc.following import follow
from cortex_common.security.certificates import fingerprints
from cortex_common.security.issuing import write_files
from cortex_common.storage.checked import from_checked_json, to_checked_json

_log = get_logger(__name__)

_FIRST_WAIT_S = 0.2
_LONGEST_WAIT_S = 3.0


class Membership:
    """Follows discovery, which says who belongs to the network; what it said last holds while it is away.

    Args:
        tls: This node's files.
        discovery: host:port; None for a node that follows nobody.
        kept: File for the denials last heard of, so that a restart without discovery lets nobody in.
        clock: Does the waiting.
    """

    def __init__(self, tls: TlsFiles, discovery: str | None, kept: Path, clock: Clock) -> None:
        self.denied = DenyList()
        self._tls = tls
        self._discovery = discovery
        self._kept = kept
        self._clock = clock
        self._reason = ""
        self._is_kept = True
        self.denied.replace(self._remembered())

    async def keep(self) -> None:
        """Renew the certificate, follow roots and denials, for ever."""
        if self._discovery is None:
            return
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._follow_forever(self._discovery))
            if is_enrolled(self._tls):
                tasks.create_task(keep_certificate(self._tls, self._discovery, self._clock))

    async def _follow_forever(self, discovery: str) -> None:
        wait_s = _FIRST_WAIT_S
        while True:
            try:
                async with open_channel(discovery, self._tls, Role.DISCOVERY, clock=self._clock) as channel:
                    stub: identity_pb2_grpc.IdentityServiceAsyncStub = identity_pb2_grpc.IdentityServiceStub(channel)
                    with calling(f"discovery at {discovery}"):
                        async for answer in follow(channel, stub.WatchTrust, identity_pb2.WatchTrustRequest()):
                            wait_s, self._reason = _FIRST_WAIT_S, ""
                            self._take(answer)
            except (CortexError, OSError) as error:
                if str(error) != self._reason:
                    self._reason = str(error)
                    _log.warning("trust_not_followed", reason=self._reason)
            await self._clock.sleep(wait_s * random.uniform(0.5, 1.0))  # noqa: S311 - spreads reconnects
            wait_s = min(wait_s * 2, _LONGEST_WAIT_S)

    def _take(self, answer: identity_pb2.WatchTrustResponse) -> None:
        denials, roots = trust_of(answer)
        if set(denials) != set(self.denied.denials):
            _log.info("denials_changed", denials=len(denials))
            self._is_kept = False
            self.denied.replace(denials)
        # Again and again where it failed, on a full disk say: who is shut out must be known after a restart too.
        if not self._is_kept:
            write_files([(self._kept, to_checked_json({"denials": [_document(each) for each in denials]}), 0o600)])
            self._is_kept = True
        if roots and is_enrolled(self._tls) and self._tls.ca.read_bytes() != roots:
            _log.info("roots_changed")
            write_files([(self._tls.ca, roots, 0o644)])

    def _remembered(self) -> Sequence[Denial]:
        try:
            return read_denials(self._kept)
        except CorruptError as error:
            # Discovery says it again within seconds; until then this node knows less, and says so.
            _log.error("denials_unreadable", file=str(self._kept), reason=str(error))
            return []


def trust_of(answer: identity_pb2.WatchTrustResponse) -> tuple[list[Denial], bytes]:
    """Who is shut out, and the roots, as discovery says; no roots where certificates come from elsewhere.

    Raises:
        CorruptError: it cannot be read.
    """
    try:
        denials = [
            _denial(each.identity, each.serials, each.reason, each.at.ToMicroseconds() / 1e6) for each in answer.denials
        ]
    except (ValueError, InvalidArgumentError) as error:
        raise CorruptError(f"discovery sent a denial that cannot be read: {error}") from None
    if answer.roots:
        fingerprints(answer.roots)
    return denials, answer.roots


def read_denials(path: Path) -> list[Denial]:
    """Who was shut out when a node last heard of it; nobody, if there is no file.

    Raises:
        CorruptError: it cannot be read.
    """
    try:
        return kept_denials(path.read_bytes())
    except FileNotFoundError:
        return []
    except (OSError, CorruptError) as error:
        raise CorruptError(f"{path}, which says who is shut out, cannot be read: {error}") from None


def kept_denials(data: bytes) -> list[Denial]:
    """The denials in a file; versions before wrote a bare list.

    Raises:
        CorruptError: it is damaged.
    """
    try:
        found = json.loads(data) if data.startswith(b"[") else from_checked_json(data)["denials"]
        return [_denial(each["identity"], each["serials"], each["reason"], each["at_s"]) for each in found]
    except (ValueError, KeyError, TypeError, InvalidArgumentError) as error:
        raise CorruptError(f"not a list of denials: {error}") from None


def _denial(identity: str, serials: Iterable[str], reason: str, at_s: float) -> Denial:
    return Denial(Identity.parse(identity), frozenset(int(serial, 16) for serial in serials), reason, at_s)


def _document(denial: Denial) -> dict[str, object]:
    serials = sorted(f"{serial:x}" for serial in denial.serials)
    return {"identity": denial.identity.uri, "serials": serials, "reason": denial.reason, "at_s": denial.at_s}
