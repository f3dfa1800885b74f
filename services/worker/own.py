"""What a program brings that has a worker inside itself."""

from __future__ import annotations

from dataclasses import dataclass

from cortex_common.data import DatasetInfo
from cortex_common.job.spec import ModelSpec
from cortex_common.security.sealing import SealingKey
from services.worker.slots import StartTrainer


@dataclass(frozen=True, slots=True)
class OwnParts:
    """In the place of what a worker has by itself.

    Attributes:
        start_trainer: Starts a trainer for one job.
        datasets: What can be trained on here; nothing else is offered to the network.
        sealing: Opens the keys of jobs.
        model: The network that the program is about; jobs with another one are refused.
        serves_metrics: Whether to listen for Prometheus.
    """

    start_trainer: StartTrainer
    datasets: tuple[DatasetInfo, ...]
    sealing: SealingKey
    model: ModelSpec
    serves_metrics: bool = True
