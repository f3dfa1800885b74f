"""Secrets that were planted, and the search for them: as they are, in hexadecimal, in base64, wherever they begin."""

from __future__ import annotations

import asyncio
import base64
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path


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


class Frames:
    """One direction of a WebSocket connection: what its frames say, without the masks that hide it from a search."""

    def __init__(self, record: bytearray) -> None:
        self._record = record
        self._rest = bytearray()
        self._is_open = False

    def __iadd__(self, data: bytes) -> Frames:
        self._rest += data
        while (size := self._size()) and len(self._rest) >= size:
            self._record += self._said(bytes(self._rest[:size]))
            del self._rest[:size]
        return self

    def _size(self) -> int:
        """Of the head that opens the connection, or of the frame that begins here; 0 while that cannot be said."""
        rest = self._rest
        if not self._is_open:
            return rest.find(b"\r\n\r\n") + 4 if b"\r\n\r\n" in rest else 0
        if len(rest) < 2 or len(rest) < (head := _frame_head(rest)):
            return 0
        given = rest[1] & 0x7F
        length = given if given < 126 else int.from_bytes(rest[2 : 4 if given == 126 else 10])
        return head + length

    def _said(self, part: bytes) -> bytes:
        if not self._is_open:
            self._is_open = True
            return part
        assert not part[0] & 0x70, "a frame is compressed: a search would find nothing in it"
        head = _frame_head(part)
        payload = part[head:]
        if not part[1] & 0x80:
            return payload
        mask = part[head - 4 : head]
        return bytes(byte ^ mask[place % 4] for place, byte in enumerate(payload))


def _frame_head(frame: bytes | bytearray) -> int:
    """Bytes before a frame's payload (RFC 6455, 5.2)."""
    return 2 + {126: 2, 127: 8}.get(frame[1] & 0x7F, 0) + (4 if frame[1] & 0x80 else 0)


class Recorder:
    """Proxies on loopback that keep everything that passes, both ways; runs on a thread of its own."""

    def __init__(self) -> None:
        self.passed: dict[str, bytearray] = {}
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

    def before(self, address: str, *, frames: bool = False) -> str:
        """An address at which `address` is reached through a proxy; `frames`: of WebSocket, in the clear."""
        return asyncio.run_coroutine_threadsafe(self._open(address, frames), self._loop).result(10)

    async def _open(self, address: str, frames: bool) -> str:
        record = self.passed.setdefault(f"traffic of {address}", bytearray())
        host, _, port = address.rpartition(":")

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                far_reader, far_writer = await asyncio.open_connection(host, int(port))
            except OSError:
                writer.close()
                return
            up, down = (Frames(record), Frames(record)) if frames else (record, record)
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


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, record: bytearray | Frames) -> None:
    with suppress(OSError):
        while data := await reader.read(1 << 16):
            record += data
            writer.write(data)
            await writer.drain()
    writer.close()
