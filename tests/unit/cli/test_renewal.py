"""A person's own certificate, renewed by the command when it is used."""

from __future__ import annotations

from pathlib import Path

import pytest

from cortex.connection import Connection
from cortex.renewal import renew_if_due
from cortex_common.identity import Identity, Role
from cortex_common.ids import NodeName
from cortex_common.security.authority import Authority
from cortex_common.security.certificates import certificate_of
from tests.fakes import ManualClock

ANN = Identity("cortex", Role.OPERATOR, NodeName("ann"))


@pytest.mark.parametrize("is_writable", [True, False])
def test_a_certificate_that_cannot_be_renewed_is_told_and_used_all_the_same(
    authority: Authority, tmp_path: Path, is_writable: bool
) -> None:
    """For want of a discovery, or of a place to write: until it ends, it is good for every command."""
    tls = authority.issue(ANN, [], tmp_path)
    (tmp_path / "enrolment.json").write_text("{}")
    if not is_writable:
        (tmp_path / ".renewal.lock").mkdir()
    clock = ManualClock(wall_s=certificate_of(tls).not_after.timestamp() - 60)
    told: list[str] = []

    assert not renew_if_due(Connection("127.0.0.1:1", "127.0.0.1:1", tls, "a test"), told.append, clock)

    assert len(told) == 1
    assert told[0].startswith("your certificate could not be renewed: ")
