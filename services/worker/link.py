"""The line between a worker and its trainer child: small JSON messages, and file descriptors, over a Unix socket.

A message is 4 bytes of length, then JSON. Weights never go this way: they lie in shared memory (`shared_arena`).
"""

from __future__ import annotations

import json
import select
import socket
from collections.abc import Mapping, Sequence

from cortex_common.errors import CorruptError

Message = dict[str, object]

HEADER_BYTES = 4
MAX_MESSAGE_BYTES = 64 << 20
MAX_DESCRIPTORS = 4


def encode(message: Mapping[str, object]) -> tuple[bytes, bytes]:
    """Length and body of a message."""
    body = json.dumps(message, separators=(",", ":")).encode()
    return len(body).to_bytes(HEADER_BYTES, "big"), body


def body_length(header: bytes) -> int:
    """Length of the body that follows this header.

    Raises:
        CorruptError: longer than any message.
    """
    length = int.from_bytes(header, "big")
    if length > MAX_MESSAGE_BYTES:
        raise CorruptError(f"trainer link: a message of {length} bytes; allowed: {MAX_MESSAGE_BYTES}")
    return length


def decode(body: bytes | bytearray) -> Message:
    """The message in a body.

    Raises:
        CorruptError: not a JSON object.
    """
    try:
        message = json.loads(body)
    except ValueError as error:
        raise CorruptError(f"trainer link: not JSON: {error}") from error
    if not isinstance(message, dict):
        raise CorruptError("trainer link: not a JSON object")
    return message


class ChildLink:
    """The child's end: blocking."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection

    def send(self, message: Mapping[str, object]) -> None:
        """Hand a message to the worker."""
        header, body = encode(message)
        self._connection.sendall(header + body)

    def receive(self) -> tuple[Message, Sequence[int]] | None:
        """The next message and the descriptors that came with it; None when the worker is gone."""
        header, descriptors, _, _ = socket.recv_fds(self._connection, HEADER_BYTES, MAX_DESCRIPTORS)
        header += self._exactly(HEADER_BYTES - len(header)) if header else b""
        if len(header) < HEADER_BYTES:
            return None
        body = self._exactly(body_length(header))
        return (decode(body), descriptors) if body else None

    def has_message(self) -> bool:
        """Whether `receive` would return at once."""
        waiting = select.poll()  # select takes no descriptor above 1023
        waiting.register(self._connection, select.POLLIN)
        return bool(waiting.poll(0))

    def _exactly(self, count: int) -> bytes:
        parts = bytearray()
        while len(parts) < count:
            part = self._connection.recv(count - len(parts))
            if not part:
                return b""
            parts += part
        return bytes(parts)
