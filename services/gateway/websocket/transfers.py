"""Weights on their way through the gateway, sealed: nobody here can open them."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from contextlib import aclosing
from pathlib import Path

from cortex_common.clock import Clock
from cortex_common.errors import CortexError, InvalidArgumentError, UnavailableError
from cortex_common.logging import get_logger
from cortex_common.network import messages as m
from cortex_common.network.work import Assignment
from cortex_common.storage.checked import from_checked_json, to_checked_json
from cortex_common.storage.durable import write_durably
from cortex_common.transfer import HeaderFrame, TrailerFrame, frame_from_bytes
from services.gateway.relay import NodeRelay, Push
from services.gateway.websocket.socket import NodeSocket

log = get_logger(__name__)

WINDOW = 4
"""Frames of an update that a node may have on their way: what the gateway holds for it at most."""
_REMEMBERED = 10_000
_KEEP_EVERY_S = 1.0
_Place = tuple[str, str]
"""Node and job."""
_Server = tuple[str, str]
"""Address and name of an aggregator."""


class Addresses:
    """Which aggregator a node exchanges a job's weights with, as its assignments said last.

    Kept in a file, if there is to be one: of a job that has ended nobody has an assignment, and yet its nodes ask how
    it ended and fetch its model, also from a gateway that was started again meanwhile.
    """

    def __init__(self, kept: Path | None = None) -> None:
        """Read what was kept before; a damaged file costs what it held."""
        self._kept = kept
        self._known = OrderedDict(_read(kept)) if kept is not None else OrderedDict[_Place, _Server]()
        self._news = asyncio.Event()

    def learn(self, node: str, assignment: Assignment) -> None:
        """Remember where an assignment sends its node."""
        server = (assignment.aggregator_address, assignment.aggregator)
        for job_id in {str(assignment.job_id), str(assignment.transfer_id)}:
            if self._known.get((node, job_id)) != server:
                self._known[node, job_id] = server
                self._news.set()
            self._known.move_to_end((node, job_id))
        while len(self._known) > _REMEMBERED:
            self._known.popitem(last=False)

    async def keep(self, clock: Clock) -> None:
        """Write down what is new, not oftener than once a second, for ever: what a kill loses is soon told again."""
        while self._kept is not None:
            await self._news.wait()
            self._news.clear()
            places = [[*place, *server] for place, server in self._known.items()]
            try:
                await asyncio.to_thread(write_durably, self._kept, to_checked_json({"places": places}), 0o600)
            except (CortexError, OSError) as error:
                log.warning("addresses_not_kept", path=str(self._kept), reason=str(error))
                self._news.set()
            await clock.sleep(_KEEP_EVERY_S)

    def of(self, node: str, job_id: str) -> tuple[str, str]:
        """host:port and name.

        Raises:
            UnavailableError: no assignment named it yet.
        """
        found = self._known.get((node, job_id))
        if found is None:
            raise UnavailableError(f"node {node!r} has no assignment of job {job_id!r} here yet; retry")
        return found


def _read(path: Path) -> list[tuple[_Place, _Server]]:
    try:
        places = from_checked_json(path.read_bytes())["places"]
        return [((str(node), str(job)), (str(address), str(name))) for node, job, address, name in places]
    except FileNotFoundError:
        return []
    except (CortexError, OSError, ValueError, KeyError, TypeError) as error:
        log.warning("addresses_not_readable", path=str(path), reason=str(error))
        return []


class Upload:
    """One update being passed on, from its WEIGHTS_UPDATE to its receipt."""

    def __init__(self, ref: int, socket: NodeSocket) -> None:
        self.ref = ref
        self._socket = socket
        self._frames: asyncio.Queue[bytes] = asyncio.Queue()
        self._passed_on = 0
        self._taken = 0

    def take(self, frame: bytes) -> None:
        """The next frame of it.

        Raises:
            InvalidArgumentError: more than the window allows.
        """
        self._taken += 1
        if self._taken - self._passed_on > WINDOW:
            raise InvalidArgumentError(f"more than {WINDOW} frames of an update without their WEIGHTS_ACK")
        self._frames.put_nowait(frame)

    async def run(self, relay: NodeRelay, addresses: Addresses) -> None:
        """Pass it on until it is accepted.

        Raises:
            CortexError: it is not; says why.
        """
        header = await self._frames.get()
        frame = frame_from_bytes(header)
        if not isinstance(frame, HeaderFrame):
            raise InvalidArgumentError("an upload begins with its header")
        push = relay.push(*addresses.of(relay.hello.node, frame.header.job_id))
        passing = asyncio.create_task(self._pass_on(push, header))
        try:
            resume = await push.answer()
            await self._socket.send(resume, self.ref)
            accepted = asyncio.create_task(push.answer())
            try:
                await asyncio.wait((passing, accepted), return_when=asyncio.FIRST_COMPLETED)
                if not accepted.done():
                    passing.result()  # raises what is wrong with a frame; the aggregator never hears of that one
                await self._socket.send(await accepted, self.ref)
            finally:
                accepted.cancel()
        finally:
            passing.cancel()
            push.cancel()

    async def _pass_on(self, push: Push, frame: bytes) -> None:
        """Frames in order, each acknowledged once there is room for another; what the aggregator says is read apart."""
        is_last = False
        while await push.send(frame):
            self._passed_on += 1
            await self._socket.send(m.WeightsAck(self._passed_on), self.ref)
            if is_last:
                await push.finish()
                return
            frame = await self._frames.get()
            is_last = isinstance(frame_from_bytes(frame), TrailerFrame)


async def send_version(pull: m.ModelPull, relay: NodeRelay, addresses: Addresses, socket: NodeSocket) -> None:
    """Send a version as it comes; no faster than the node reads.

    Raises:
        CortexError: there is no such version, or the aggregator is away.
    """
    address, aggregator = addresses.of(relay.hello.node, pull.job_id)
    async with aclosing(relay.pull(address, aggregator, pull)) as frames:
        async for frame in frames:
            await socket.send_frame(frame)
