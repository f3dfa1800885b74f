"""Runs a decoder on many inputs: nothing but its documented errors, nothing slow, no memory without bound."""

from __future__ import annotations

import hashlib
import random
import resource
import signal
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from tests.fuzz.mutation import mutations
from tests.fuzz.targets import Target

CORPUS = Path(__file__).parent / "corpus"
SLOW_S = 1.0
HANG_S = 5.0
# No decoder needs more than this beyond what the process has; inputs are 64 KiB.
MORE_MEMORY_BYTES = 256 << 20
_WARM = 100


class FoundError(AssertionError):
    """An input that a decoder does not take as it should."""

    def __init__(self, data: bytes, what: str) -> None:
        super().__init__(f"{what}; input of {len(data)} bytes: {data[:120]!r}")
        self.data = data


@dataclass
class Ran:
    """What a run came to."""

    inputs: int = 0
    refused: int = 0
    seconds: float = 0.0
    slowest_s: float = 0.0
    grown_bytes: int = 0
    data: bytes = b""
    _before: int = 0

    def begin(self, data: bytes) -> None:
        """The next input; what is needed once is needed within the first hundred."""
        self.data = data
        self.inputs += 1
        if self.inputs == _WARM:
            self._before = memory_bytes()

    def end(self, seconds: float) -> None:
        """Note how long it took, and by how much memory has grown."""
        self.seconds = seconds
        self.grown_bytes = max(0, memory_bytes() - self._before) if self._before else 0


def corpus(name: str) -> list[bytes]:
    """Inputs kept in the repository: what once was a finding, and what is hard to come by."""
    return [path.read_bytes() for path in sorted((CORPUS / name).glob("*"))]


def run(name: str, target: Target, inputs: int, seed: int, within_s: float = float("inf")) -> Ran:
    """Decode the corpus, the seeds, and mutations of both.

    Raises:
        FoundError: an error that is not documented, a hang, or memory without bound.
    """
    made = mutations([*corpus(name), *target.seeds()], random.Random(seed))
    return check(target, islice(made, inputs), within_s)


def check(target: Target, inputs: Iterable[bytes], within_s: float = float("inf"), hang_s: float = HANG_S) -> Ran:
    """Decode these inputs, as long as there is time."""
    ran, started_s = Ran(), time.perf_counter()
    with bounded(ran, hang_s):
        for data in inputs:
            ran.begin(data)
            ran.refused += check_one(target, data, ran)
            if ran.inputs % 64 == 0 and time.perf_counter() - started_s > within_s:
                break
    ran.end(time.perf_counter() - started_s)
    return ran


def check_one(target: Target, data: bytes, ran: Ran) -> bool:
    """Decode one input; whether it was refused."""
    started_s, refused = time.process_time(), False
    try:
        target.decode(data)
    except target.allowed:
        refused = True
    except FoundError:
        raise
    except Exception as error:
        raise FoundError(data, f"{type(error).__name__} escaped: {str(error)[:200]}") from error
    # CPU time: the machine may be busy with something else.
    seconds = time.process_time() - started_s
    ran.slowest_s = max(ran.slowest_s, seconds)
    if seconds > SLOW_S:
        raise FoundError(data, f"took {seconds:.1f} s of CPU time")
    return refused


@contextmanager
def bounded(ran: Ran, hang_s: float) -> Iterator[None]:
    """Within the block, an input that goes on without end, or takes memory without bound, is an error.

    Each is to `ran.begin` there.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    last = -1

    def tick(*_: object) -> None:
        nonlocal last
        if ran.inputs == last:
            raise FoundError(ran.data, f"does not end within {hang_s:g} s of CPU time")
        last = ran.inputs

    before = signal.signal(signal.SIGVTALRM, tick)
    signal.setitimer(signal.ITIMER_VIRTUAL, hang_s, hang_s)
    resource.setrlimit(resource.RLIMIT_AS, (size + MORE_MEMORY_BYTES, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def memory_bytes() -> int:
    """The most that this process has ever held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def kept(name: str, data: bytes) -> Path:
    """Write a finding into the corpus, so that it is tried first from now on."""
    path = CORPUS / name / f"found-{hashlib.sha256(data).hexdigest()[:12]}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path
