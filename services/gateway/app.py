"""The HTTP application, put together."""

from __future__ import annotations

from fastapi import FastAPI
from fastapi_offline import FastAPIOffline

from cortex_common.telemetry.metrics import cortex_version
from services.gateway import openapi, problems
from services.gateway.middleware import BodyCap, Observed
from services.gateway.routes import jobs, network, operations
from services.gateway.surroundings import Surroundings, attach

MAX_BODY_BYTES = 1 << 20


def create_app(surroundings: Surroundings, max_body_bytes: int = MAX_BODY_BYTES) -> FastAPI:
    """The application that serves the HTTP API with these peers; its documentation needs no internet."""
    app = FastAPIOffline(
        title="Cortex", version=cortex_version(), description=openapi.DESCRIPTION, redirect_slashes=False
    )
    attach(app, surroundings)
    problems.install(app)
    openapi.install(app)
    for router in (jobs.router, network.router, operations.router):
        app.include_router(router)
    app.add_middleware(BodyCap, max_bytes=max_body_bytes)
    app.add_middleware(Observed, clock=surroundings.clock)
    return app
