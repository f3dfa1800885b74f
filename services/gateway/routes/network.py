"""/api/v1/network: who is here, how healthy, with what."""

from __future__ import annotations

from fastapi import APIRouter, Request

from services.gateway import examples
from services.gateway.auth import Reader
from services.gateway.domain import NetworkResources, NetworkStatus, network_resources, network_status
from services.gateway.openapi import example
from services.gateway.problems import responses
from services.gateway.surroundings import surroundings_of

router = APIRouter(prefix="/api/v1/network", tags=["network"])


@router.get("/status", responses=example(examples.NETWORK_STATUS) | responses(401, 403, 503))
async def status(request: Request, principal: Reader) -> NetworkStatus:
    """Health of the network and each node's, by region; `degraded` comes with its reasons."""
    return network_status(await surroundings_of(request).nodes.nodes())


@router.get("/resources", responses=example(examples.NETWORK_RESOURCES) | responses(401, 403, 503))
async def resources(request: Request, principal: Reader) -> NetworkResources:
    """What the live workers have and how much of it is free, by region and in total."""
    return network_resources(await surroundings_of(request).nodes.nodes())
