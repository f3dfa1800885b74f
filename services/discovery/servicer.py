"""DiscoveryService on gRPC: convert, ask, convert back."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import grpc

from cortex_common.pb.v1 import discovery_pb2, discovery_pb2_grpc
from cortex_common.rpc.identity import current_identity
from services.discovery.service import NodeDiscoveryService
from services.discovery.wire import announcement_from_proto, node_to_proto, role_from_proto

FULL_NAME = discovery_pb2.DESCRIPTOR.services_by_name["DiscoveryService"].full_name
_DEFAULT_REFRESH_S = 3.0


class DiscoveryServicer(discovery_pb2_grpc.DiscoveryServiceServicer):
    """Adapter of `NodeDiscoveryService`."""

    def __init__(self, service: NodeDiscoveryService) -> None:
        self._service = service

    def attach(self, server: grpc.aio.Server) -> None:
        """Register with a server."""
        discovery_pb2_grpc.add_DiscoveryServiceServicer_to_server(self, server)

    async def Heartbeat(self, request: discovery_pb2.HeartbeatRequest, context: Any) -> discovery_pb2.HeartbeatResponse:
        """Renew the caller's lease."""
        self._service.heartbeat(current_identity(), announcement_from_proto(request.node))
        rules = self._service.rules
        return discovery_pb2.HeartbeatResponse(lease_s=rules.lease_s, heartbeat_s=rules.heartbeat_s)

    async def Leave(self, request: discovery_pb2.LeaveRequest, context: Any) -> discovery_pb2.LeaveResponse:
        """End the caller's lease."""
        self._service.leave(current_identity(), request.name, request.incarnation)
        return discovery_pb2.LeaveResponse()

    async def ListNodes(self, request: discovery_pb2.ListNodesRequest, context: Any) -> discovery_pb2.ListNodesResponse:
        """Every node known."""
        views = self._service.nodes(role_from_proto(request.role), request.region or None)
        return discovery_pb2.ListNodesResponse(nodes=[node_to_proto(view) for view in views])

    async def WatchNodes(
        self, request: discovery_pb2.WatchNodesRequest, context: Any
    ) -> AsyncIterator[discovery_pb2.WatchNodesResponse]:
        """The list, again and again."""
        watch = self._service.watch(role_from_proto(request.role), request.refresh_s or _DEFAULT_REFRESH_S)
        async for views in watch:
            yield discovery_pb2.WatchNodesResponse(nodes=[node_to_proto(view) for view in views])
