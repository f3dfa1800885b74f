"""What the routes work with; made once in main, passed by the application's state."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from fastapi import FastAPI, Request

from cortex_common.clock import Clock
from cortex_common.errors import OverloadedError
from cortex_common.rpc.auditing import Auditor
from cortex_common.security.tokens import TokenStore
from services.gateway import metrics
from services.gateway.access import Access
from services.gateway.client import JobClient, NodeClient


class Streams:
    """Counts the open event streams, so that the coordinator is never asked for more than it has room for."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._open = 0

    @contextmanager
    def place(self) -> Iterator[None]:
        """Count one inside the block.

        Raises:
            OverloadedError: all places are taken.
        """
        if self._open >= self._limit:
            raise OverloadedError(f"{self._open} event streams are open; this gateway allows {self._limit}")
        self._open += 1
        metrics.EVENT_STREAMS.set(self._open)
        try:
            yield
        finally:
            self._open -= 1
            metrics.EVENT_STREAMS.set(self._open)


@dataclass(frozen=True, slots=True)
class Surroundings:
    """The gateway's peers, tokens and limits; `stopping` is set when the process is to end.

    An event stream ends with a problem when the coordinator was away for `watch_patience_s`.
    """

    jobs: JobClient
    nodes: NodeClient
    tokens: TokenStore
    access: Access
    clock: Clock
    auditor: Auditor | None = None
    streams: Streams = field(default_factory=lambda: Streams(100))
    watch_patience_s: float = 60.0
    stopping: asyncio.Event = field(default_factory=asyncio.Event)


def attach(app: FastAPI, surroundings: Surroundings) -> None:
    """Give an application its surroundings."""
    app.state.surroundings = surroundings


def surroundings_of(request: Request) -> Surroundings:
    """The surroundings of the application that serves a request."""
    found = request.app.state.surroundings
    if not isinstance(found, Surroundings):
        raise TypeError("the application has no surroundings")
    return found
