"""Who is shut out of the network: refused at every call, and cut off in the middle of one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from cortex_common.errors import UnauthenticatedError
from cortex_common.identity import Identity, Role
from cortex_common.ids import NodeName
from cortex_common.security.certificates import Certificate


@dataclass(frozen=True, slots=True)
class Denial:
    """Somebody shut out.

    Attributes:
        identity: Who.
        serials: Only these certificates of theirs; every one, if empty.
        reason: Why, as the operator said.
        at_s: Since when; wall seconds.
    """

    identity: Identity
    serials: frozenset[int] = frozenset()
    reason: str = ""
    at_s: float = 0.0

    @property
    def because(self) -> str:
        """Why, to add to a line."""
        return f" ({self.reason})" if self.reason else ""

    def covers(self, certificate: Certificate) -> bool:
        """Whether this certificate is shut out by it."""
        return certificate.identity == self.identity and (not self.serials or certificate.serial in self.serials)


class DenyList:
    """Everybody shut out, and the calls that are open: whose denial arrives in the middle of one is cut off."""

    def __init__(self) -> None:
        self._denials: dict[Identity, Denial] = {}
        self._shut_out: dict[tuple[Role, str], Denial] = {}
        """Of nodes, every certificate of which is denied."""
        self._open: dict[object, tuple[Certificate, Callable[[], None]]] = {}
        self._listeners: list[Callable[[], None]] = []

    @property
    def denials(self) -> tuple[Denial, ...]:
        """Everybody shut out."""
        return tuple(self._denials.values())

    def on_change(self, act: Callable[[], None]) -> None:
        """Have `act` called after each change."""
        self._listeners.append(act)

    def replace(self, denials: Iterable[Denial]) -> None:
        """The whole list, as discovery knows it now; open calls of those on it are cut off."""
        fresh = {denial.identity: denial for denial in denials}
        if fresh == self._denials:
            return
        self._denials = fresh
        self._shut_out = {(each.role, each.name): denial for each, denial in fresh.items() if not denial.serials}
        for certificate, cut in list(self._open.values()):
            if self._of(certificate) is not None:
                cut()
        for act in self._listeners:
            act()

    def names(self, role: Role) -> frozenset[NodeName]:
        """Nodes of a role, every certificate of which is shut out."""
        return frozenset(denial.identity.name for (of, _), denial in self._shut_out.items() if of is role)

    def refusal(self, role: Role, name: str) -> str:
        """Why nobody calls a node: every certificate of it is shut out; empty if it may be called."""
        denial = self._shut_out.get((role, name))
        if denial is None:
            return ""
        return f"{role.value} {name} was revoked{denial.because}: a new join token lets it in again"

    def check(self, certificate: Certificate) -> None:
        """Refuse whoever is shut out.

        Raises:
            UnauthenticatedError: with the reason.
        """
        denial = self._of(certificate) if self._denials else None
        if denial is not None:
            raise UnauthenticatedError(
                f"certificate of {certificate.identity.uri} was revoked{denial.because}: "
                "a new join token lets it in again",
                "revoked",
            )

    @contextmanager
    def cutting(self, certificate: Certificate, cut: Callable[[], None]) -> Iterator[None]:
        """Have `cut` called if the certificate is shut out inside the block."""
        call = object()
        self._open[call] = (certificate, cut)
        try:
            yield
        finally:
            del self._open[call]

    def _of(self, certificate: Certificate) -> Denial | None:
        denial = self._denials.get(certificate.identity)
        return denial if denial is not None and denial.covers(certificate) else None
