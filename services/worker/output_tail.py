"""The last lines a child process wrote: what a person is told when it ends."""

from __future__ import annotations

import asyncio
from collections import deque

from cortex_common.logging import get_logger

_log = get_logger(__name__)

_LINES = 12
_TOLD = 5
_MAX_LINE = 400


class OutputTail:
    """Reads a child's output until its end."""

    def __init__(self, stream: asyncio.StreamReader, pid: int) -> None:
        """Begin to read; `pid` is for the log."""
        self._pid = pid
        self._last: deque[str] = deque(maxlen=_LINES)
        self._reading = asyncio.create_task(self._read(stream))

    async def finish(self) -> str:
        """The last lines, once the child has ended; whoever else holds its output is not waited for."""
        await asyncio.wait((self._reading,), timeout=1)
        self._reading.cancel()
        return " | ".join(list(self._last)[-_TOLD:])

    async def _read(self, stream: asyncio.StreamReader) -> None:
        while line := await _line(stream):
            text = line.decode(errors="replace").rstrip()[:_MAX_LINE]
            if text:
                self._last.append(text)
                _log.debug("trainer_output", pid=self._pid, line=text)


async def _line(stream: asyncio.StreamReader) -> bytes:
    """The next line, or as much of an endless one as the reader holds."""
    try:
        return await stream.readline()
    except ValueError:
        return b"(a very long line)\n"
