"""Calls that a gateway makes for a node: the pass that goes with them, and what it makes of the caller."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from cortex_common.errors import ForbiddenError, UnauthenticatedError
from cortex_common.identity import Role, TlsFiles
from cortex_common.rpc.authorisation import RELAYED
from cortex_common.rpc.tls import files_stamp
from cortex_common.security.certificates import Certificate, read_file
from cortex_common.security.passes import NodePass, read_pass

PASS_KEY = "cortex-pass-bin"  # noqa: S105 - the name of a header  # nosec B105
_KEPT = 4096
_current: ContextVar[NodePass | None] = ContextVar("cortex_pass", default=None)


def current_pass() -> NodePass | None:
    """The pass that came with the RPC now being served; None when the caller speaks for itself."""
    return _current.get()


@contextmanager
def acting_by(given: NodePass | None) -> Iterator[None]:
    """Make `current_pass()` answer `given` inside the block."""
    token = _current.set(given)
    try:
        yield
    finally:
        _current.reset(token)


class PassReader:
    """Reads the passes that come with calls; each is verified once, and again when the trusted roots change."""

    def __init__(self, tls: TlsFiles) -> None:
        self._tls = tls
        self._stamp = files_stamp(tls)
        self._read: OrderedDict[bytes, NodePass] = OrderedDict()

    def of_call(self, caller: Certificate, method: str, metadata: Any, now_s: float) -> NodePass | None:
        """The pass with which a gateway makes this call; None when it makes it for itself.

        Raises:
            UnauthenticatedError: the pass is not good, or another gateway's.
            ForbiddenError: no pass allows this method.
        """
        if caller.identity.role is not Role.GATEWAY:
            return None
        data = next((value for key, value in metadata or () if key == PASS_KEY), None)
        if not isinstance(data, bytes):
            return None
        given = self._verified(data, now_s)
        if given.gateway != caller.identity or given.node.network != caller.identity.network:
            raise UnauthenticatedError(f"the pass is for {given.gateway.uri}, not for {caller.identity.uri}", "pass")
        if not given.standing.not_before.timestamp() <= now_s < given.expires_s:
            raise UnauthenticatedError(f"the pass for {given.node.uri} has expired: its node must prove itself", "pass")
        if given.node.role is not Role.WORKER or method not in RELAYED:
            raise ForbiddenError(f"{method} cannot be called for another node", "pass")
        return given

    def _verified(self, data: bytes, now_s: float) -> NodePass:
        stamp = files_stamp(self._tls)
        if stamp != self._stamp:
            self._stamp = stamp
            self._read.clear()
        known = self._read.get(data)
        if known is None:
            known = read_pass(data, read_file(self._tls.ca, "authority certificate"), now_s)
            self._read[data] = known
            if len(self._read) > _KEPT:
                self._read.popitem(last=False)
        return known
