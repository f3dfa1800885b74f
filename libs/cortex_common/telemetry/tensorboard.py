"""TensorBoard scalars without torch or TensorFlow."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from cortex_common.clock import Clock, SystemClock


class ScalarLog:
    """Scalars of one run in a directory that `tensorboard --logdir` reads."""

    def __init__(self, directory: Path, clock: Clock | None = None) -> None:
        self._clock = clock or SystemClock()
        self._writer = EventFileWriter(str(directory))

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Add one value a name at `step`, on disk when this returns."""
        values = [Summary.Value(tag=name, simple_value=value) for name, value in scalars.items()]
        event = Event(wall_time=self._clock.wall_s(), step=step, summary=Summary(value=values))
        self._writer.add_event(event)
        self._writer.flush()

    def close(self) -> None:
        """Finish the file."""
        self._writer.close()
