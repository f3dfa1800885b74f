"""DatasetService on gRPC: convert, ask, convert back."""

from __future__ import annotations

import re
from typing import Any

import grpc.aio
from google.protobuf.timestamp_pb2 import Timestamp

from cortex_common.data.sealed import described
from cortex_common.errors import InvalidArgumentError, PreconditionError
from cortex_common.ids import DEFAULT_ORG
from cortex_common.pb.v1 import coordinator_pb2 as pb
from cortex_common.pb.v1 import coordinator_pb2_grpc
from cortex_common.rpc.identity import current_identity
from services.coordinator.coordinator import JobCoordinator
from services.coordinator.datasets import SealedDatasets
from services.coordinator.store import StoredDataset

DATASET_SERVICE = pb.DESCRIPTOR.services_by_name["DatasetService"].full_name
_ORG = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")


class DatasetServicer(coordinator_pb2_grpc.DatasetServiceServicer):
    """For operators."""

    def __init__(self, coordinator: JobCoordinator, datasets: SealedDatasets) -> None:
        self._coordinator = coordinator
        self._datasets = datasets

    def attach(self, server: grpc.aio.Server) -> None:
        """Register with a server."""
        coordinator_pb2_grpc.add_DatasetServiceServicer_to_server(self, server)

    async def AddDataset(self, request: pb.AddDatasetRequest, context: Any) -> pb.AddDatasetResponse:
        """Take a data set's manifest and key."""
        org = request.org or DEFAULT_ORG
        if not _ORG.fullmatch(org):
            raise InvalidArgumentError(f"org: {org[:80]!r} given; allowed: 1 to 63 letters, digits, '.', '_', '-'")
        told = await self._datasets.add(request.manifest, request.key, org, current_identity().name)
        return pb.AddDatasetResponse(reference=told.reference)

    async def ListDatasets(self, request: pb.ListDatasetsRequest, context: Any) -> pb.ListDatasetsResponse:
        """All of them."""
        return pb.ListDatasetsResponse(datasets=[_shown(each) for each in self._datasets.all()])

    async def RemoveDataset(self, request: pb.RemoveDatasetRequest, context: Any) -> pb.RemoveDatasetResponse:
        """Erase a data set's key."""
        digest = request.reference.rpartition("@")[2]
        for job in self._coordinator.running():
            if job.spec.data.sealed_digest == digest and not job.stage.is_terminal:
                raise PreconditionError(f"job {job.id} trains on {request.reference}; cancel it first")
        told = await self._datasets.remove(digest)
        return pb.RemoveDatasetResponse(shard_sha256=[shard.sha256 for shard in told.manifest.shards])


def _shown(stored: StoredDataset) -> pb.SealedDataset:
    added = Timestamp()
    added.FromMilliseconds(int(stored.added_s * 1000))
    return pb.SealedDataset(
        reference=described(stored.manifest).reference,
        org=stored.org,
        added_by=stored.added_by,
        added_at=added,
        manifest=stored.manifest,
    )
