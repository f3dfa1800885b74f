"""What requests and answers look like, for the API's documentation; each fits its schema (tests see to it)."""

from __future__ import annotations

from typing import Any

JOB: dict[str, Any] = {
    "name": "digits-mlp",
    "model": {"kind": "mlp", "input_dim": 64, "hidden_dims": [128], "output_dim": 10},
    "data": {"train": "digits", "test": "digits-test", "partition": {"scheme": "iid", "seed": 0}},
    "training": {"optimizer": "adam", "learning_rate": 0.001, "batch_size": 32, "rounds": 5},
    "placement": {"workers": 2, "min_workers": 2},
}
JOB_YAML = """name: digits-mlp
model: {kind: mlp, input_dim: 64, hidden_dims: [128], output_dim: 10}
data: {train: digits, test: digits-test}
training: {optimizer: adam, learning_rate: 0.001, batch_size: 32, rounds: 5}
placement: {workers: 2, min_workers: 2}
"""
STATUS: dict[str, Any] = {
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
JOB_CONFIGS: dict[str, Any] = {
    "model_config": {"input_dim": 64, "hidden_dims": [128], "output_dim": 10, "dropout_rate": 0.1},
    "training_config": {"learning_rate": 0.001, "batch_size": 32, "max_epochs": 5, "dataset": "digits"},
}
_ID = STATUS["job_id"]
SUBMITTED: dict[str, Any] = {
    "job_id": _ID,
    "status": "submitted",
    "dataset": "digits",
    "links": {
        name: f"/api/v1/jobs/{_ID}/{name}"
        for name in ("status", "events", "versions", "model", "cancel", "pause", "resume")
    },
}
VERSIONS: dict[str, Any] = {
    "versions": [
        {
            "job_id": _ID,
            "round": 2,
            "sha256": "51ab0b3d6c3f3a6d5e0a4e7c2f9d8b7a6c5e4f3d2b1a09f8e7d6c5b4a3928170",
            "manifest_sha256": "0c2e4a6b8d0f1a3c5e7a9b1d3f5a7c9e1b3d5f7a9c1e3b5d7f9a1c3e5b7d9f1a",
            "parameters": 9610,
            "size_bytes": 38712,
            "metrics": {"test_accuracy": 0.842},
            "created_at": "2026-01-01T12:00:09Z",
        }
    ]
}
_RESOURCES: dict[str, Any] = {
    "cpu_cores": 8,
    "cpu_utilisation": 0.42,
    "memory_bytes": 34359738368,
    "memory_available_bytes": 17179869184,
    "disk_free_bytes": 250000000000,
    "network_sent_bytes": 1048576,
    "network_received_bytes": 2097152,
    "gpus": [{"name": "NVIDIA L4", "memory_bytes": 24152899584, "memory_used_bytes": 1073741824, "utilisation": 0.35}],
    "slots": 2,
    "free_slots": 1,
}
_DATASET: dict[str, Any] = {"name": "digits", "input_shape": [8, 8], "classes": 10, "examples": 1438}
_NODE: dict[str, Any] = {
    "name": "eu-2",
    "role": "worker",
    "region": "eu",
    "address": "",
    "health": "live",
    "activity": "training",
    "version": "0.1.0",
    "lease_left_s": 8.2,
    "last_seen_at": "2026-01-01T12:00:08Z",
    "started_at": "2026-01-01T11:00:00Z",
    "resources": _RESOURCES,
    "datasets": [_DATASET],
}
NETWORK_STATUS: dict[str, Any] = {
    "status": "degraded",
    "reasons": ["worker us-1 in us is gone, its lease ended 40 s ago"],
    "live": 1,
    "suspect": 0,
    "expired": 1,
    "regions": {
        "eu": {"status": "ok", "live": 1, "suspect": 0, "expired": 0, "nodes": [_NODE]},
        "us": {
            "status": "degraded",
            "live": 0,
            "suspect": 0,
            "expired": 1,
            "nodes": [{**_NODE, "name": "us-1", "region": "us", "health": "expired", "lease_left_s": -40.0}],
        },
    },
}
_CAPACITY: dict[str, Any] = {
    "workers": 1,
    "cpu_cores": 8,
    "cpu_utilisation": 0.42,
    "memory_bytes": 34359738368,
    "memory_available_bytes": 17179869184,
    "gpus": 1,
    "gpu_memory_bytes": 24152899584,
    "gpu_memory_used_bytes": 1073741824,
    "gpu_utilisation": 0.35,
    "slots": 2,
    "free_slots": 1,
    "datasets": ["digits"],
}
NETWORK_RESOURCES: dict[str, Any] = {
    "total": _CAPACITY,
    "regions": {
        "eu": {
            **_CAPACITY,
            "nodes": [{"name": "eu-2", "activity": "training", "resources": _RESOURCES, "datasets": ["digits"]}],
        }
    },
}
ALIVE = {"status": "ok"}
READY = {"status": "ok", "checks": {"coordinator": "ok", "discovery": "ok"}}
NOT_READY = {
    "status": "unavailable",
    "checks": {"coordinator": "coordinator at 10.0.0.2:50051 cannot be reached: connection refused", "discovery": "ok"},
}
