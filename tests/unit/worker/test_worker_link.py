"""The line to the trainer child, and the memory both processes share."""

from __future__ import annotations

import json
import socket
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cortex_common.errors import CorruptError
from cortex_common.tensors import Manifest, TensorKind
from services.worker.link import ChildLink, body_length, decode, encode
from services.worker.shared_arena import SharedArena

MANIFEST = Manifest.of([("w", (3, 5), TensorKind.TRAINABLE), ("n", (2,), TensorKind.COUNTER)])


@given(
    st.dictionaries(
        st.text(), st.none() | st.booleans() | st.integers() | st.text() | st.floats(allow_nan=False), max_size=5
    )
)
def test_messages_survive_the_way(message: dict[str, object]) -> None:
    header, body = encode(message)
    assert body_length(header) == len(body)
    assert decode(body) == message


@pytest.mark.parametrize("body", [b"", b"[1]", b"\xff", b"{"])
def test_what_is_not_a_message_is_refused(body: bytes) -> None:
    with pytest.raises(CorruptError):
        decode(body)
    with pytest.raises(CorruptError):
        body_length(b"\xff\xff\xff\xff")


def test_large_messages_and_descriptors_arrive_in_order() -> None:
    ours, theirs = socket.socketpair()
    link, shared = ChildLink(theirs), SharedArena.create(MANIFEST)
    shared.arena.values[:] = np.arange(15)
    large = {"text": "x" * 3_000_000}

    def send() -> None:
        header, body = encode({"op": "arenas"})
        socket.send_fds(ours, [header], [shared.descriptor])
        ours.sendall(body + b"".join(encode(large)))
        ours.close()

    sender = threading.Thread(target=send)
    sender.start()
    first = link.receive()
    assert first is not None
    message, descriptors = first
    assert message == {"op": "arenas"}
    other = SharedArena(descriptors[0], MANIFEST)
    other.close()
    assert other.arena.values.tolist() == list(range(15))
    other.arena.counters[1] = 7
    assert shared.arena.counters.tolist() == [0, 7]
    assert link.receive() == (large, [])
    assert link.receive() is None
    sender.join()
    theirs.close()
    shared.close()


def test_a_message_cut_short_is_the_end() -> None:
    ours, theirs = socket.socketpair()
    header, body = encode({"op": "train"})
    ours.sendall((header + body)[:-1])
    ours.close()
    assert ChildLink(theirs).receive() is None
    theirs.close()


def test_messages_are_json_for_people_who_debug() -> None:
    assert json.loads(encode({"op": "train", "round": 3})[1]) == {"op": "train", "round": 3}
