"""/healthz, /readyz, /metrics: for those who run the gateway; no token needed."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any, Literal

from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel

from cortex_common.errors import CortexError
from cortex_common.telemetry.metrics import REGISTRY
from services.gateway import examples
from services.gateway.openapi import example
from services.gateway.surroundings import Surroundings, surroundings_of

router = APIRouter(tags=["operations"])


class Liveness(BaseModel):
    """The process answers."""

    status: Literal["ok"] = "ok"


class Readiness(BaseModel):
    """Whether requests can be served: `ok`, or what is wrong, for each service the gateway needs."""

    status: Literal["ok", "unavailable"]
    checks: dict[str, str]


@router.get("/healthz", responses=example(examples.ALIVE))
async def healthz() -> Liveness:
    """Whether the process is alive; never depends on others."""
    return Liveness()


_READY: dict[int | str, dict[str, Any]] = example(examples.READY) | {
    503: {
        "model": Readiness,
        "description": "A service cannot be reached",
        "content": {"application/json": {"example": examples.NOT_READY}},
    }
}


@router.get("/readyz", responses=_READY)
async def readyz(request: Request, response: Response) -> Readiness:
    """Whether coordinator and discovery can be reached and are ready."""
    readiness = await check(surroundings_of(request))
    response.status_code = 200 if readiness.status == "ok" else 503
    return readiness


@router.get(
    "/metrics",
    response_class=Response,
    responses={200: {"content": {"text/plain": {"example": "cortex_gateway_event_streams 2.0\n"}}}},
)
async def metrics() -> Response:
    """Prometheus metrics."""
    return Response(generate_latest(REGISTRY), media_type=CONTENT_TYPE_LATEST)


async def check(surroundings: Surroundings) -> Readiness:
    """Ask every service the gateway needs, all at the same time."""
    checks = {"coordinator": surroundings.jobs.check(), "discovery": surroundings.nodes.check()}
    answers = await asyncio.gather(*(_answer(each) for each in checks.values()))
    ready = all(answer == "ok" for answer in answers)
    return Readiness(status="ok" if ready else "unavailable", checks=dict(zip(checks, answers, strict=True)))


async def _answer(check: Awaitable[None]) -> str:
    try:
        await check
    except CortexError as error:
        return error.message
    return "ok"
