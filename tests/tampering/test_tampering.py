"""Nothing that was stored or sent is ever taken for something else: whatever is changed in it is refused.

10,000 pieces of damage by default; `make tamper` and CI do 100,000.
"""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from cortex_common.identity import Role, TlsFiles
from tests.tampering.damage import Subject, tamper
from tests.tampering.kept import everything_kept
from tests.tampering.sent import everything_sent
from tests.tampering.signed import everything_signed
from tests.tampering.stored import everything_stored

TIMES = int(os.environ.get("TAMPERINGS", "10000"))


@pytest.fixture
def run() -> Iterator[Callable[[Any], Any]]:
    """Runs coroutines on one loop."""
    with asyncio.Runner() as runner:
        yield runner.run


@pytest.fixture
def subjects(tmp_path: Path, tls_of: Callable[..., TlsFiles], run: Callable[[Any], Any]) -> list[Subject]:
    stored = everything_stored(tmp_path / "stored", tls_of(Role.COORDINATOR))
    kept, signed = everything_kept(tmp_path / "kept"), everything_signed(tmp_path / "signed")
    return [*everything_sent(tmp_path / "sent", run), *stored, *kept, *signed]


@pytest.mark.timeout(900)
def test_no_damage_is_believed(subjects: list[Subject], capsys: pytest.CaptureFixture[str]) -> None:
    kinds: Counter[str] = Counter()
    lines, believed, total = [], [], 0
    for index, subject in enumerate(subjects):
        times = TIMES // len(subjects) + (index < TIMES % len(subjects))
        with capture_logs():
            tally = tamper(subject, times, seed=index)
        kinds.update(kind for (kind, _), number in tally.outcomes.items() for _ in range(number))
        believed += [f"{subject.name}: {each}" for each in tally.believed]
        total += sum(tally.outcomes.values())
        refused, unharmed = tally.count("refused"), tally.count("unharmed")
        lines.append(f"{subject.name}: of {times} {refused} refused, {unharmed} unharmed")
        # Damage that changes nothing of what is read (a space, a hexadecimal letter in capitals) is rare.
        assert unharmed <= times // 4, lines[-1]
    with capsys.disabled():
        print("", *lines, f"{total}: {dict(kinds)}", sep="\n")
    assert not believed, "\n".join(believed[:20])
    assert total == TIMES
    assert len(kinds) == 6
