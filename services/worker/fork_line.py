"""What a worker and its fork server say to each other, one message a packet, descriptors beside it.

The worker asks for a trainer by a number, with the trainer's end of its line and the write end of its output. The
answer is a descriptor of the new process; a second message tells how that process ended.
"""

from __future__ import annotations

import array
import socket
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

_MESSAGE = struct.Struct(">BIi")
_MAX_DESCRIPTORS = 2


class Kind(IntEnum):
    """What a message says."""

    FORK = 1
    FORKED = 2
    ENDED = 3


@dataclass(frozen=True, slots=True)
class ForkMessage:
    """One message.

    Attributes:
        number: Of the request, chosen by the worker.
        value: The process id of a FORKED, the return code of an ENDED as `subprocess` gives it.
        descriptors: Line and output of a FORK, the process of a FORKED. Whoever receives them closes them.
    """

    kind: Kind
    number: int
    value: int = 0
    descriptors: Sequence[int] = ()


def send(connection: socket.socket, message: ForkMessage) -> None:
    """Send one.

    Raises:
        OSError: nobody listens any more.
    """
    packet = _MESSAGE.pack(message.kind, message.number, message.value)
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", message.descriptors))]
    connection.sendmsg([packet], rights if message.descriptors else [])


def receive(connection: socket.socket) -> ForkMessage | None:
    """The next one; None when the other end is gone."""
    packet, descriptors, _, _ = socket.recv_fds(connection, _MESSAGE.size, _MAX_DESCRIPTORS)
    if not packet:
        return None
    kind, number, value = _MESSAGE.unpack(packet)
    return ForkMessage(Kind(kind), number, value, tuple(descriptors))
