"""Secrets that were planted, and the search for them: as they are, in hexadecimal, in base64, wherever they begin."""

from __future__ import annotations

import asyncio
import base64
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from websockets.frames import Frame
from websockets.protocol import Protocol, Side, State


def appearances(secret: bytes) -> Iterator[bytes]:
    """How a secret would look in the clear; base64 at each of the three places where it can begin."""
    yield secret
    yield secret.hex().encode()
    yield secret.hex().upper().encode()
    for before in range(3):
        text = base64.b64encode(bytes(before) + secret)
        # Whole groups of the secret alone: what is before and behind it in a file is not known.
        inner = text[4 * -(-before // 3) :][: 4 * ((len(secret) - (3 - before) % 3) // 3)]
        yield inner
        yield inner.translate(bytes.maketrans(b"+/", b"-_"))


def found_in(canaries: Mapping[str, bytes], contents: Mapping[str, bytes]) -> set[tuple[str, str]]:
    """Pairs of a canary's name and where it is in the clear."""
    # PEM breaks its lines, JSON writes the breaks as two characters.
    unbroken = {where: content.replace(b"\\n", b"").replace(b"\n", b"") for where, content in contents.items()}
    return {
        (name, where)
        for name, secret in canaries.items()
        for needle in set(appearances(secret))
        for where, content in contents.items()
        if needle in content or needle in unbroken[where]
    }


def files_below(folders: Iterable[Path]) -> dict[str, bytes]:
    """Contents of every file."""
    found = {}
    for folder in folders:
        for path in folder.rglob("*"):
            if path.is_file():
                with suppress(FileNotFoundError):
                    found[str(path)] = path.read_bytes()
    return found


def frames_of(record: bytes, direction: str) -> list[Frame]:
    """The frames of a WebSocket connection in one direction, unmasked; what a node sends ("up") comes masked."""
    side = Side.SERVER if direction == "up" else Side.CLIENT
    protocol = Protocol(side, state=State.OPEN, max_size=None)
    protocol.receive_data(record.partition(b"\r\n\r\n")[2])
    assert protocol.parser_exc is None
    return [event for event in protocol.events_received() if isinstance(event, Frame)]


def said_over_websocket(record: bytes, direction: str) -> bytes:
    """A connection's head, and everything that its frames carry: a message in several of them is in one piece here."""
    return record.partition(b"\r\n\r\n")[0] + b"".join(frame.data for frame in frames_of(record, direction))


def said_over_http(record: bytes, _: str) -> bytes:
    """A connection as it is, and with bodies that were sent in chunks in one piece."""
    return record + re.sub(rb"\r\n[0-9a-f]+\r\n", b"", record)


class Recorder:
    """Proxies on loopback that keep everything that passes; runs on a thread of its own."""

    def __init__(self) -> None:
        self.passed: dict[tuple[str, str], list[bytearray]] = {}
        """By line and direction ("up": to the address behind the proxy) what each connection carried."""
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    @contextmanager
    def running(self) -> Iterator[Recorder]:
        self._thread.start()
        try:
            yield self
        finally:
            asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result(10)
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(10)
            self._loop.close()

    def before(self, address: str, line: str = "") -> str:
        """An address at which `address` is reached through a proxy; `line` is what its traffic is known by."""
        return asyncio.run_coroutine_threadsafe(self._open(address, line or address), self._loop).result(10)

    def said(self, line: str, read: Callable[[bytes, str], bytes]) -> dict[str, bytes]:
        """What a line of plain text carried, each direction apart, as `read` reads a connection."""
        return {
            f"{line}, {way}": b"".join(read(bytes(record), way) for record in self.passed[line, way])
            for way in ("up", "down")
        }

    async def _open(self, address: str, line: str) -> str:
        ups, downs = self.passed.setdefault((line, "up"), []), self.passed.setdefault((line, "down"), [])
        host, _, port = address.rpartition(":")

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                far_reader, far_writer = await asyncio.open_connection(host, int(port))
            except OSError:
                writer.close()
                return
            up, down = bytearray(), bytearray()
            ups.append(up)
            downs.append(down)
            with suppress(asyncio.CancelledError):
                await asyncio.gather(_pump(reader, far_writer, up), _pump(far_reader, writer, down))

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        mine, number = server.sockets[0].getsockname()
        return f"{mine}:{number}"

    async def _stop(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, record: bytearray) -> None:
    with suppress(OSError):
        while data := await reader.read(1 << 16):
            record += data
            writer.write(data)
            await writer.drain()
    writer.close()
