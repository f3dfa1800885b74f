"""Datasets by name: what there is, how it is read, and how its examples are dealt to workers. Never imports torch."""

from __future__ import annotations

from cortex_common.data.catalogue import DatasetInfo, available_datasets, known_datasets
from cortex_common.data.fashion import default_cache_dir
from cortex_common.data.loading import Dataset, fetch, load
from cortex_common.data.partition import Partition, partition

__all__ = [
    "Dataset",
    "DatasetInfo",
    "Partition",
    "available_datasets",
    "default_cache_dir",
    "fetch",
    "known_datasets",
    "load",
    "partition",
]
