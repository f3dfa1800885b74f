"""What /docs and /openapi.json say beyond the routes' own signatures: the job file, examples, binary answers."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from cortex_common.job.spec import JobSpec
from services.gateway.problems import Problem

DESCRIPTION = """Submit training jobs, follow them, download their models; see the network's nodes and resources.

Every path below `/api` needs a bearer token (`cortex token create`) with the scope `read`, or `submit` to change
something. Errors are `application/problem+json`; a job with mistakes is answered with all of them at once."""

_JOB: dict[str, Any] = {
    "name": "digits-mlp",
    "model": {"kind": "mlp", "input_dim": 64, "hidden_dims": [128], "output_dim": 10},
    "data": {"train": "digits", "test": "digits-test", "partition": {"scheme": "iid", "seed": 0}},
    "training": {"optimizer": "adam", "learning_rate": 0.001, "batch_size": 32, "rounds": 5},
    "placement": {"workers": 2, "min_workers": 2},
}
_JOB_YAML = """name: digits-mlp
model: {kind: mlp, input_dim: 64, hidden_dims: [128], output_dim: 10}
data: {train: digits, test: digits-test}
training: {optimizer: adam, learning_rate: 0.001, batch_size: 32, rounds: 5}
placement: {workers: 2, min_workers: 2}
"""
_STATUS: dict[str, Any] = {
    "job_id": "0198f2c4a1b27d3e",
    "name": "digits-mlp",
    "status": "training",
    "round": 3,
    "rounds": 5,
    "waiting_for": "worker eu-2 (training, 4 s); quorum 1/2; deadline in 12 s",
    "metrics": {"train_loss": 0.41, "test_loss": 0.45, "test_accuracy": 0.842},
    "history": [
        {
            "round": 1,
            "attempt": 1,
            "seconds": 2.1,
            "train_seconds": 1.6,
            "exchange_seconds": 0.3,
            "bytes_up": 77140,
            "bytes_down": 77140,
            "participants": 2,
            "accepted": 2,
            "dropped": [],
            "model_sha256": "9f2c…",
            "test_accuracy": 0.80,
        }
    ],
    "model": {"round": 2, "sha256": "51ab…", "parameters": 9610},
    "goodput": 0.97,
    "privacy": {"epsilon": None},
    "error": None,
    "submitted_at": "2026-01-01T12:00:00Z",
    "started_at": "2026-01-01T12:00:01Z",
    "finished_at": None,
    "owner": "alice",
    "workers": [{"seat": 1, "worker": "eu-2", "region": "eu", "activity": "training", "since_s": 4.0}],
    "tensorboard_dir": None,
}

_REF = "#/components/schemas/{model}"
JOB_BODY = MappingProxyType[str, Any](
    {
        "openapi_extra": {
            "requestBody": {
                "required": True,
                "content": {
                    "application/json": {"schema": {"$ref": _REF.format(model="JobSpec")}, "example": _JOB},
                    "application/yaml": {"schema": {"type": "string"}, "example": _JOB_YAML},
                },
            }
        }
    }
)
STATUS: dict[int | str, dict[str, Any]] = {200: {"content": {"application/json": {"example": _STATUS}}}}
MODEL_FILE: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The safetensors file",
        "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
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
            "text/event-stream": {"schema": {"type": "string"}, "example": 'event: status\ndata: {"job_id": …}\n'}
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
    for unused in ("HTTPValidationError", "ValidationError"):
        schemas.pop(unused, None)
    return document
