"""A node renews its certificate by itself, whatever happens to the files meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path

import pytest

from cortex_common.clock import SystemClock
from cortex_common.identity import Identity, Role, TlsFiles
from cortex_common.ids import NodeName
from cortex_common.network import enrolment
from cortex_common.network.enrolment import RENEWALS, keep_certificate
from cortex_common.security.authority import Authority
from tests.fakes import ManualClock
from tests.waiting import eventually

NOBODY = "127.0.0.1:9"
LIFE = timedelta(seconds=80)


class Recording(ManualClock):
    """Knows how long each sleep was to be."""

    def __init__(self) -> None:
        super().__init__(wall_s=SystemClock().wall_s())
        self.slept: list[float] = []

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        await super().sleep(seconds)


@pytest.fixture
def clock() -> Recording:
    return Recording()


@pytest.fixture
def tls(authority: Authority, tmp_path: Path) -> TlsFiles:
    return authority.issue(Identity("cortex", Role.WORKER, NodeName("w1")), [], tmp_path / "w1", life=LIFE)


@pytest.fixture
async def keeping(tls: TlsFiles, clock: Recording) -> AsyncIterator[asyncio.Task[None]]:
    task = asyncio.create_task(keep_certificate(tls, NOBODY, clock))
    yield task
    task.cancel()
    await asyncio.wait((task,))


def failed() -> float:
    return RENEWALS.labels("failed")._value.get()


async def test_nodes_renew_around_half_of_the_life_and_not_all_at_once(tls: TlsFiles, clock: Recording) -> None:
    tasks = [asyncio.create_task(keep_certificate(tls, NOBODY, clock)) for _ in range(40)]
    await clock.until_sleeping(40)
    for task in tasks:
        task.cancel()
    assert 0.4 * LIFE.total_seconds() - 5 < min(clock.slept)
    assert max(clock.slept) < 0.6 * LIFE.total_seconds()
    assert max(clock.slept) - min(clock.slept) > 5


@pytest.mark.parametrize("damage", ["not a certificate", None])
async def test_files_that_are_not_whole_for_a_while_end_nothing(
    tls: TlsFiles, clock: Recording, keeping: asyncio.Task[None], damage: str | None
) -> None:
    await clock.until_sleeping()
    sound, before = tls.certificate.read_bytes(), failed()
    tls.certificate.unlink()
    if damage is not None:
        tls.certificate.write_text(damage)
    await clock.advance(60)
    assert not keeping.done(), keeping
    assert failed() > before
    assert clock.sleepers == 1, "it is tried again, and not at once"
    tls.certificate.write_bytes(sound)
    before = failed()
    await clock.advance(60)
    await eventually(lambda: failed() > before)
    assert not keeping.done()


async def test_a_disk_that_takes_no_new_files_ends_nothing(
    clock: Recording, keeping: asyncio.Task[None], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(enrolment, "renew", full)
    await clock.until_sleeping()
    before = failed()
    await clock.advance(60)
    assert failed() > before
    assert not keeping.done()
