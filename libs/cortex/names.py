"""Where each public name lives."""

from __future__ import annotations

import importlib

COMPONENTS = {
    "entry": {"CortexManager": "cortex.integration.manager"},
    "network": {
        "TenzroBridge": "cortex_common.network.bridge",
        "TenzroProtocol": "cortex_common.network.protocol",
        "NodeDiscoveryService": "services.discovery.service",
    },
    "training": {
        "CortexModel": "cortex_common.model.base",
        "ModelTrainer": "services.worker.trainer.loop",
        "WeightAggregator": "services.aggregator.aggregation",
    },
    "coordination": {
        "JobCoordinator": "services.coordinator.coordinator",
        "ModelDeploymentManager": "services.coordinator.deployment",
        "BatchProcessor": "services.aggregator.batches",
    },
    "security": {
        "EncryptionManager": "cortex_common.security.encryption",
        "WeightCompressor": "cortex_common.codec.compressor",
        "ValidationManager": "cortex_common.validation.manager",
    },
}
"""The parts of the system by layer."""

_CLIENT = {
    "Client": "cortex.client",
    "Connection": "cortex.connection",
    "find_connection": "cortex.connection",
    "JobEvent": "cortex.views",
    "NodeView": "cortex.views",
    "VersionView": "cortex.views",
    "CortexError": "cortex_common.errors",
    "JobSpec": "cortex_common.job.spec",
    "load_job_file": "cortex_common.job.parse",
    "parse_job": "cortex_common.job.parse",
    "JobStatus": "cortex_common.job.status",
}
HOMES = _CLIENT | {name: home for layer in COMPONENTS.values() for name, home in layer.items()}
"""Every public name and its module."""


def find(name: str) -> object:
    """The object behind a public name.

    Raises:
        AttributeError: there is no such name.
        ImportError: a package that it needs is not installed; says which.
    """
    home = HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'cortex' has no attribute {name!r}")
    try:
        module = importlib.import_module(home)
    except ModuleNotFoundError as error:
        raise ImportError(
            f"cortex.{name} needs the Python module {error.name!r}, which is not installed; "
            "`pip install 'cortex-training[all]'` brings it"
        ) from error
    return getattr(module, name)
