"""`make fuzz`: every decoder on a million inputs each: mutated, made by hypothesis, and guided by coverage (atheris).

python -m tests.fuzz [NAME …] [--engine mutation|hypothesis|atheris] [--inputs N] [--seconds S] [--seed N] [--jobs N]
"""

from __future__ import annotations

import argparse
import multiprocessing.connection
import os
import sys
import tempfile
from collections.abc import Callable, Iterable
from typing import Any

from tests.fuzz.engines import ENGINES, Wanted, has_atheris
from tests.fuzz.harness import MORE_MEMORY_BYTES, FoundError, kept
from tests.fuzz.targets import TARGETS

_FORK = multiprocessing.get_context("fork")


def main() -> int:
    """1 if something was found."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"out of {', '.join(TARGETS)}; all by default")
    parser.add_argument("--engine", choices=[*ENGINES], help="who makes the inputs; one after the other by default")
    parser.add_argument("--inputs", type=int, default=1_000_000, help="for each decoder and engine")
    parser.add_argument("--seconds", type=int, default=0, help="for each decoder and engine at most; 0: no limit")
    parser.add_argument("--seed", type=int, default=0, help="0: another one each time")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="decoders at a time")
    given = parser.parse_args()
    if unknown := set(given.names) - set(TARGETS):
        parser.error(f"no decoder is called {', '.join(sorted(unknown))}; there are: {', '.join(TARGETS)}")
    wanted = Wanted(given.inputs, given.seed or int.from_bytes(os.urandom(4)), given.seconds or float("inf"))
    engines = [given.engine] if given.engine else [*ENGINES]
    if "atheris" in engines and not has_atheris():
        print("!!! NOT RUN: atheris is not installed here (the extra `fuzz` has it)", file=sys.stderr, flush=True)
        engines.remove("atheris")
    print(f"{given.inputs} inputs each, seed {wanted.seed}", flush=True)
    tasks = [(engine, name, wanted) for engine in engines for name in given.names or TARGETS]
    with tempfile.TemporaryDirectory(prefix="cortex-fuzz-") as tempfile.tempdir:
        is_good = in_processes(fuzzed, tasks, given.jobs)
    return 0 if is_good and tasks else 1


def in_processes(task: Callable[..., bool], arguments: Iterable[tuple[Any, ...]], jobs: int) -> bool:
    """Whether every one of them ends well; each in a process of its own, so that its memory is, and a crash is seen."""
    running: list[multiprocessing.process.BaseProcess] = []
    is_good = True

    def ended() -> bool:
        multiprocessing.connection.wait([each.sentinel for each in running])
        done = [each for each in running if each.exitcode is not None]
        for each in done:
            running.remove(each)
            if each.exitcode and each.exitcode < 0:
                print(f"{each.name} CRASHED by signal {-each.exitcode}: the same seed repeats it", flush=True)
        return all(each.exitcode == 0 for each in done)

    for given in arguments:
        while len(running) >= jobs:
            is_good &= ended()
        name = " ".join(map(str, given[:2]))
        running.append(_FORK.Process(target=lambda given=given: sys.exit(not task(*given)), name=name))
        running[-1].start()
    while running:
        is_good &= ended()
    return is_good


def fuzzed(engine: str, name: str, wanted: Wanted) -> bool:
    """Whether nothing was found; says what the run came to, and keeps an input that was."""
    what = f"{engine:10} {name:16}"
    try:
        ran = ENGINES[engine](name, TARGETS[name], wanted)
    except FoundError as finding:
        print(f"{what} FOUND {finding}\n{'':27} kept as {kept(name, finding.data)}", flush=True)
        return False
    slowest = f", slowest {ran.slowest_s * 1e3:.1f} ms" if ran.slowest_s else ""
    memory = f"memory +{ran.grown_bytes >> 20} MiB"
    print(f"{what} {ran.inputs:9} inputs in {ran.seconds:6.0f} s{slowest}, {memory}", flush=True)
    return ran.grown_bytes <= MORE_MEMORY_BYTES


if __name__ == "__main__":
    sys.exit(main())
