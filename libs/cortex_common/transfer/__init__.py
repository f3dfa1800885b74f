"""The two ends of the weight protocol, shared by workers, aggregators and whoever reads models."""

from __future__ import annotations

from cortex_common.transfer.frames import (
    ChunkFrame,
    Frame,
    HeaderFrame,
    TrailerFrame,
    frame_from_bytes,
    frame_to_bytes,
)
from cortex_common.transfer.pull import PULL_METHOD, PullResult, pull_model
from cortex_common.transfer.push import PUSH_METHOD, push_update
from cortex_common.transfer.receipt import PushResult, Receipt

__all__ = [
    "PULL_METHOD",
    "PUSH_METHOD",
    "ChunkFrame",
    "Frame",
    "HeaderFrame",
    "PullResult",
    "PushResult",
    "Receipt",
    "TrailerFrame",
    "frame_from_bytes",
    "frame_to_bytes",
    "pull_model",
    "push_update",
]
