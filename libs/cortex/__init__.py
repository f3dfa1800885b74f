"""Cortex: distributed neural-network training across sites and regions. Everything a Python user needs is found here.

Names are imported when first used, so that `import cortex` is quick and does not bring torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cortex.names import HOMES, find

if TYPE_CHECKING:
    from cortex.client import Client
    from cortex.connection import Connection, find_connection
    from cortex.integration.manager import CortexManager
    from cortex.views import JobEvent, NodeView, VersionView
    from cortex_common.codec.compressor import WeightCompressor
    from cortex_common.errors import CortexError
    from cortex_common.job.parse import load_job_file, parse_job
    from cortex_common.job.spec import JobSpec
    from cortex_common.job.status import JobStatus
    from cortex_common.model.base import CortexModel
    from cortex_common.network.bridge import TenzroBridge
    from cortex_common.network.protocol import TenzroProtocol
    from cortex_common.security.encryption import EncryptionManager
    from cortex_common.validation.manager import ValidationManager
    from services.aggregator.aggregation import WeightAggregator
    from services.aggregator.batches import BatchProcessor
    from services.coordinator.coordinator import JobCoordinator
    from services.coordinator.deployment import ModelDeploymentManager
    from services.discovery.service import NodeDiscoveryService
    from services.worker.trainer.loop import ModelTrainer

__version__ = "0.1.0"

__all__ = [
    "BatchProcessor",
    "Client",
    "Connection",
    "CortexError",
    "CortexManager",
    "CortexModel",
    "EncryptionManager",
    "JobCoordinator",
    "JobEvent",
    "JobSpec",
    "JobStatus",
    "ModelDeploymentManager",
    "ModelTrainer",
    "NodeDiscoveryService",
    "NodeView",
    "TenzroBridge",
    "TenzroProtocol",
    "ValidationManager",
    "VersionView",
    "WeightAggregator",
    "WeightCompressor",
    "__version__",
    "find_connection",
    "load_job_file",
    "parse_job",
]


def __getattr__(name: str) -> object:
    """Import a public name from its home at its first use."""
    if name not in HOMES:
        raise AttributeError(f"module 'cortex' has no attribute {name!r}")
    value = find(name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Public names, imported or not."""
    return sorted(__all__)
