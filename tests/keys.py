"""Data keys as they travel, for tests that play the coordinator or a member."""

from __future__ import annotations

from cortex_common.ids import JobId
from cortex_common.pb.v1 import common_pb2
from cortex_common.security.objects import DataKey
from cortex_common.security.sealing import KeyWrapper
from cortex_common.transfer.wire import data_key_to_proto

_WRAPPER = KeyWrapper("cortex")


def wrapped(member: bytes, job_id: str, key: DataKey) -> common_pb2.DataKey:
    """A data key for the member with this public key."""
    return data_key_to_proto(_WRAPPER.wrap(member, JobId(job_id), key))
