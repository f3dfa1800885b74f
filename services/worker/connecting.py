"""How a worker reaches its network: with a certificate over gRPC, or with a node token through a gateway."""

from __future__ import annotations

from typing import Literal

from cortex_common.clock import Clock
from cortex_common.errors import ForbiddenError, InvalidArgumentError, UnauthenticatedError
from cortex_common.network.bridge import ReconnectPolicy, Transport
from cortex_common.network.grpc_transport import GrpcTransport, Peers
from cortex_common.network.messages import Hello
from cortex_common.network.websocket_link import GatewayAccess
from cortex_common.network.websocket_transport import WebSocketTransport
from cortex_common.rpc.denial import DenyList
from cortex_common.security.certificates import read_file
from cortex_common.security.node_tokens import NodeToken
from cortex_common.security.sealing import SealingKey
from services.worker.settings import WorkerSettings

# Few attempts must outlast a gateway that is started again.
_PATIENT_WAIT_S = 2.0
_LONGEST_WAIT_S = 30.0
_PROXIES: dict[str, Literal[True] | None] = {"environment": True, "none": None}


def transport_of(
    settings: WorkerSettings, hello: Hello, sealing: SealingKey, clock: Clock, denied: DenyList
) -> Transport:
    """The one that the settings ask for; without a gateway it calls no aggregator that is denied.

    Raises:
        NotFoundError: the file of the node token cannot be read.
        InvalidArgumentError: it holds no node token.
    """
    if settings.gateway_url is None:
        if settings.coordinator is None or settings.discovery is None:
            raise InvalidArgumentError("worker settings: coordinator and discovery are missing")
        peers = Peers(settings.coordinator, settings.discovery)
        return GrpcTransport(hello, peers, settings.tls, clock, sealing.public, denied=denied)
    proxy = _PROXIES.get(settings.gateway_proxy, settings.gateway_proxy)
    token, url = node_token_of(settings), settings.gateway_url
    public, timeout_s = sealing.public.hex(), settings.gateway_timeout_s
    return WebSocketTransport(
        GatewayAccess(url, token, hello, public, ca=settings.gateway_ca, proxy=proxy, timeout_s=timeout_s)
    )


def policy_of(settings: WorkerSettings) -> ReconnectPolicy:
    """How to go on when the network is away: for ever, or as often as the settings allow."""
    if settings.gateway_attempts is None:
        return ReconnectPolicy()
    fatal = (UnauthenticatedError, ForbiddenError, InvalidArgumentError)
    return ReconnectPolicy(settings.gateway_attempts, fatal, _PATIENT_WAIT_S, _LONGEST_WAIT_S)


def node_token_of(settings: WorkerSettings) -> NodeToken:
    """The token a worker proves itself with at its gateway."""
    if settings.node_token is not None:
        return NodeToken.decode(settings.node_token.get_secret_value())
    if settings.node_token_file is None:
        raise InvalidArgumentError("worker settings: node_token is missing")
    return NodeToken.decode(read_file(settings.node_token_file, "node token").decode(errors="replace"))
