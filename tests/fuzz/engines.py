"""Who makes the inputs: a mutator of our own, hypothesis, or atheris (libFuzzer), guided by what code they reach."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st

from tests.fuzz.harness import (
    HANG_S,
    FoundError,
    Ran,
    bounded,
    check_one,
    corpus,
    run,
)
from tests.fuzz.target import Target

# What hypothesis remembers of its inputs goes with each batch.
_BATCH = 2000


@dataclass(frozen=True)
class Wanted:
    """How much, for each decoder; `seed` repeats a run of the same length."""

    inputs: int
    seed: int
    within_s: float = float("inf")


def mutated(name: str, target: Target, wanted: Wanted) -> Ran:
    """Seeds and corpus, changed at random."""
    return run(name, target, wanted.inputs, wanted.seed, wanted.within_s)


def by_hypothesis(name: str, target: Target, wanted: Wanted) -> Ran:
    """Bytes as hypothesis makes them, which also makes a finding small."""
    ran, pool, started_s = Ran(), [*corpus(name), *target.seeds()], time.perf_counter()
    with bounded(ran, HANG_S):
        for number in range(0, wanted.inputs, _BATCH):
            _batch(target, pool, min(_BATCH, wanted.inputs - number), wanted.seed + number, ran)
            if time.perf_counter() - started_s > wanted.within_s:
                break
    ran.end(time.perf_counter() - started_s)
    return ran


def _batch(target: Target, pool: list[bytes], inputs: int, seed: int, ran: Ran) -> None:
    spliced = st.tuples(st.sampled_from(pool), st.integers(0, 1 << 16), st.integers(0, 64), st.binary(max_size=64)).map(
        lambda parts: parts[0][: parts[1]] + parts[3] + parts[0][parts[1] + parts[2] :]
    )

    @seeded(seed)
    @settings(
        max_examples=inputs,
        deadline=None,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.one_of(st.binary(max_size=512), spliced))
    def decodes(data: bytes) -> None:
        ran.begin(data)
        ran.refused += check_one(target, data, ran)

    decodes()


def has_atheris() -> bool:
    return find_spec("atheris") is not None


def by_atheris(name: str, target: Target, wanted: Wanted) -> Ran:
    """Inputs that reach new code are kept and changed further; in another process, see `guided`."""
    limits = [f"-runs={wanted.inputs}", f"-seed={wanted.seed}"]
    if wanted.within_s < float("inf"):
        limits.append(f"-max_total_time={wanted.within_s:.0f}")
    started_s = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="cortex-fuzz-") as scratch:
        command = [sys.executable, "-W", "ignore", "-m", "tests.fuzz.guided", name, scratch, *limits]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
        text = done.stdout + done.stderr
        if done.returncode:
            data = b"".join(path.read_bytes() for path in Path(scratch).glob("found-*"))
            raise FoundError(data, f"atheris ended with {done.returncode}: {text[-4000:]}")
    grown_mb = _stat(text, "peak_rss_mb") - _stat(text, "started_rss_mb")
    seconds = time.perf_counter() - started_s
    return Ran(_stat(text, "number_of_executed_units"), seconds=seconds, grown_bytes=max(0, grown_mb << 20))


def _stat(text: str, name: str) -> int:
    [value] = re.findall(rf"stat::{name}:\s*(\d+)", text)
    return int(value)


Engine = Callable[[str, Target, Wanted], Ran]
ENGINES: dict[str, Engine] = {"mutation": mutated, "hypothesis": by_hypothesis, "atheris": by_atheris}
