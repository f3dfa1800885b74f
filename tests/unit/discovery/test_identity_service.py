"""The identity authority: it goes on while the root's key is away, and no member can keep it from the others."""

from __future__ import annotations

import asyncio
import datetime as dt
from pathlib import Path

import pytest

from cortex_common.clock import SystemClock
from cortex_common.errors import OverloadedError, UnauthenticatedError
from cortex_common.identity import Identity, Role, TlsFiles
from cortex_common.ids import NodeName
from cortex_common.security.authority import Authority, Lives
from cortex_common.security.certificates import certificate_of
from cortex_common.security.issuing import make_request
from services.discovery.admission import NodeAdmission
from services.discovery.identity_service import IdentityAuthority
from services.discovery.identity_store import MemoryIdentityStore
from tests.fakes import ManualClock

EVE = Identity("cortex", Role.WORKER, NodeName("eve"))
BOB = Identity("cortex", Role.WORKER, NodeName("bob"))
OWN = Identity("cortex", Role.DISCOVERY, NodeName("d1"))
HALF_A_DAY_S = 43_200.0
MAX_CERTIFICATES = 100


def service_of(folder: Path, clock: ManualClock, authority: Authority) -> IdentityAuthority:
    """Over an authority, with a certificate of discovery's own that was made just now."""
    own = authority.issue(OWN, [], folder / "own")
    return IdentityAuthority(
        "cortex", MemoryIdentityStore(), authority, Lives(), clock, lambda _: (EVE, BOB), (own, ("localhost",))
    )


@pytest.fixture
def now_clock() -> ManualClock:
    """Stands at the time at which the authority, which has the machine's clock, makes certificates."""
    return ManualClock(wall_s=SystemClock().wall_s())


async def test_while_the_roots_key_is_away_discovery_renews_its_own_certificate(
    tmp_path: Path, now_clock: ManualClock
) -> None:
    folder = tmp_path / "authority"
    folder.mkdir()
    authority = Authority("cortex", folder)
    # The issuing authority is due for replacement since a week, and good for five more.
    authority.rotate(Lives(), dt.datetime.now(dt.UTC) - dt.timedelta(days=52))
    authority.key.rename(tmp_path / "kept-elsewhere.key")
    service = service_of(tmp_path, now_clock, authority)
    own = TlsFiles(*(tmp_path / "own" / name for name in ("ca.pem", "tls.crt", "tls.key")))
    before = certificate_of(own)
    now_clock.jump_wall(HALF_A_DAY_S + 3600)

    advancing = asyncio.create_task(service.advance_forever(lambda *_: None))
    async with asyncio.timeout(30):
        await now_clock.until_sleeping()

    assert certificate_of(own).serial != before.serial
    assert (await service.renew(EVE, make_request("eve")[1], [])).certificate
    advancing.cancel()


async def test_who_renews_without_end_is_stopped_and_can_be_shut_out(tmp_path: Path, now_clock: ManualClock) -> None:
    service = service_of(tmp_path, now_clock, Authority.create("cortex", tmp_path / "authority"))
    csr = make_request("eve")[1]
    for _ in range(MAX_CERTIFICATES):
        await service.renew(EVE, csr, [])

    with pytest.raises(OverloadedError, match=r"worker/eve has 100 certificates that have not ended; allowed: 100"):
        await service.renew(EVE, csr, [])

    await service.renew(BOB, csr, [])
    await service.revoke("eve", None, "floods", OWN)
    with pytest.raises((UnauthenticatedError, OverloadedError)):
        await service.renew(EVE, csr, [])


async def test_certificates_that_have_ended_do_not_count(tmp_path: Path, now_clock: ManualClock) -> None:
    service = service_of(tmp_path, now_clock, Authority.create("cortex", tmp_path / "authority"))
    csr = make_request("eve")[1]
    for _ in range(MAX_CERTIFICATES):
        await service.renew(EVE, csr, [])
    now_clock.jump_wall(2 * HALF_A_DAY_S + 60)
    await service.change(lambda state: (state, None))
    await service.renew(EVE, csr, [])


def test_challenges_that_nobody_answers_keep_no_node_out(tmp_path: Path, now_clock: ManualClock) -> None:
    """Whoever opens connections to a gateway, without any token, has a challenge made for each."""
    service = service_of(tmp_path, now_clock, Authority.create("cortex", tmp_path / "authority"))
    own = TlsFiles(*(tmp_path / "own" / name for name in ("ca.pem", "tls.crt", "tls.key")))
    admission = NodeAdmission("cortex", service, own, 300.0, now_clock)
    gateway = Identity("cortex", Role.GATEWAY, NodeName("g1"))
    made = [admission.challenge(gateway) for _ in range(20_000)]
    assert len(set(made)) == 20_000
