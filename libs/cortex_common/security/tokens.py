"""Bearer tokens of the HTTP API: shown once, stored as keyed hashes in a file that only its owner can read."""

from __future__ import annotations

import fcntl
import hashlib
import hmac
import json
import os
import re
import secrets
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from cortex_common.clock import Clock, SystemClock
from cortex_common.errors import (
    CorruptError,
    ForbiddenError,
    InvalidArgumentError,
    NotFoundError,
    UnauthenticatedError,
    UnavailableError,
    Violation,
)
from cortex_common.ids import DEFAULT_ORG
from cortex_common.security.audit import AuditLog, Entry, Head, newest_head
from cortex_common.storage.checked import from_checked_json, to_checked_json

PREFIX = "ctx_"
_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._@-]{0,61}[A-Za-z0-9])?")
_SECRET_BYTES = 32


class Scope(StrEnum):
    """What a token may be used for."""

    READ = "read"
    SUBMIT = "submit"
    ADMIN = "admin"


_IMPLIED = {Scope.ADMIN: frozenset({Scope.READ, Scope.SUBMIT})}


@dataclass(frozen=True, slots=True)
class Principal:
    """Who a verified token belongs to.

    Attributes:
        expires_s: Wall time from which on the token is not good any more; None for no end.
    """

    token_id: str
    name: str
    scopes: frozenset[Scope]
    org: str = DEFAULT_ORG
    expires_s: float | None = None

    def require(self, scope: Scope) -> None:
        """Refuse unless the token has the scope, itself or through admin.

        Raises:
            ForbiddenError: it has not.
        """
        if not self.may(scope):
            held = ", ".join(sorted(self.scopes))
            raise ForbiddenError(f"token {self.name!r} has the scopes {held}; this needs {scope.value}")

    def may(self, scope: Scope) -> bool:
        """Whether the token has the scope, itself or through admin."""
        return any(scope is held or scope in _IMPLIED.get(held, frozenset()) for held in self.scopes)


