"""RoundService and WeightService on gRPC: convert, ask, convert back."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio

from cortex_common.errors import InvalidArgumentError
from cortex_common.ids import JobId, RoundNumber
from cortex_common.pb.v1 import aggregator_pb2, aggregator_pb2_grpc
from cortex_common.rpc.identity import current_identity
from cortex_common.security.objects import DataKey
from cortex_common.security.sealing import SealingKey
from cortex_common.transfer import ChunkFrame, HeaderFrame, TrailerFrame, frame_to_bytes
from cortex_common.transfer.wire import header_from_proto, receipt_to_proto
from services.aggregator.aggregation import WeightAggregator
from services.aggregator.shards import ShardStore
from services.aggregator.uploads import in_thread
from services.aggregator.versions import PartReader, SealedPart
from services.aggregator.wire import (
    Keyed,
    answer_to_proto,
    contributions_from_proto,
    data_keys_of,
    key_from_proto,
    terms_from_proto,
    version_to_proto,
    view_to_proto,
)

_SERVICES = aggregator_pb2.DESCRIPTOR.services_by_name
ROUND_SERVICE: str = _SERVICES["RoundService"].full_name
WEIGHT_SERVICE: str = _SERVICES["WeightService"].full_name
SHARD_SERVICE: str = _SERVICES["ShardService"].full_name


class RoundServicer(aggregator_pb2_grpc.RoundServiceServicer):
    """For the coordinator."""

    def __init__(self, aggregator: WeightAggregator, sealing: SealingKey) -> None:
        self._aggregator = aggregator
        self._sealing = sealing

    def attach(self, server: grpc.aio.Server) -> None:
        """Register with a server."""
        aggregator_pb2_grpc.add_RoundServiceServicer_to_server(self, server)

    async def GetSealingKey(
        self, request: aggregator_pb2.GetSealingKeyRequest, context: Any
    ) -> aggregator_pb2.GetSealingKeyResponse:
        """What to wrap data keys to."""
        return aggregator_pb2.GetSealingKeyResponse(public_key=self._sealing.public)

    async def OpenRound(
        self, request: aggregator_pb2.OpenRoundRequest, context: Any
    ) -> aggregator_pb2.OpenRoundResponse:
        """Take updates for a round."""
        terms, keys = terms_from_proto(request.round), self._data_keys(request.round)
        if not keys:
            raise InvalidArgumentError("round.data_key: is needed")
        await self._aggregator.open_round(terms, keys)
        return aggregator_pb2.OpenRoundResponse()

    async def WatchRound(
        self, request: aggregator_pb2.WatchRoundRequest, context: Any
    ) -> AsyncIterator[aggregator_pb2.WatchRoundResponse]:
        """The round now and at each change."""
        async for view in self._aggregator.watch(key_from_proto(request)):
            yield view_to_proto(view)

    async def SealRound(
        self, request: aggregator_pb2.SealRoundRequest, context: Any
    ) -> aggregator_pb2.SealRoundResponse:
        """Fold a frozen list into the next version."""
        version = await self._aggregator.seal(
            key_from_proto(request), request.fence, contributions_from_proto(request), self._data_keys(request)
        )
        return aggregator_pb2.SealRoundResponse(version=version_to_proto(version), update_norm=version.update_norm)

    async def ForwardRound(
        self, request: aggregator_pb2.ForwardRoundRequest, context: Any
    ) -> aggregator_pb2.ForwardRoundResponse:
        """Push the mean of a frozen list one tier up."""
        done = await self._aggregator.forward(
            key_from_proto(request), request.fence, contributions_from_proto(request), self._data_keys(request)
        )
        return aggregator_pb2.ForwardRoundResponse(
            receipt=receipt_to_proto(done.receipt), relayed_bytes=done.relayed_bytes
        )

    async def AbortRound(
        self, request: aggregator_pb2.AbortRoundRequest, context: Any
    ) -> aggregator_pb2.AbortRoundResponse:
        """Give up a round."""
        await self._aggregator.abort(key_from_proto(request), request.fence, request.reason or "no reason given")
        return aggregator_pb2.AbortRoundResponse()

    async def PruneJob(self, request: aggregator_pb2.PruneJobRequest, context: Any) -> aggregator_pb2.PruneJobResponse:
        """Erase versions that are no longer wanted."""
        keep = [RoundNumber(number) for number in request.keep_rounds]
        removed = await self._aggregator.prune(JobId(request.job_id), request.fence, keep, ended=request.ended)
        return aggregator_pb2.PruneJobResponse(removed_versions=removed)

    async def ResealJob(
        self, request: aggregator_pb2.ResealJobRequest, context: Any
    ) -> aggregator_pb2.ResealJobResponse:
        """Everything stored of a job under one key."""
        keys = self._data_keys(request)
        if not keys:
            raise InvalidArgumentError("data_key: is needed")
        count = await self._aggregator.resealer.reseal(JobId(request.job_id), request.fence, keys)
        return aggregator_pb2.ResealJobResponse(resealed=count)

    def _data_keys(self, message: Keyed) -> tuple[DataKey, ...]:
        """The data keys that came along, opened; the round's own first."""
        return tuple(self._sealing.unwrap(JobId(message.job_id), key) for key in data_keys_of(message))


