"""KeyService on gRPC: convert, ask, convert back."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import grpc.aio
from google.protobuf.timestamp_pb2 import Timestamp

from cortex_common.ids import JobId
from cortex_common.pb.v1 import coordinator_pb2 as pb
from cortex_common.pb.v1 import coordinator_pb2_grpc
from cortex_common.rpc.identity import current_identity
from services.coordinator.coordinator import JobCoordinator
from services.coordinator.domain import wishes
from services.coordinator.domain.epochs import Epoch, epoch_at
from services.coordinator.domain.job import Job
from services.coordinator.domain.reach import EVERYTHING, Caller
from services.coordinator.keys import JobKeys
from services.coordinator.resealing import Resealing
from services.coordinator.store import Store, StoredKey
from services.coordinator.store_thread import StoreThread

KEY_SERVICE = pb.DESCRIPTOR.services_by_name["KeyService"].full_name


class KeyServicer(coordinator_pb2_grpc.KeyServiceServicer):
    """For operators."""

    def __init__(
        self,
        coordinator: JobCoordinator,
        resealing: Resealing,
        keys: JobKeys,
        store: StoreThread[Store],
        epoch: int,
    ) -> None:
        self._coordinator = coordinator
        self._resealing = resealing
        self._keys = keys
        self._epoch = epoch
        self._store = store

    def attach(self, server: grpc.aio.Server) -> None:
        """Register with a server."""
        coordinator_pb2_grpc.add_KeyServiceServicer_to_server(self, server)

    async def ListKeys(self, request: pb.ListKeysRequest, context: Any) -> pb.ListKeysResponse:
        """The epochs of one job, or of all that have not ended."""
        if request.job_id:
            jobs = [await self._coordinator.job(JobId(request.job_id), EVERYTHING)]
        else:
            jobs = list(self._coordinator.running())
        answer = pb.ListKeysResponse()
        for job in jobs:
            stored = await self._store.call(lambda store, job=job: store.keys(job.id))  # type: ignore[misc]
            answer.epochs.extend(_shown(job, stored))
        return answer

    async def RotateDataKey(self, request: pb.RotateDataKeyRequest, context: Any) -> pb.RotateDataKeyResponse:
        """A new epoch from the next round on; for an ended job, at once."""
        who, job_id = current_identity().name, JobId(request.job_id)
        job = await self._coordinator.job(job_id, EVERYTHING)
        if request.reseal and job.stage.is_terminal:
            return pb.RotateDataKeyResponse(resealed=await self._resealing.ended(job, who))
        await self._coordinator.command(job_id, partial(wishes.rotate_key, reseal=request.reseal), Caller(who))
        return pb.RotateDataKeyResponse()

    async def RotateKeyEncryptionKey(
        self, request: pb.RotateKeyEncryptionKeyRequest, context: Any
    ) -> pb.RotateKeyEncryptionKeyResponse:
        """Every data key under a new key-encryption key."""
        made, count = await self._keys.rotate_kek(f"asked for by {current_identity().name}", self._epoch)
        return pb.RotateKeyEncryptionKeyResponse(kek_id=made, rewrapped=count)


def _shown(job: Job, stored: Sequence[StoredKey]) -> list[pb.KeyEpoch]:
    epochs = [Epoch(each.from_round, each.from_attempt, each.epoch, each.created_s) for each in stored]
    current = None if job.stage.is_terminal or not epochs else epoch_at(epochs, job.round, job.attempt)
    return [_epoch(job, each, is_current=index == current) for index, each in enumerate(stored)]


def _epoch(job: Job, stored: StoredKey, *, is_current: bool) -> pb.KeyEpoch:
    created = Timestamp()
    created.FromMilliseconds(int(stored.created_s * 1000))
    state = pb.KEY_STATE_SEALING if is_current else pb.KEY_STATE_READABLE
    return pb.KeyEpoch(
        job_id=job.id,
        epoch=stored.epoch,
        key_id=stored.key_id,
        kek_id=stored.resting.kek_id,
        created_at=created,
        reason=stored.reason,
        from_round=stored.from_round,
        state=pb.KEY_STATE_ERASED if stored.is_erased else state,
    )
