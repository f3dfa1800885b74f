"""Cortex: distributed neural-network training across sites and regions. Everything a Python user needs is found here.

Names are imported when first used, so that `import cortex` is quick and does not bring torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cortex.client import Client
    from cortex.connection import Connection, find_connection
    from cortex.integration.manager import CortexManager
    from cortex.views import JobEvent, NodeView, VersionView
    from cortex_common.errors import CortexError
    from cortex_common.job.parse import load_job_file, parse_job
    from cortex_common.job.spec import JobSpec
    from cortex_common.job.status import JobStatus

__version__ = "0.1.0"

_HOMES = {
    "Client": "cortex.client",
    "Connection": "cortex.connection",
    "CortexManager": "cortex.integration.manager",
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

__all__ = [
    "Client",
    "Connection",
    "CortexError",
    "CortexManager",
    "JobEvent",
    "JobSpec",
    "JobStatus",
    "NodeView",
    "VersionView",
    "__version__",
    "find_connection",
    "load_job_file",
    "parse_job",
]


def __getattr__(name: str) -> object:
    """Import a public name from its home at its first use."""
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'cortex' has no attribute {name!r}")
    value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Public names, imported or not."""
    return sorted(__all__)
