"""What /docs and /openapi.json say beyond the routes' own signatures: the job file, examples, binary answers."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from cortex_common.job.spec import JobSpec
from services.gateway import examples
from services.gateway.configs import SCHEMA
from services.gateway.problems import Problem

DESCRIPTION = """Submit training jobs, follow them, download their models; see the network's nodes and resources.

Every path below `/api` needs a bearer token (`cortex token create`) with the scope `read`, or `submit` to change
something. Errors are `application/problem+json`; a job with mistakes is answered with all of them at once."""

_REF = "#/components/schemas/{model}"
_JOB_SCHEMA = {"oneOf": [{"$ref": _REF.format(model=each)} for each in ("JobSpec", "JobConfigs")]}
JOB_BODY = MappingProxyType[str, Any](
    {
        "openapi_extra": {
            "requestBody": {
                "required": True,
                "content": {
                    "application/json": {
                        "schema": _JOB_SCHEMA,
                        "examples": {
                            "job file": {"value": examples.JOB},
                            "configurations": {"value": examples.JOB_CONFIGS},
                        },
                    },
                    "application/yaml": {"schema": _JOB_SCHEMA, "example": examples.JOB_YAML},
                },
            }
        }
    }
)


def example(value: object, status: int = 200) -> dict[int | str, dict[str, Any]]:
    """Documentation of a JSON answer."""
    return {status: {"content": {"application/json": {"example": value}}}}


MODEL_FILE: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The safetensors file",
        "content": {
            "application/octet-stream": {
                "schema": {"type": "string", "format": "binary"},
                "example": "8 bytes of length, a JSON header, float32 values",
            }
        },
        "headers": {
            "ETag": {"description": "The SHA-256 in quotes", "schema": {"type": "string"}},
            "X-Model-Sha256": {"description": "SHA-256 of the file", "schema": {"type": "string"}},
            "X-Model-Round": {"description": "The round it is of", "schema": {"type": "integer"}},
        },
    },
    304: {"description": "If-None-Match names the version already"},
}
EVENTS: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "Events named `status` or `event`, at last `end` or `problem`",
        "content": {
            "text/event-stream": {
                "schema": {
                    "type": "object",
                    "description": "One event; `data` is the JSON of a status, an event, or a problem",
                    "required": ["event", "data"],
                    "properties": {
                        "event": {"enum": ["status", "event", "end", "problem"]},
                        "data": {"type": "string"},
                        "id": {"type": "string", "description": "Sequence number, for `Last-Event-ID`"},
                    },
                },
                "example": 'event: status\ndata: {"job_id": "0198f2c4a1b27d3e", "status": "training"}\n\n',
            }
        },
    }
}


def install(app: FastAPI) -> None:
    """Complete the application's OpenAPI description; made once, at the first request for it."""

    def described() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _description(app)
        return app.openapi_schema

    app.openapi = described  # type: ignore[method-assign]


def _description(app: FastAPI) -> dict[str, Any]:
    document = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
    schemas = document.setdefault("components", {}).setdefault("schemas", {})
    for model in (JobSpec, Problem):
        schema = model.model_json_schema(ref_template=_REF)
        schemas.update(schema.pop("$defs", {}))
        schemas[model.__name__] = schema
    schemas["JobConfigs"] = SCHEMA
    for unused in ("HTTPValidationError", "ValidationError"):
        schemas.pop(unused, None)
    return document
