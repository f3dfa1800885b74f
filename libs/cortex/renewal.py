"""A person's own certificate, renewed when it is used: people run no service that would do it."""

from __future__ import annotations

import asyncio
import fcntl
from collections.abc import Callable

from cortex.connection import Connection
from cortex_common.clock import Clock, SystemClock
from cortex_common.errors import CortexError
from cortex_common.identity import TlsFiles
from cortex_common.network.enrolment import is_enrolled, renew
from cortex_common.security.certificates import certificate_of


def renew_if_due(connection: Connection, on_trouble: Callable[[str], None], clock: Clock | None = None) -> bool:
    """Renew a certificate that came by enrolment and is in the second half of its life; whether that was done.

    One program at a time does it. The operator's certificate of a local network is kept by `cortex up`. Where it
    cannot be done, for want of a discovery or of the right to write, `on_trouble` is told: it is good for a while yet.
    """
    clock = clock or SystemClock()
    if connection.directory is not None or not is_enrolled(connection.tls) or not _is_due(connection.tls, clock):
        return False
    try:
        with connection.tls.key.with_name(".renewal.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not _is_due(connection.tls, clock):
                return False
            asyncio.run(renew(connection.tls, connection.discovery, clock))
    except (CortexError, OSError) as error:
        on_trouble(f"your certificate could not be renewed: {error}")
        return False
    return True


def _is_due(tls: TlsFiles, clock: Clock) -> bool:
    certificate = certificate_of(tls)
    return 0 < certificate.seconds_left(clock.wall_s()) < certificate.life_s / 2
