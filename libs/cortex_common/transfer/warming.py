"""Fast loops for the codecs that jobs really use, compiled in the background."""

from __future__ import annotations

import asyncio

from cortex_common.codec import WeightCompressor, warm_up
from cortex_common.logging import get_logger

_log = get_logger(__name__)


class CodecWarmer:
    """Has each codec compiled once in this process; until that is done the slower loops give the same bytes."""

    def __init__(self) -> None:
        self._wanted: set[tuple[str, str]] = set()
        self._running: set[asyncio.Task[None]] = set()

    def want(self, codec: WeightCompressor) -> None:
        """Compile its loops in the background; plain float32 is copied, not computed, and gains nothing by it."""
        key = (codec.codec, codec.options_json)
        if key in self._wanted or not codec.quantiser.lossy:
            return
        self._wanted.add(key)
        task = asyncio.get_running_loop().create_task(self._warm(codec))
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def _warm(self, codec: WeightCompressor) -> None:
        done = await asyncio.to_thread(warm_up, codec)
        if done.compiled:
            _log.info("codec_compiled", codec=codec.codec, options=codec.options_json)
        for name, reason in done.refused.items():
            _log.warning("codec_not_compiled", codec=name, reason=reason)
