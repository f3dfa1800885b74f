from __future__ import annotations

import os
import signal
import threading

import pytest

from cortex.cli.interrupt import Interrupt


@pytest.fixture(autouse=True)
def signals_are_heeded():
    """A shell that runs the tests in the background has them start with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_items_of_another_thread_come_in_order_and_end():
    with Interrupt() as interrupt:
        assert list(interrupt.read(lambda put: [put(n) for n in range(3)] and None)) == [0, 1, 2]


def test_an_error_of_the_other_thread_is_raised_here():
    def produce(put):
        put(1)
        raise LookupError("gone")

    with Interrupt() as interrupt:
        items = interrupt.read(produce)
        assert next(items) == 1
        with pytest.raises(LookupError, match="gone"):
            next(items)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_reading_where_it_waits(number):
    ended = threading.Event()

    def produce(put):
        put(1)
        os.kill(os.getpid(), number)
        try:
            while True:
                put(2)
        finally:
            ended.set()

    with Interrupt() as interrupt, pytest.raises(KeyboardInterrupt):
        for _ in interrupt.read(produce):
            pass
    assert ended.wait(5)


def test_a_signal_is_noted_until_it_is_asked_for_and_a_second_one_comes_at_once():
    with Interrupt() as interrupt:
        interrupt.check()
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            interrupt.check()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_handlers_are_put_back():
    before = signal.getsignal(signal.SIGTERM)

    with Interrupt():
        assert signal.getsignal(signal.SIGTERM) != before

    assert signal.getsignal(signal.SIGTERM) == before
