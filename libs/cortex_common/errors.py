"""Errors, classed by what the caller should do about them; rpc/ and the gateway map them to gRPC and HTTP once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Violation:
    """One mistake in a request: where it is, and what was given against what is allowed."""

    path: str
    message: str

    def __str__(self) -> str:
        return f"{self.path}: {self.message}" if self.path else self.message


class CortexError(Exception):
    """Base of every error Cortex raises on purpose; its text is fit for a person."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class InvalidArgumentError(CortexError):
    """The request is wrong: mend it before sending it again."""

    def __init__(self, message: str, violations: Sequence[Violation] = ()) -> None:
        super().__init__(message)
        self.violations = tuple(violations)

    @classmethod
    def of(cls, subject: str, violations: Sequence[Violation]) -> InvalidArgumentError:
        """All mistakes of one subject in one error, a line each."""
        lines = "\n".join(f"  {violation}" for violation in violations)
        count = "1 mistake" if len(violations) == 1 else f"{len(violations)} mistakes"
        return cls(f"{subject}: {count}\n{lines}", violations)


class UnauthenticatedError(CortexError):
    """Nobody knows who is calling: stop. `kind` is a word for what was wrong, to count by."""

    def __init__(self, message: str, kind: str = "credentials") -> None:
        super().__init__(message)
        self.kind = kind


class ForbiddenError(CortexError):
    """The caller is known and may not do this: stop. `kind` is a word for what was wrong, to count by."""

    def __init__(self, message: str, kind: str = "ownership") -> None:
        super().__init__(message)
        self.kind = kind


class NotFoundError(CortexError):
    """The thing named does not exist: stop."""


class AlreadyExistsError(CortexError):
    """The thing exists already: done, if it is identical."""


class PreconditionError(CortexError):
    """The thing is in the wrong state: wait, or do something else first."""


class ConflictError(CortexError):
    """The caller acts on an outdated view (stale fence): read again, retry higher up."""


class OverloadedError(CortexError):
    """No room now (memory, disk, rate): back off. `retry_after_s` says for how long, if that is known."""

    def __init__(self, message: str, retry_after_s: int | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class UnavailableError(CortexError):
    """The peer cannot be reached now: retry this call."""


class CorruptError(CortexError):
    """Bytes are not what they claim to be: discard them, send again."""
