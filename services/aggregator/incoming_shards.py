"""The shards of data sets that are on their way in, in one folder."""

from __future__ import annotations

from collections.abc import Container
from pathlib import Path

from cortex_common.clock import Clock
from cortex_common.errors import CorruptError
from cortex_common.logging import get_logger
from cortex_common.security.objects import ObjectHeader
from cortex_common.security.shards import sealed_bytes
from cortex_common.storage.durable import make_directory, require_room
from services.aggregator.shard_spool import JOURNAL, SEALED, ShardSpool

log = get_logger(__name__)


class IncomingShards:
    """Unfinished shards by digest; methods that touch the disk block.

    Args:
        folder: On a local disk, where finished shards may be linked from.
        reserve_bytes: Must stay free there.
        life_s: A shard that nobody has gone on with for so long is old.
        clock: Tells the age of files.
    """

    def __init__(self, folder: Path, reserve_bytes: int, life_s: float, clock: Clock) -> None:
        make_directory(folder)
        self._folder = folder
        self._reserve_bytes = reserve_bytes
        self._life_s = life_s
        self._clock = clock
        self._spools: dict[str, ShardSpool] = {}

    def load(self, finished: Container[str]) -> None:
        """Take up what earlier processes left; what is old, finished or not readable is removed."""
        for path in sorted(self._folder.glob(f"*{JOURNAL}")):
            self._take_up(path.stem)
        for sha256 in list(self._spools):
            if sha256 in finished:
                self.erase(sha256)
            self.erase_if_old(sha256)
        for path in self._folder.glob(f"*{SEALED}"):
            if path.stem not in self._spools:
                path.unlink()

    def find(self, header: ObjectHeader) -> ShardSpool | None:
        """What has come of a shard under just this header."""
        spool = self._spools.get(header.model_sha256)
        return spool if spool is not None and spool.header == header else None

    def open(self, header: ObjectHeader) -> ShardSpool:
        """What has come of a shard, proven, or its beginning; what came under another header is removed.

        Raises:
            OverloadedError: there is no room for the rest.
        """
        spool = self.find(header)
        if spool is not None:
            spool.prove()
        rest_bytes = sealed_bytes(header, header.chunks) - (spool.size_bytes if spool else 0)
        require_room(self._folder, rest_bytes, self._reserve_bytes)
        if spool is None:
            self.erase(header.model_sha256)
            spool = self._spools[header.model_sha256] = ShardSpool.start(self._folder, header)
        return spool

    def erase(self, sha256: str) -> bool:
        """Remove what has come of a shard; False if that is nothing."""
        spool = self._spools.pop(sha256, None)
        if spool is not None:
            spool.erase()
        return spool is not None

    def erase_if_old(self, sha256: str) -> None:
        """Remove what has come of a shard that nobody has gone on with for its life."""
        if sha256 in self.old():
            log.info("unfinished_shard_removed", sha256=sha256, reason=f"nobody went on with it for {self._life_s:g} s")
            self.erase(sha256)

    def old(self) -> list[str]:
        """Shards that nobody has gone on with for their life."""
        limit_s = self._clock.wall_s() - self._life_s
        return [sha256 for sha256, spool in list(self._spools.items()) if spool.changed_s < limit_s]

    def __contains__(self, sha256: str) -> bool:
        return sha256 in self._spools

    def _take_up(self, sha256: str) -> None:
        try:
            self._spools[sha256] = ShardSpool.load(self._folder, sha256)
        except CorruptError as error:
            log.error("unfinished_shard_removed", sha256=sha256, reason=error.message)
            (self._folder / f"{sha256}{JOURNAL}").unlink()
