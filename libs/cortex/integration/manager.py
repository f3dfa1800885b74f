"""CortexManager: a training node inside a person's own program."""

from __future__ import annotations

import asyncio
import importlib
from base64 import b64decode
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cortex.integration.access import Access
from cortex.integration.joining import job_of, join
from cortex.integration.paths import check_paths
from cortex.integration.reporting import Bar, Scalars, progress_bar, write_checkpoint
from cortex.integration.settings import ManagerSettings, load_manager_settings
from cortex_common.clock import SystemClock
from cortex_common.errors import (
    CortexError,
    InvalidArgumentError,
    NotFoundError,
    OverloadedError,
    PreconditionError,
    UnavailableError,
)
from cortex_common.ids import JobId
from cortex_common.job.site_policy import SitePolicy
from cortex_common.job.status import JobPhase, JobStatus, RoundReport
from cortex_common.logging import configure_logging, get_logger
from cortex_common.security.sealing import SealingKey
from cortex_common.transfer.retrying import Patience

if TYPE_CHECKING:
    from cortex_common.model import CortexModel

_log = get_logger(__name__)

_LOOK_EVERY_S = 1.0
_SILENCE_S = 300.0
_METRICS_HOST = "127.0.0.1"


class CortexManager:
    """A training node in your own program, on your own data: any torch DataLoader of (inputs, labels).

    The data never leaves the program; sealed weights do, over one outgoing WebSocket connection.

    >>> from cortex import CortexManager
    >>> manager = CortexManager("config.yaml")
    >>> await manager.initialize()
    >>> job = await manager.start_training(dataloader)
    >>> job.status.value, [report.round for report in manager.history]
    ('completed', [1, 2, 3])
    >>> bool((manager.model(inputs).argmax(1) == labels).float().mean() > 0.9)
    True

    Attributes:
        model: The trained network, a `CortexModel`, once the job has ended; None before.
        history: Reports of the rounds so far, oldest first.
        status: The job as last heard of; None before there is one.
    """

    def __init__(self, config: Path | str, environment: Mapping[str, str] | None = None) -> None:
        """Read the settings.

        Args:
            config: The path of a config.yaml (docs/manager.md lists its keys).
            environment: Where `CORTEX_<SECTION>__<KEY>` variables are looked up; that of the process by default.

        Raises:
            NotFoundError: no such file.
            InvalidArgumentError: every mistake in it at once.
        """
        self.settings: ManagerSettings = load_manager_settings(Path(config), environment)
        self.model: CortexModel | None = None
        self.history: tuple[RoundReport, ...] = ()
        self.status: JobStatus | None = None
        self._sealing: SealingKey | None = None
        self._access: Access | None = None
        self._worker: Any = None
        self._checkpointed: set[int] = set()

    @property
    def metrics_port(self) -> int:
        """Where Prometheus finds this node's metrics while it trains; 0 if nowhere."""
        return int(self._worker.metrics_port) if self._worker is not None else 0

    async def initialize(self) -> None:
        """Connect to the network and see that it takes this node.

        Raises:
            UnavailableError: no network answers, after `network.retry_attempts` of `network.connection_timeout` seconds
                each; says how to start one.
            UnauthenticatedError, ForbiddenError: it refuses this node; says why.
            NotFoundError: there is no token for this node; says how to make one.
            InvalidArgumentError: a folder of the settings cannot be written, a file is not there, or
                `security.enable_encryption` is false, or the file `security.site_policy` is wrong: lists every mistake.
        """
        settings = self.settings
        configure_logging(settings.network.node_id, settings.monitoring.log_level, json=False)
        check_paths(settings)
        if not settings.security.enable_encryption:
            raise InvalidArgumentError(
                "security.enable_encryption: false given; networks of this version take sealed updates only and have "
                "no setting that allows others (docs/manager.md says why); allowed: true"
            )
        if (policy := settings.security.site_policy) is not None:
            SitePolicy.read(policy.expanduser())
        access = Access(settings, self._key("cortex"))
        await access.check(lambda reason: _log.warning("network_away", reason=reason))
        self._sealing = self._key(access.network)
        self._access = access

    async def start_training(self, dataloader: Any) -> JobStatus:
        """Join the running job over this node's data, or submit one; take part until it has ended.

        Args:
            dataloader: A torch DataLoader of (inputs, labels): inputs of `training.input_dim` values, labels from 0 to
                `training.output_dim` - 1.

        Returns:
            The job as it ended; `model` and `history` are set.

        Raises:
            InvalidArgumentError: the data does not fit the settings, or the optimizer refuses its options, or this
                machine has no such device, or the job to submit breaks the site's policy:
                says which rules of which file, and what they allow.
            PreconditionError: the job failed or was cancelled, or the site's policy forbids it by now; says why.
            CortexError: the network is away, or does not take this node or its job.
        """
        if self._access is None:
            await self.initialize()
        self.model, self.status, self.history, self._checkpointed = None, None, (), set()
        worker = self._embedded(dataloader)
        scalars = Scalars(self.settings.monitoring.tensorboard_dir)
        try:
            with progress_bar(self.settings) as bar:
                await worker.start()
                self._worker = worker
                self._tell_where_metrics_are()
                assert self._access is not None  # noqa: S101  initialised
                job_id = await join(worker, self._access.client, self.settings, SystemClock())
                status = await self._follow(job_id, bar, scalars)
            return await self._ended(job_id, status)
        finally:
            self._worker = None
            scalars.close()
            await worker.close()

    def run(self, dataloader: Any) -> JobStatus:
        """`initialize` and `start_training` for programs without an event loop; in a notebook, await those instead.

        Raises:
            PreconditionError: an event loop is running.
            CortexError: as those two.
        """
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            return asyncio.run(self.start_training(dataloader))
        raise PreconditionError(
            "manager.run() inside a running event loop, such as a notebook's; there: "
            "await manager.initialize(), then await manager.start_training(dataloader)"
        )

    def _key(self, network: str) -> SealingKey:
        """The sealing key given, or the one kept beside this node's state."""
        given = self.settings.security.encryption_key
        if given is not None:
            return SealingKey.of(network, b64decode(given.get_secret_value()))
        path = self.settings.node_dir / "sealing.key"
        key, is_new = SealingKey.kept(network, path)
        if is_new:
            _log.info("encryption_key_made", path=str(path), mode="0600")
        return key

    def _embedded(self, dataloader: Any) -> Any:
        """The worker in this program."""
        assert self._access is not None and self._sealing is not None  # noqa: S101, PT018  initialised
        settings, network = self.settings, self.settings.network
        token = network.token.get_secret_value() if network.token else None
        facts: dict[str, object] = {
            "network": self._access.network,
            "name": network.node_id,
            "region": network.region,
            "state_dir": settings.node_dir,
            "gateway_url": network.websocket_url,
            "gateway_ca": network.ca,
            "gateway_timeout_s": network.connection_timeout,
            "gateway_attempts": network.retry_attempts,
            "node_token": token,
            "node_token_file": None if token else self._access.token_file,
            "metrics_host": _METRICS_HOST,
            "metrics_port": settings.monitoring.metrics_port if settings.monitoring.enable_prometheus else 0,
            "device": settings.training.device,
            "site_policy": settings.security.site_policy,
        }
        return _module().EmbeddedWorker(
            facts,
            dataloader,
            job_of(settings),
            self._sealing,
            serves_metrics=settings.monitoring.enable_prometheus,
        )

    def _tell_where_metrics_are(self) -> None:
        if not self.settings.monitoring.enable_prometheus:
            return
        wanted, url = self.settings.monitoring.metrics_port, f"http://{_METRICS_HOST}:{self.metrics_port}/metrics"
        if wanted in (0, self.metrics_port):
            _log.info("metrics_served", url=url)
        else:
            _log.warning("metrics_elsewhere", reason=f"port {wanted} is taken", url=url)

    async def _follow(self, job_id: JobId, bar: Bar, scalars: Scalars) -> JobStatus:
        """Show the job until it has ended.

        Raises:
            PreconditionError: the site's policy has changed, or what may leave the site is used up.
            UnavailableError: nobody says any more where it stands.
        """
        patience = Patience(_SILENCE_S)
        while True:
            if rules := self._worker.refused(job_id):
                policy, told = self.settings.security.site_policy, "; ".join(map(str, rules))
                raise PreconditionError(
                    f"site policy {policy}: this node takes no part in job {job_id} any more: {told}"
                )
            status = await self._look(job_id, patience)
            if status is not None:
                for report in status.history[len(self.history) :]:
                    scalars.write(job_id, report)
                self.status, self.history = status, status.history
                bar.show(status, self._worker.activity)
                await self._checkpoint(status)
                if status.status.is_terminal:
                    return status
            await self._worker.changed(_LOOK_EVERY_S)

    async def _look(self, job_id: JobId, patience: Patience) -> JobStatus | None:
        """Where the job stands; None while nobody can say: the worker knows when its line was away for too long.

        Raises:
            UnavailableError: there is a line, and yet nobody could say for minutes.
        """
        try:
            status: JobStatus = await self._worker.status(job_id)
        except (UnavailableError, OverloadedError, NotFoundError) as error:
            if patience.is_over():
                raise UnavailableError(f"job {job_id}: nobody says any more where it stands: {error.message}") from None
            return None
        patience.renew()
        return status

    async def _checkpoint(self, status: JobStatus) -> None:
        """Write the newest version; at the end also those before it that rounds were too quick for."""
        directory, keep = self.settings.training.checkpoint_dir, self.settings.training.checkpoint_keep
        if directory is None:
            return
        job_id = JobId(status.job_id)
        for report in status.history[-keep if status.status.is_terminal else -1 :]:
            if report.round in self._checkpointed:
                continue
            try:
                _, manifest, arena = await self._worker.model(job_id, report.model_sha256, report.round)
                name = f"{job_id}-{report.round}"
                await asyncio.to_thread(write_checkpoint, directory.expanduser(), keep, name, manifest, arena)
            except (CortexError, OSError) as error:
                _log.warning("checkpoint_left_out", round=report.round, reason=str(error))
            else:
                self._checkpointed.add(report.round)

    async def _ended(self, job_id: JobId, status: JobStatus) -> JobStatus:
        """Take the model home, and say how the job ended."""
        if status.model is not None:
            try:
                self.model, _, _ = await self._worker.model(job_id, status.model.sha256, status.model.round)
            except CortexError as error:
                if status.status is JobPhase.COMPLETED:
                    raise
                # How the job ended says more than why there is no model of it.
                _log.warning("model_left_out", round=status.model.round, reason=error.message)
        if status.status is not JobPhase.COMPLETED:
            raise PreconditionError(f"job {job_id} {status.status.value}: {status.error or 'by somebody'}")
        _log.info("job_completed", job_id=job_id, rounds=status.round, **dict(status.metrics))
        return status


def _module() -> Any:
    """The worker, whose packages need not be there for everything else."""
    try:
        return importlib.import_module("services.worker.embedded")
    except ModuleNotFoundError as error:
        raise CortexError(
            f"training needs the Python module {error.name!r}, which is not installed; "
            "`pip install 'cortex-training[worker]'` brings it"
        ) from error
