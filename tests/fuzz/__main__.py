"""`make fuzz`: every decoder on a million inputs each, mutated, made by hypothesis, or guided by coverage (atheris).

python -m tests.fuzz [NAME …] [--inputs N] [--seconds S] [--seed N] [--engine mutation|hypothesis|atheris]
"""

from __future__ import annotations

import argparse
import os
import sys
import time

from tests.fuzz.harness import CORPUS, MORE_MEMORY_BYTES, FoundError, Ran, check_one, corpus, kept, run
from tests.fuzz.targets import TARGETS


def main() -> int:
    """1 if something was found."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"out of {', '.join(TARGETS)}; all by default")
    parser.add_argument("--inputs", type=int, default=1_000_000, help="for each decoder")
    parser.add_argument("--seconds", type=int, default=0, help="for each decoder at most; 0: no limit; not hypothesis")
    parser.add_argument("--seed", type=int, default=0, help="0: another one each time")
    parser.add_argument("--engine", choices=["mutation", "hypothesis", "atheris"], default="mutation")
    given = parser.parse_args()
    if unknown := set(given.names) - set(TARGETS):
        parser.error(f"no decoder is called {', '.join(sorted(unknown))}; there are: {', '.join(TARGETS)}")
    if given.seconds and given.engine == "hypothesis":
        parser.error("--seconds is not for hypothesis; allowed: --inputs")
    engine = {"mutation": mutated, "hypothesis": by_hypothesis, "atheris": by_atheris}[given.engine]
    seed = given.seed or int.from_bytes(os.urandom(4))
    print(f"{given.engine}, {given.inputs} inputs each, seed {seed}", flush=True)
    return max([engine(name, given.inputs, seed, given.seconds) for name in given.names or TARGETS])


def mutated(name: str, inputs: int, seed: int, seconds: int) -> int:
    """Seeds and corpus, changed at random."""
    try:
        ran = run(name, TARGETS[name], inputs, seed, seconds or float("inf"))
    except FoundError as finding:
        return told(name, finding)
    if ran.grown_bytes > MORE_MEMORY_BYTES // 2:
        print(f"{name:16} MEMORY grew by {ran.grown_bytes >> 20} MiB", flush=True)
        return 1
    return passed(name, ran)


def by_hypothesis(name: str, inputs: int, seed: int, _seconds: int) -> int:
    """Bytes as hypothesis makes them, which also makes a finding small."""
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis import seed as seeded
    from hypothesis import strategies as st

    target, ran, pool = TARGETS[name], Ran(), [*corpus(name), *TARGETS[name].seeds()]
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
        ran.refused += check_one(target, data, ran)
        ran.inputs += 1

    started_s = time.perf_counter()
    try:
        decodes()
    except FoundError as finding:
        return told(name, finding)
    ran.seconds = time.perf_counter() - started_s
    return passed(name, ran)


def by_atheris(name: str, inputs: int, seed: int, seconds: int) -> int:
    """Inputs that reach new code are kept and changed further; a decoder a process, since libFuzzer ends with it."""
    pid = os.fork()
    if pid:
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        print(f"{name:16} {'nothing found' if code == 0 else 'FOUND, see above'}", flush=True)
        return int(code != 0)
    try:
        import atheris
    except ImportError:
        print("atheris is not installed: pip install 'atheris>=3' (it is not in the dev extra)", flush=True)
        os._exit(1)
    target, grown = TARGETS[name], CORPUS.parent / ".grown" / name
    grown.mkdir(parents=True, exist_ok=True)
    for number, data in enumerate(target.seeds()):
        (grown / f"seed-{number}").write_bytes(data)
    atheris.instrument_all()

    def one(data: bytes) -> None:
        check_one(target, data, Ran())

    limits = [f"-runs={inputs}", f"-max_total_time={seconds}", f"-seed={seed}", "-timeout=5", "-rss_limit_mb=4096"]
    limits += ["-max_len=65536", "-verbosity=0", "-print_final_stats=1"]
    folders = [str(grown), *([str(CORPUS / name)] if (CORPUS / name).is_dir() else [])]
    atheris.Setup([sys.argv[0], *limits, f"-artifact_prefix={grown}/", *folders], one)
    atheris.Fuzz()
    os._exit(0)


def told(name: str, finding: FoundError) -> int:
    """Say what was found, and keep the input."""
    print(f"{name:16} FOUND {finding}\n{'':16} kept as {kept(name, finding.data)}", flush=True)
    return 1


def passed(name: str, ran: Ran) -> int:
    """Say what the run came to."""
    rate = ran.inputs / max(ran.seconds, 1e-9)
    print(
        f"{name:16} {ran.inputs:9} inputs {ran.refused:9} refused {rate:9.0f}/s, slowest {ran.slowest_s * 1e3:.1f} ms, "
        f"memory +{ran.grown_bytes >> 20} MiB",
        flush=True,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
