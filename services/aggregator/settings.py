"""Settings of an aggregator."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from cortex_common.rpc.server import WINDOW_BYTES
from cortex_common.settings import Bandwidth, ServiceSettings


class AggregatorSettings(ServiceSettings):
    """What an aggregator needs to know beside what every service does."""

    discovery: str | None = None
    """host:port of discovery; None announces nothing."""
    max_model_bytes: int = Field(default=64 << 30, gt=0)
    """Largest model accepted, uncompressed."""
    max_seats: int = Field(default=10_000, gt=0)
    """Largest cohort of a round."""
    bandwidth: Bandwidth = Bandwidth()
    """Most that model versions take on the way out, and updates on the way in."""
    window_bytes: int = Field(default=WINDOW_BYTES, ge=64 << 10, le=64 << 20)
    """Of one upload on its way, most before its worker waits: the line's rate times its round trip, for full speed.

    Where 1 MiB is too little for far workers (40 Mbit/s at 200 ms), count it into the memory of each concurrent upload.
    """
    disk_reserve_bytes: int = Field(default=64 << 20, ge=0)
    """Bytes on the disk that uploads must leave free."""
    stream_idle_s: float = Field(default=30.0, gt=0)
    """An upload that sends nothing for so long is ended; it can be resumed."""
    forward_patience_s: float = Field(default=20.0, gt=0)
    """Forwarding a round is given up, to be asked for again, when nothing got through to the upper one for so long."""
    versions: str | None = None
    """Where model versions are kept: s3://bucket/prefix, this aggregator's own; a folder in `state_dir` by default."""
    shards: str | None = None
    """Where sealed shards of data sets are kept: s3://bucket/prefix, its own; a folder in `state_dir` by default."""
    unfinished_shard_life_s: float = Field(default=7 * 86400.0, gt=0)
    """What has come of a shard is removed when nobody has gone on with its upload for so long."""
    s3_endpoint: str | None = Field(default=None, pattern=r"^https?://")
    """URL of the object store; Amazon's by default."""
    s3_region: str | None = None
    """As the object store names it."""
    s3_key_file: Path | None = None
    """Holds the access key's id; by default what the machine offers is taken (AWS_* variables, instance roles)."""
    s3_secret_file: Path | None = None
    """Holds the access key's secret."""
    fold_threads: int = Field(default=2, ge=1, le=64)
    """Chunks folded at a time."""
    progress_every_s: float = Field(default=0.25, gt=0)
    """Watchers hear of upload progress no more often than this; of acceptance at once."""