class TokenRecord(BaseModel):
    """A token as stored: everything but the secret."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    name: str
    scopes: tuple[Scope, ...]
    org: str = DEFAULT_ORG
    hash: str
    created_at: datetime
    expires_at: datetime | None = None

    @field_validator("scopes", mode="before")
    @classmethod
    def _without_node(cls, scopes: object) -> object:
        """Files of 0.1.0 may hold a scope `node`, which let nobody do anything."""
        return [scope for scope in scopes if scope != "node"] if isinstance(scopes, list) else scopes


class _TokenFile(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    tokens: tuple[TokenRecord, ...] = ()


def is_name(text: str) -> bool:
    """Whether it may stand for a person or an organisation."""
    return _NAME.fullmatch(text) is not None


class TokenStore:
    """The tokens in one JSON file, with the server's pepper beside it (`<file>.pepper`), both mode 0600.

    When each was last used is in another file beside it (`<file>.used`), written by whoever verifies them, and each
    change in an audit log (folder `<file>.audit`).

    Every read looks whether the file has changed, so a token made or revoked by another process counts at once.
    Changes by several processes are serialised by a lock file.
    """

    def __init__(self, path: Path, clock: Clock | None = None) -> None:
        self._path = path
        self._clock = clock or SystemClock()
        self._held: tuple[tuple[int, int, int], Mapping[str, TokenRecord]] | None = None
        self._pepper = b""
        self._used: dict[str, datetime] = {}
        self._is_use_saved = True

    def create(self, name: str, scopes: Iterable[str], life: timedelta | None = None, org: str = DEFAULT_ORG) -> str:
        """Make a token and return it; it cannot be shown again.

        Args:
            name: Whose it is, for logs and ownership.
            scopes: Out of read, submit, admin; at least one.
            life: How long it is valid; None means until revoked.
            org: The organisation whose jobs it may see; with the scope admin those of all.

        Raises:
            InvalidArgumentError: bad name, scopes, life or organisation.
        """
        granted = _checked(name, scopes, life, org)
        now = self._now()
        with self._changing():
            records = dict(self._records())
            token_id = secrets.token_hex(6)
            token = f"{PREFIX}{token_id}_{secrets.token_urlsafe(_SECRET_BYTES)}"
            records[token_id] = TokenRecord(
                id=token_id,
                name=name,
                scopes=granted,
                org=org,
                hash=_keyed_hash(self._peppered(create=True), token),
                created_at=now,
                expires_at=now + life if life is not None else None,
            )
            self._save(records.values())
            self._record("token create", f"token_id={token_id} name={name} org={org} scopes={','.join(granted)}")
        return token

    def verify(self, token: str) -> Principal:
        """Whose token this is.

        Raises:
            UnauthenticatedError: malformed, unknown, revoked or expired.
        """
        parts = token.split("_", 2)
        if len(parts) != 3 or f"{parts[0]}_" != PREFIX or not parts[1] or not parts[2]:
            raise UnauthenticatedError("this is not a Cortex token; allowed is ctx_<id>_<secret>")
        record = self._records().get(parts[1])
        given = _keyed_hash(self._peppered(create=False), token)
        if not hmac.compare_digest(given, record.hash if record else "0" * len(given)) or record is None:
            raise UnauthenticatedError("the token is unknown or was revoked")
        if record.expires_at is not None and record.expires_at <= self._now():
            raise UnauthenticatedError(f"token {record.name!r} expired at {record.expires_at.isoformat()}")
        self._used[record.id], self._is_use_saved = self._now(), False
        ends_s = record.expires_at.timestamp() if record.expires_at is not None else None
        return Principal(record.id, record.name, frozenset(record.scopes), record.org, ends_s)

    def has(self, token_id: str) -> bool:
        """Whether there is a token of this id, expired or not: one that was verified and is gone was revoked.

        Raises:
            UnavailableError: the file cannot be read.
        """
        return token_id in self._records()

    def save_use(self) -> None:
        """Write down when tokens were used since the last time."""
        if self._is_use_saved:
            return
        self._is_use_saved = True
        known = self._records()
        used = {**self.last_used(), **self._used}
        lines = {token_id: at.isoformat(timespec="seconds") for token_id, at in used.items() if token_id in known}
        _write_private(self._beside("used"), json.dumps(lines, indent=2).encode())

    def last_used(self) -> Mapping[str, datetime]:
        """When each token was last used, as far as that is written down."""
        try:
            lines = json.loads(self._beside("used").read_bytes())
            return {str(token_id): datetime.fromisoformat(at) for token_id, at in lines.items()}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise UnavailableError(f"{self._beside('used')} cannot be read: {error}") from None

    def revoke(self, token_id: str) -> None:
        """Forget a token.

        Raises:
            NotFoundError: no token has this id.
        """
        with self._changing():
            records = dict(self._records())
            if records.pop(token_id, None) is None:
                raise NotFoundError(f"no token has the id {token_id!r}")
            self._save(records.values())
            self._record("token revoke", f"token_id={token_id}")

    def list(self) -> tuple[TokenRecord, ...]:
        """All tokens, oldest first, expired ones included."""
        return tuple(sorted(self._records().values(), key=lambda record: record.created_at))

    @property
    def audit_directory(self) -> Path:
        """Of the log of changes."""
        return self._beside("audit")

    def audit_head(self) -> Head:
        """Where the log of changes ends now.

        Raises:
            OSError: it cannot be read.
            CorruptError: it is damaged.
        """
        return newest_head(self.audit_directory)

    def _beside(self, ending: str) -> Path:
        return self._path.with_name(f"{self._path.name}.{ending}")

    def _record(self, what: str, about: str) -> None:
        """Add a change to the audit log; the lock is held."""
        who = f"uid:{os.getuid()}"
        AuditLog(self.audit_directory).append(Entry(who, what, "allowed", "OK", about=about), self._clock.wall_s())

    def _now(self) -> datetime:
        return datetime.fromtimestamp(self._clock.wall_s(), UTC)

    def _records(self) -> Mapping[str, TokenRecord]:
        try:
            facts = self._path.stat()
        except FileNotFoundError:
            self._held = None
            return {}
        stamp = (facts.st_ino, facts.st_mtime_ns, facts.st_size)
        if self._held is None or self._held[0] != stamp:
            self._held = (stamp, {record.id: record for record in self._load()})
            # A file that was made anew has a pepper of its own.
            self._pepper = b""
        return self._held[1]

    def _load(self) -> tuple[TokenRecord, ...]:
        try:
            return _TokenFile.model_validate(from_checked_json(self._path.read_bytes())).tokens
        except (OSError, CorruptError, ValidationError) as error:
            raise UnavailableError(f"token file {self._path} cannot be read: {' '.join(str(error).split())}") from None

    def _peppered(self, *, create: bool) -> bytes:
        if self._pepper:
            return self._pepper
        path = self._beside("pepper")
        if create and not path.exists():
            _write_private(path, secrets.token_hex(32).encode())
        try:
            self._pepper = bytes.fromhex(path.read_text(encoding="ascii").strip())
        except FileNotFoundError:
            return b"no token was ever made"
        except (OSError, ValueError) as error:
            raise UnavailableError(f"token pepper {path} cannot be read: {error}") from None
        return self._pepper

    @contextmanager
    def _changing(self) -> Iterator[None]:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self._beside("lock"), os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def _save(self, records: Iterable[TokenRecord]) -> None:
        document = _TokenFile(tokens=tuple(records))
        _write_private(self._path, to_checked_json(document.model_dump(mode="json")))


def _checked(name: str, scopes: Iterable[str], life: timedelta | None, org: str) -> tuple[Scope, ...]:
    mistakes: list[Violation] = []
    for what, given in (("name", name), ("org", org)):
        if not _NAME.fullmatch(given):
            mistakes.append(Violation(what, f"{given!r} given; allowed: 1 to 63 letters, digits, '.', '_', '@', '-'"))
    wanted = list(dict.fromkeys(scopes))
    allowed = ", ".join(Scope)
    mistakes += [
        Violation("scopes", f"{scope!r} given; allowed: {allowed}") for scope in wanted if scope not in set(Scope)
    ]
    if not wanted:
        mistakes.append(Violation("scopes", f"none given; allowed: one or more of {allowed}"))
    if life is not None and life <= timedelta(0):
        mistakes.append(Violation("life", f"{life} given; allowed: more than zero, or none for no end"))
    if mistakes:
        raise InvalidArgumentError.of("token", mistakes)
    return tuple(Scope(scope) for scope in wanted)


def _keyed_hash(pepper: bytes, token: str) -> str:
    return hmac.new(pepper, token.encode(), hashlib.sha256).hexdigest()


def _write_private(path: Path, content: bytes) -> None:
    """Replace a file as a whole, mode 0600, durably."""
    draft = path.with_name(f"{path.name}.new")
    draft.unlink(missing_ok=True)
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
