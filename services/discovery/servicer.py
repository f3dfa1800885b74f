"""DiscoveryService on gRPC: convert, ask, convert back."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import grpc

from cortex_common.pb.v1 import discovery_pb2, discovery_pb2_grpc, identity_pb2, identity_pb2_grpc
from cortex_common.rpc.identity import current_identity
from services.discovery.admission import NodeAdmission
from services.discovery.identity_service import IdentityAuthority
from services.discovery.identity_wire import identities_to_proto, region_of, token_request, trust_to_proto
from services.discovery.service import NodeDiscoveryService, checked_refresh
from services.discovery.wire import announcement_from_proto, node_to_proto, role_from_proto

FULL_NAME = discovery_pb2.DESCRIPTOR.services_by_name["DiscoveryService"].full_name
IDENTITY_SERVICE = identity_pb2.DESCRIPTOR.services_by_name["IdentityService"].full_name
ENROLLMENT_SERVICE = identity_pb2.DESCRIPTOR.services_by_name["EnrollmentService"].full_name
_DEFAULT_REFRESH_S = 3.0
_DEFAULT_TOKEN_LIFE_S = 86400.0
_DEFAULT_NODE_TOKEN_LIFE_S = 30 * 86400.0


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


class EnrollmentServicer(identity_pb2_grpc.EnrollmentServiceServicer):
    """For nodes that have no certificate yet."""

    def __init__(self, authority: IdentityAuthority) -> None:
        self._authority = authority

    def attach(self, server: grpc.aio.Server) -> None:
        """Register with a server."""
        identity_pb2_grpc.add_EnrollmentServiceServicer_to_server(self, server)

    async def GetRoots(self, request: identity_pb2.GetRootsRequest, context: Any) -> identity_pb2.GetRootsResponse:
        """The roots, for whoever knows the fingerprint of one."""
        return identity_pb2.GetRootsResponse(roots=self._authority.roots)

    async def Enroll(self, request: identity_pb2.EnrollRequest, context: Any) -> identity_pb2.EnrollResponse:
        """A certificate for a join token."""
        granted = await self._authority.enroll(request.token_id, request.secret, request.csr, list(request.hosts))
        return identity_pb2.EnrollResponse(certificate=granted.certificate, roots=granted.roots)


class IdentityServicer(identity_pb2_grpc.IdentityServiceServicer):
    """For members."""

    def __init__(self, authority: IdentityAuthority, admission: NodeAdmission) -> None:
        self._authority = authority
        self._admission = admission

    def attach(self, server: grpc.aio.Server) -> None:
        """Register with a server."""
        identity_pb2_grpc.add_IdentityServiceServicer_to_server(self, server)

    async def Renew(self, request: identity_pb2.RenewRequest, context: Any) -> identity_pb2.RenewResponse:
        """The caller's next certificate."""
        granted = await self._authority.renew(current_identity(), request.csr, list(request.hosts))
        return identity_pb2.RenewResponse(certificate=granted.certificate, roots=granted.roots)

    async def WatchTrust(
        self, request: identity_pb2.WatchTrustRequest, context: Any
    ) -> AsyncIterator[identity_pb2.WatchTrustResponse]:
        """Roots and denials, again and again."""
        async for roots, denials in self._authority.watch(checked_refresh(request.refresh_s or _DEFAULT_REFRESH_S)):
            yield trust_to_proto(roots, denials)

    async def CreateJoinToken(
        self, request: identity_pb2.CreateJoinTokenRequest, context: Any
    ) -> identity_pb2.CreateJoinTokenResponse:
        """Let one node join."""
        role, name, region = token_request(request)
        token, expires_s = await self._authority.create_token(
            role, name, region, request.life_s or _DEFAULT_TOKEN_LIFE_S
        )
        answer = identity_pb2.CreateJoinTokenResponse(token=token.encode())
        answer.expires_at.FromMicroseconds(round(expires_s * 1e6))
        return answer

    async def CreateNodeToken(
        self, request: identity_pb2.CreateNodeTokenRequest, context: Any
    ) -> identity_pb2.CreateNodeTokenResponse:
        """Let a worker take part over WebSocket."""
        region = region_of(request.region, "node token")
        life_s = request.life_s or _DEFAULT_NODE_TOKEN_LIFE_S
        token, expires_s = await self._admission.create_token(request.name, region, life_s)
        answer = identity_pb2.CreateNodeTokenResponse(token=token.encode())
        answer.expires_at.FromMicroseconds(round(expires_s * 1e6))
        return answer

    async def ChallengeNode(
        self, request: identity_pb2.ChallengeNodeRequest, context: Any
    ) -> identity_pb2.ChallengeNodeResponse:
        """What a node at the calling gateway is to sign."""
        return identity_pb2.ChallengeNodeResponse(challenge=self._admission.challenge(current_identity()))

    async def AdmitNode(self, request: identity_pb2.AdmitNodeRequest, context: Any) -> identity_pb2.AdmitNodeResponse:
        """A pass for the calling gateway."""
        signed, life_s = await self._admission.admit(
            current_identity(),
            request.node,
            request.region,
            request.token_id,
            request.sealing_key,
            request.challenge,
            request.proof,
        )
        return identity_pb2.AdmitNodeResponse(**{"pass": signed}, life_s=life_s)

    async def ListIdentities(
        self, request: identity_pb2.ListIdentitiesRequest, context: Any
    ) -> identity_pb2.ListIdentitiesResponse:
        """Who has certificates, who is shut out."""
        return identities_to_proto(self._authority.state)

    async def RevokeNode(
        self, request: identity_pb2.RevokeNodeRequest, context: Any
    ) -> identity_pb2.RevokeNodeResponse:
        """Shut a node out."""
        meant = await self._authority.revoke(
            request.name, role_from_proto(request.role), request.reason, current_identity()
        )
        return identity_pb2.RevokeNodeResponse(identities=[identity.uri for identity in meant])

    async def RotateAuthority(
        self, request: identity_pb2.RotateAuthorityRequest, context: Any
    ) -> identity_pb2.RotateAuthorityResponse:
        """New authorities, at once."""
        return identity_pb2.RotateAuthorityResponse(made=await self._authority.rotate(root=request.root))
