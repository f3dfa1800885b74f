"""Why work ends without a result."""

from __future__ import annotations

from cortex_common.errors import CortexError


class WorkFailedError(CortexError):
    """The work cannot be done.

    Attributes:
        is_permanent: The same work would fail on any worker, so the job is at fault, not this node.
    """

    def __init__(self, message: str, *, is_permanent: bool) -> None:
        super().__init__(message)
        self.is_permanent = is_permanent


class FeedbackLostError(CortexError):
    """An update kept cannot be read, or this one not be kept: it must be made anew, as another object."""


class UpdateLostError(CortexError):
    """An update that was on its way cannot be read any more: it must be trained anew."""


class WorkCancelledError(CortexError):
    """Nobody wants the result any more."""


class TrainerEndedError(CortexError):
    """The trainer child ended in the middle of its work."""
