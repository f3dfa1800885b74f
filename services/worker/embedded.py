"""A worker inside a person's own program: what `cortex.CortexManager` stands on."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from functools import partial
from typing import Any

from cortex_common.clock import SystemClock
from cortex_common.data import DatasetInfo
from cortex_common.errors import CortexError, InvalidArgumentError, UnavailableError
from cortex_common.ids import JobId, KeyId, RoundNumber, Sha256Hex
from cortex_common.job.site_policy import Refusal
from cortex_common.job.spec import JobSpec, TrainingSpec
from cortex_common.job.status import JobStatus
from cortex_common.logging import get_logger
from cortex_common.network.bridge import TenzroBridge
from cortex_common.network.messages import Assignments, JobStatusMessage, JobStatusRequest
from cortex_common.network.work import Assignment
from cortex_common.security.encryption import EncryptionManager
from cortex_common.security.objects import WrappedKey
from cortex_common.security.sealing import SealingKey
from cortex_common.tensors import Arena, Manifest
from cortex_common.transfer import pull_model
from services.worker.failures import WorkFailedError
from services.worker.gate import POLICY_UNUSABLE
from services.worker.main import RunningWorker, run
from services.worker.own import OwnParts
from services.worker.settings import WorkerSettings
from services.worker.trainer.device import choose_device
from services.worker.trainer.loader import LoaderData, model_of
from services.worker.trainer.optimisers import check_optimizer
from services.worker.trainer_thread import TrainerThread

_log = get_logger(__name__)

MODEL_PATIENCE_S = 60.0
"""A download of a version is given up when nothing of it has come for so long."""


class EmbeddedWorker:
    """A worker over WebSocket that trains on a program's own DataLoader, in a thread of it."""

    def __init__(
        self,
        settings: Mapping[str, object],
        loader: Any,
        job: JobSpec,
        sealing: SealingKey,
        *,
        serves_metrics: bool,
    ) -> None:
        """Look at the data, and at what training on it needs; nothing is connected yet.

        Args:
            settings: Of `WorkerSettings`.
            loader: A torch DataLoader of (inputs, labels).
            job: What it is for: the model it must fit, the optimizer and the device that must be there. The data have
                the name of its training data.
            sealing: This node's key.
            serves_metrics: Whether to listen for Prometheus.

        Raises:
            InvalidArgumentError: the data does not fit the model, or this program cannot train so; says how.
        """
        self._settings = WorkerSettings.model_validate(settings)
        model = job.model
        _check_training(job.training, self._settings.device)
        data = LoaderData(loader, model)
        _tell_whose_batches(data.batch_size, job.training.batch_size)
        info = DatasetInfo(job.data.train, (model.input_dim,), model.output_dim, data.examples)
        start = partial(TrainerThread.start, self._settings.device, lambda _spec, _message: data)
        self._sealing = sealing
        self._own = OwnParts(start, (info,), sealing, model, serves_metrics=serves_metrics)
        self._stop = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._running: RunningWorker | None = None
        self._assigned: dict[JobId, Assignment] = {}
        self._refused: dict[JobId, tuple[Refusal, ...]] = {}
        self._keys: dict[JobId, dict[KeyId, WrappedKey]] = {}
        self._changed = asyncio.Event()

    @property
    def metrics_port(self) -> int:
        """Where Prometheus finds the metrics."""
        return self._running.metrics_port if self._running else 0

    @property
    def activity(self) -> str:
        """What is being done, in words."""
        return self._running.supervisor.activity if self._running else "starting"

    async def start(self) -> None:
        """Join the network.

        Raises:
            CortexError: it does not let this node in, or is away.
        """
        started: asyncio.Future[RunningWorker] = asyncio.get_running_loop().create_future()
        self._task = asyncio.create_task(run(self._settings, SystemClock(), self._stop, started, self._own))
        await asyncio.wait((self._task, started), return_when=asyncio.FIRST_COMPLETED)
        await self._alive()
        self._running = started.result()
        self._bridge.on(Assignments, self._assign)
        self._bridge.on(JobStatusMessage, lambda _: self._changed.set())
        await self._first_of(self._bridge.opened())

    async def assigned(self, timeout_s: float) -> JobId | None:
        """The first job this node has work of, and that its site does not refuse; None if there is none in time.

        Raises:
            CortexError: the worker has ended.
        """
        end_s = asyncio.get_running_loop().time() + timeout_s
        while not self._assigned:
            left_s = end_s - asyncio.get_running_loop().time()
            if left_s <= 0:
                return None
            await self.changed(left_s)
        return next(iter(self._assigned))

    def refusals(self, job: JobSpec) -> tuple[Refusal, ...]:
        """The rules of this site that a job breaks which is to be submitted here.

        Raises:
            UnavailableError: this node has not joined yet.
        """
        return self._joined.gate.refusals_of_own(job)

    def refused(self, job_id: JobId) -> tuple[Refusal, ...]:
        """The rules by which this site takes no part in a job any more; none while only its policy is not readable."""
        return tuple(each for each in self._refused.get(job_id, ()) if each.rule != POLICY_UNUSABLE)

    async def changed(self, timeout_s: float) -> None:
        """Return at the next news of a job, and when time is up.

        Raises:
            CortexError: the worker has ended.
        """
        await self._first_of(asyncio.wait_for(self._changed.wait(), timeout_s))
        self._changed.clear()

    async def status(self, job_id: JobId) -> JobStatus:
        """Where a job of this node stands.

        Raises:
            CortexError: it has not had work of it yet, or the network is away.
        """
        answer = await self._bridge.ask(JobStatusRequest(job_id))
        if not isinstance(answer, JobStatusMessage):
            raise CortexError(f"{self._bridge.what} answered a request for a status with {type(answer).__name__}")
        return answer.job

    async def model(self, job_id: JobId, sha256: str, round_number: int) -> tuple[Any, Manifest, Arena]:
        """A version of a job of this node: the network, the layout and the numbers.

        Raises:
            CortexError: the network does not have it any more, or has been away for a minute.
        """
        assignment = self._assigned.get(job_id)
        if assignment is None:
            raise UnavailableError(f"this node has had no work of job {job_id} yet")
        held: list[tuple[Manifest, Arena]] = []

        def allocate(manifest: Manifest) -> Arena:
            held[:] = [(manifest, Arena.zeros(manifest))]
            return held[0][1]

        keys = self._keys[job_id].values()
        encryption = EncryptionManager(*(self._sealing.unwrap(job_id, key) for key in keys))
        channel = self._bridge.to(assignment.aggregator_address, assignment.aggregator)
        await pull_model(
            lambda: channel,
            job_id,
            Sha256Hex(sha256),
            "",
            encryption,
            allocate,
            RoundNumber(round_number),
            patience_s=MODEL_PATIENCE_S,
        )
        manifest, arena = held[0]
        return model_of(assignment.spec.model, arena), manifest, arena

    async def close(self) -> None:
        """Leave the network, and end the trainer."""
        self._stop.set()
        if self._task is not None:
            await asyncio.wait((self._task,))

    @property
    def _joined(self) -> RunningWorker:
        if self._running is None:
            raise UnavailableError("this node has not joined yet")
        return self._running

    @property
    def _bridge(self) -> TenzroBridge:
        return self._joined.bridge

    def _assign(self, message: Assignments) -> None:
        for each in message.assignments:
            self._refused[each.job_id] = self._joined.gate.refusals(each)
            if self._refused[each.job_id]:
                continue
            self._assigned[each.job_id] = each
            # A version may rest under a key that was replaced since: all that this node was given may be needed.
            known = self._keys.setdefault(each.job_id, {})
            known |= {key.key_id: key for key in (*each.older_keys, each.data_key)}
        self._changed.set()

    async def _first_of(self, waiting: Any) -> None:
        """Wait for it, or for the end of the worker."""
        assert self._task is not None  # noqa: S101  started
        wanted = asyncio.ensure_future(waiting)
        try:
            await asyncio.wait((wanted, self._task), return_when=asyncio.FIRST_COMPLETED)
        finally:
            wanted.cancel()
            await asyncio.wait((wanted,))
        await self._alive()

    async def _alive(self) -> None:
        """Raise what ended the worker, if it has ended."""
        if self._task is None or not self._task.done():
            return
        try:
            await self._task
        except BaseExceptionGroup as group:
            told = group.subgroup(CortexError)
            if told is None:
                raise
            raise _leaf(told) from group
        raise UnavailableError("the worker has ended")


def _check_training(training: TrainingSpec, rule: str) -> None:
    """Find out here, instead of in a job that fails on every node."""
    check_optimizer(training)
    try:
        choose_device(training.device, rule)
    except WorkFailedError as error:
        raise InvalidArgumentError(str(error)) from None


def _tell_whose_batches(given: int | None, wanted: int) -> None:
    """The loader cuts the batches: say so, where the file says something else."""
    if given not in (None, wanted):
        reason = f"this node takes the DataLoader's batches of {given}; training.batch_size is for workers in its job"
        _log.warning("batch_size_not_used", batch_size=wanted, reason=reason)


def _leaf(group: BaseExceptionGroup[CortexError]) -> CortexError:
    first = group.exceptions[0]
    return _leaf(first) if isinstance(first, BaseExceptionGroup) else first