class WeightServicer:
    """For workers. Frames are bytes here: see `cortex_common.transfer.frames`."""

    def __init__(self, aggregator: WeightAggregator, shards: ShardStore) -> None:
        self._aggregator = aggregator
        self._shards = shards

    def attach(self, server: grpc.aio.Server) -> None:
        """Register with a server, with the frames' own (de)serialisers."""
        handlers = {
            "PushUpdate": grpc.stream_stream_rpc_method_handler(
                self.push_update, response_serializer=aggregator_pb2.PushUpdateResponse.SerializeToString
            ),
            "PullModel": grpc.unary_stream_rpc_method_handler(
                self.pull_model, request_deserializer=aggregator_pb2.PullModelRequest.FromString
            ),
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(WEIGHT_SERVICE, handlers),))

    async def push_update(
        self, messages: AsyncIterator[bytes], context: Any
    ) -> AsyncIterator[aggregator_pb2.PushUpdateResponse]:
        """Take one update."""
        async for answer in self._aggregator.receiver.push(current_identity(), aiter(messages)):
            yield answer_to_proto(answer)

    async def pull_model(self, request: aggregator_pb2.PullModelRequest, context: Any) -> AsyncIterator[bytes]:
        """Send one version, whole or as a delta, or a shard, sealed as it lies on the disk.

        A shard goes to any worker that can name it: its digest, like its key, only those hear whose seat it is.
        """
        shard = self._shards.part(request.sha256)
        part = shard or await self._aggregator.holdings.model(
            current_identity(), JobId(request.job_id), request.sha256, request.held_sha256, RoundNumber(request.round)
        )
        chunks = part.header.chunks
        first = chunks if request.held_sha256 == request.sha256 else request.first_chunk
        if first > chunks:
            raise InvalidArgumentError(f"first_chunk {first}: the version has {chunks} chunks")
        yield frame_to_bytes(HeaderFrame(part.header, first))
        if first < chunks:
            open_part = self._shards.open if shard else self._aggregator.versions.open_part
            reader = await in_thread(lambda: open_part(part))
            async for frame in self._chunks(part, reader, first, request):
                yield frame
        yield frame_to_bytes(TrailerFrame(chunks, bytes.fromhex(part.content_sha256)))

    async def _chunks(
        self, part: SealedPart, reader: PartReader, first: int, request: aggregator_pb2.PullModelRequest
    ) -> AsyncIterator[bytes]:
        job_id, number = JobId(request.job_id), RoundNumber(request.round)
        try:
            for index in range(first, part.header.chunks):
                frame = await in_thread(lambda index=index: _frame(reader, index))  # type: ignore[misc]
                await self._aggregator.paces.up.take(job_id, len(frame))
                yield frame
                self._aggregator.count_download(job_id, number, part.sizes[index])
        finally:
            reader.close()


class ShardServicer:
    """For operators. Frames are bytes here, as those of weights."""

    def __init__(self, shards: ShardStore) -> None:
        self._shards = shards

    def attach(self, server: grpc.aio.Server) -> None:
        """Register with a server, with the frames' own deserialiser."""
        handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
            "OfferShard": grpc.unary_unary_rpc_method_handler(
                self.offer_shard,
                request_deserializer=aggregator_pb2.OfferShardRequest.FromString,
                response_serializer=aggregator_pb2.OfferShardResponse.SerializeToString,
            ),
            "PutShard": grpc.stream_unary_rpc_method_handler(
                self.put_shard, response_serializer=aggregator_pb2.PutShardResponse.SerializeToString
            ),
            "DropShards": grpc.unary_unary_rpc_method_handler(
                self.drop_shards,
                request_deserializer=aggregator_pb2.DropShardsRequest.FromString,
                response_serializer=aggregator_pb2.DropShardsResponse.SerializeToString,
            ),
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SHARD_SERVICE, handlers),))

    async def offer_shard(
        self, request: aggregator_pb2.OfferShardRequest, context: Any
    ) -> aggregator_pb2.OfferShardResponse:
        """How much of a shard is here."""
        held = await self._shards.offer(header_from_proto(request.header))
        return aggregator_pb2.OfferShardResponse(complete=held.complete, chunks=held.chunks, size_bytes=held.size_bytes)

    async def put_shard(self, messages: AsyncIterator[bytes], context: Any) -> aggregator_pb2.PutShardResponse:
        """Take one shard."""
        return aggregator_pb2.PutShardResponse(newly_stored=await self._shards.put(aiter(messages)))

    async def drop_shards(
        self, request: aggregator_pb2.DropShardsRequest, context: Any
    ) -> aggregator_pb2.DropShardsResponse:
        """Erase shards."""
        return aggregator_pb2.DropShardsResponse(dropped=await self._shards.drop(request.sha256))


def _frame(reader: PartReader, index: int) -> bytes:
    return frame_to_bytes(ChunkFrame(index, reader.read(index)))
