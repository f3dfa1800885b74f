"""A short run of every fuzzer; `make fuzz` makes long ones."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cortex_common.errors import InvalidArgumentError
from tests.fuzz.__main__ import in_processes
from tests.fuzz.engines import Wanted, by_hypothesis
from tests.fuzz.harness import FoundError, Ran, check, check_one, corpus, run
from tests.fuzz.targets import TARGETS, Target

INPUTS, WITHIN_S = 3000, 0.5


@pytest.mark.filterwarnings("ignore:Parsed a serial number")
@pytest.mark.parametrize("name", TARGETS)
def test_a_decoder_takes_anything(name: str) -> None:
    # Another seed in each run: what one run does not find, another may, and the message holds the input.
    ran = run(name, TARGETS[name], INPUTS, seed=time.time_ns(), within_s=WITHIN_S)
    assert ran.inputs > len(corpus(name))
    assert ran.refused < ran.inputs, "good input is taken"


@pytest.mark.filterwarnings("ignore:Parsed a serial number")
@settings(max_examples=300, suppress_health_check=list(HealthCheck))
@given(name=st.sampled_from(sorted(TARGETS)), data=st.binary(max_size=300))
def test_a_decoder_takes_any_bytes(name: str, data: bytes) -> None:
    check_one(TARGETS[name], data, Ran())


def _raises(data: bytes) -> None:
    raise KeyError("not documented")


def _refuses(data: bytes) -> None:
    raise InvalidArgumentError("documented")


def _hangs(data: bytes) -> None:
    while True:
        pass


def _slow(data: bytes) -> None:
    started_s = time.process_time()
    while time.process_time() < started_s + 1.1:
        pass


def _grows(data: bytes) -> None:
    bytearray(2 << 30)


@pytest.mark.parametrize(
    ("decode", "what"),
    [
        (_raises, "KeyError escaped"),
        (_slow, "s of CPU time"),
        (_hangs, "does not end"),
        (_grows, "MemoryError esc"),
    ],
)
def test_the_harness_finds_what_is_wrong(decode: object, what: str) -> None:
    target = Target(decode, (InvalidArgumentError,), lambda: [b"x"])  # type: ignore[arg-type]
    with pytest.raises(FoundError, match=what) as caught:
        check(target, [b"x"], hang_s=0.5 if decode is _hangs else 5.0)
    assert caught.value.data == b"x"


@pytest.mark.parametrize(("decode", "what"), [(_raises, "KeyError escaped"), (_grows, "MemoryError esc")])
def test_hypothesis_finds_it_too(decode: Callable[[bytes], object], what: str) -> None:
    with pytest.raises(FoundError, match=what):
        by_hypothesis("none", Target(decode, (InvalidArgumentError,), lambda: [b"x"]), Wanted(100, 1))


def test_a_decoder_that_ends_its_process_is_a_finding(capfd: pytest.CaptureFixture[str]) -> None:
    assert in_processes(_survives, [("a", "good"), ("another", "good")], 2)
    assert not in_processes(_survives, [("a", "good"), ("the", "crash"), ("another", "good")], 2)
    assert "the crash CRASHED by signal 9" in capfd.readouterr().out
    assert not in_processes(_survives, [("a", "bad")], 2)


def _survives(_article: str, noun: str) -> bool:
    if noun == "crash":
        os.kill(os.getpid(), signal.SIGKILL)
    return noun == "good"


def test_a_documented_error_is_no_finding() -> None:
    ran = check(Target(_refuses, (InvalidArgumentError,), lambda: [b"x"]), [b"x"] * 10)
    assert (ran.inputs, ran.refused) == (10, 10)
