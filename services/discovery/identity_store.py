"""Where tokens, certificates in use and revocations survive a restart: one file, replaced before any answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Protocol

from cortex_common.errors import CorruptError, InvalidArgumentError
from cortex_common.identity import Identity
from cortex_common.security.issuing import write_files
from cortex_common.security.marks import HighWaterMarks, MarkedFile
from services.discovery.identities import Identities, Issued, NodeKey, Revocation, Ticket

_FORMAT = 1


class IdentityStore(Protocol):
    """Keeps what is known of identities."""

    def load(self) -> Identities:
        """What was kept last; nothing, if nothing was.

        Raises:
            CorruptError: it cannot be read.
        """

    def save(self, state: Identities) -> None:
        """Replace it; on the disk when this returns.

        Raises:
            OSError: it could not be written; what was kept is untouched.
        """


class MemoryIdentityStore:
    """For as long as the process lives."""

    def __init__(self) -> None:
        self._state = Identities()

    def load(self) -> Identities:
        """What was kept last."""
        return self._state

    def save(self, state: Identities) -> None:
        """Replace it."""
        self._state = state


class FileIdentityStore:
    """Keeps it in one JSON file, mode 0600, of which no older one is taken."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = MarkedFile(path, HighWaterMarks(path.parent), path.name)

    def load(self) -> Identities:
        """What was kept last.

        Raises:
            CorruptError: the file is damaged, older or gone: to go on without it would let in who was shut out.
        """
        try:
            facts = self._file.read()
            return Identities() if facts is None else _state(facts)
        except (OSError, ValueError, KeyError, TypeError, CorruptError, InvalidArgumentError) as error:
            raise CorruptError(f"{self._path}, which says who is shut out, cannot be used: {error}") from None

    def save(self, state: Identities) -> None:
        """Replace the file.

        Raises:
            OSError: it could not be written.
        """
        self._file.write(_document(state), lambda path, data: write_files([(path, data, 0o600)]))


def _document(state: Identities) -> dict[str, Any]:
    return {
        "format": _FORMAT,
        "tickets": [_ticket_document(ticket) for ticket in state.tickets.values()],
        "issued": [
            {
                "identity": identity.uri,
                "region": state.regions.get(identity, ""),
                "certificates": [[f"{each.serial:x}", each.issued_s, each.expires_s] for each in made],
            }
            for identity, made in state.issued.items()
        ],
        "revoked": [
            {
                "identity": identity.uri,
                "at_s": revocation.at_s,
                "reason": revocation.reason,
                "by": revocation.by,
                "serials": sorted(f"{serial:x}" for serial in revocation.serials),
            }
            for identity, revocation in state.revoked.items()
        ],
        "node_keys": [
            {
                "id": key.token_id,
                "public_key": key.public_key,
                "identity": key.identity.uri,
                "region": key.region,
                "expires_s": key.expires_s,
            }
            for key in state.node_keys.values()
        ],
    }


def _state(document: dict[str, Any]) -> Identities:
    if document["format"] != _FORMAT:
        raise ValueError(f"format {document['format']} is not known")
    tickets = [_ticket(each) for each in document["tickets"]]
    issued = {
        Identity.parse(each["identity"]): tuple(
            Issued(int(serial, 16), float(issued_s), float(expires_s))
            for serial, issued_s, expires_s in each["certificates"]
        )
        for each in document["issued"]
    }
    revoked = {
        Identity.parse(each["identity"]): Revocation(
            float(each["at_s"]), each["reason"], each["by"], frozenset(int(serial, 16) for serial in each["serials"])
        )
        for each in document["revoked"]
    }
    regions = {Identity.parse(each["identity"]): each["region"] for each in document["issued"]}
    node_keys = {each["id"]: _node_key(each) for each in document.get("node_keys", ())}
    return Identities({ticket.token_id: ticket for ticket in tickets}, issued, regions, revoked, node_keys)


def _node_key(document: dict[str, Any]) -> NodeKey:
    identity = Identity.parse(document["identity"])
    return NodeKey(document["id"], document["public_key"], identity, document["region"], float(document["expires_s"]))


def _ticket_document(ticket: Ticket) -> dict[str, Any]:
    return {
        "id": ticket.token_id,
        "hash": ticket.hash,
        "identity": ticket.identity.uri,
        "region": ticket.region,
        "expires_s": ticket.expires_s,
        "made_s": ticket.made_s,
        "used_by": ticket.used_by,
    }


def _ticket(document: dict[str, Any]) -> Ticket:
    return Ticket(
        document["id"],
        document["hash"],
        Identity.parse(document["identity"]),
        document["region"],
        float(document["expires_s"]),
        float(document["made_s"]),
        document.get("used_by", ""),
    )


def read_tickets(path: Path) -> list[Ticket]:
    """Join tokens made beforehand, as `{"tickets": [{"id", "hash", "identity", "region", "expires_s", "made_s"}]}`.

    Raises:
        InvalidArgumentError: the file cannot be read.
    """
    try:
        return [_ticket(each) for each in json.loads(path.read_bytes())["tickets"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InvalidArgumentError(f"join tokens {path} cannot be read: {error}") from None
