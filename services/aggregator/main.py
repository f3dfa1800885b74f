"""Composition root of an aggregator."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from cortex_common.clock import Clock, SystemClock
from cortex_common.identity import Identity, Role
from cortex_common.lifecycle import run_service, write_ready_file
from cortex_common.logging import configure_logging, get_logger
from cortex_common.network.enrolment import enroll_patiently
from cortex_common.network.heartbeat import NodeReport, heartbeat_forever
from cortex_common.network.membership import Membership
from cortex_common.rpc.aggregator_channels import AggregatorChannels
from cortex_common.rpc.auditing import auditing
from cortex_common.rpc.channel import open_channel
from cortex_common.rpc.denial import DenyList
from cortex_common.rpc.server import RunningService, serving
from cortex_common.security.sealing import SealingKey
from cortex_common.settings import load_settings
from cortex_common.storage import BlobStore, DirectoryBlobStore
from cortex_common.telemetry.collectors import publish_node
from cortex_common.telemetry.metrics import cortex_version, publish_build_info
from cortex_common.telemetry.ops_server import ops_server
from cortex_common.telemetry.resources import probe_resources
from cortex_common.tensors import ManifestLimits
from cortex_common.validation import ValidationManager
from services.aggregator.aggregation import WeightAggregator
from services.aggregator.batches import BatchProcessor
from services.aggregator.incoming_shards import IncomingShards
from services.aggregator.servicer import (
    ROUND_SERVICE,
    SHARD_SERVICE,
    WEIGHT_SERVICE,
    RoundServicer,
    ShardServicer,
    WeightServicer,
)
from services.aggregator.settings import AggregatorSettings
from services.aggregator.shards import ShardStore
from services.aggregator.store import DirectoryRoundStore
from services.aggregator.versions import VersionStore

log = get_logger(__name__)


def main(config: Path | None = None) -> int:
    """Run an aggregator until it is told to stop; the exit code."""
    settings = load_settings(AggregatorSettings, config, "aggregator")
    configure_logging("aggregator", settings.log_level, settings.log_json)
    return run_service(lambda stop: run(settings, SystemClock(), stop), parent_pid=settings.parent_pid)


@dataclass(frozen=True, slots=True)
class RunningAggregator(RunningService):
    """An aggregator at work."""

    aggregator: WeightAggregator


async def run(
    settings: AggregatorSettings,
    clock: Clock,
    stop: asyncio.Event,
    started: asyncio.Future[RunningAggregator] | None = None,
) -> None:
    """Take up what is on the disk, serve until `stop` is set, then drain."""
    await enroll_patiently(settings.joining, settings.tls, settings.hosts, clock, stop)
    identity = settings.identity(Role.AGGREGATOR)
    publish_build_info("aggregator")
    publish_node(settings.tls, settings.state_dir, clock)
    membership = Membership(settings.tls, settings.discovery, settings.state_dir / "denials.json", clock)
    shards = await asyncio.to_thread(_shards, settings, clock)
    async with (
        _aggregating(settings, identity, clock, membership.denied) as aggregator,
        ops_server(settings.metrics_host, settings.metrics_port, lambda: (not stop.is_set(), "")) as ops,
        auditing(settings.state_dir / "audit", settings.tls, clock) as auditor,
        serving(
            replace(settings.rpc(membership.denied, auditor, bulk=True), window_bytes=settings.window_bytes),
            [
                RoundServicer(aggregator, SealingKey(settings.network)).attach,
                WeightServicer(aggregator, shards).attach,
                ShardServicer(shards).attach,
            ],
            [ROUND_SERVICE, WEIGHT_SERVICE, SHARD_SERVICE],
        ) as server,
        asyncio.TaskGroup() as tasks,
    ):
        address = settings.advertised(server.port)
        beating = tasks.create_task(_beat(settings, _reporter(settings, identity, address, clock), clock, stop))
        keeping = tasks.create_task(membership.keep())
        log.info("serving", address=server.address, metrics_port=ops.port)
        if settings.ready_file is not None:
            facts = {"service": "aggregator", "name": settings.name, "address": address, "metrics_port": ops.port}
            write_ready_file(settings.ready_file, facts)
        if started is not None:
            started.set_result(RunningAggregator(server, aggregator))
        await stop.wait()
        server.set_serving(False)
        shards.stop()
        await aggregator.drain()
        await beating
        keeping.cancel()


@asynccontextmanager
async def _aggregating(
    settings: AggregatorSettings, identity: Identity, clock: Clock, denied: DenyList
) -> AsyncIterator[WeightAggregator]:
    """An aggregator over the state directory, restored."""
    processor = BatchProcessor(settings.fold_threads)
    channels = AggregatorChannels(settings.tls, denied, clock=clock)
    validation = ValidationManager(ManifestLimits(max_model_bytes=settings.max_model_bytes))
    aggregator = WeightAggregator(
        settings,
        identity.name,
        DirectoryRoundStore(settings.state_dir),
        VersionStore(await asyncio.to_thread(_blobs, settings, settings.versions, "versions")),
        validation,
        processor,
        channels,
        clock,
    )
    aggregator.restore()
    try:
        yield aggregator
    finally:
        await aggregator.close()
        await channels.close()
        processor.close()


def _shards(settings: AggregatorSettings, clock: Clock) -> ShardStore:
    """The shards that are here; unfinished ones are on the disk wherever the others are kept."""
    folder, life_s = settings.state_dir / "incoming", settings.unfinished_shard_life_s
    incoming = IncomingShards(folder, settings.disk_reserve_bytes, life_s, clock)
    return ShardStore(_blobs(settings, settings.shards, "shards"), incoming, settings.stream_idle_s)


def _blobs(settings: AggregatorSettings, url: str | None, folder: str) -> BlobStore:
    """A store of blobs: what the settings name, or a folder of the state directory."""
    if url is None:
        return DirectoryBlobStore(settings.state_dir / folder)
    # Only who wants an object store needs its client.
    from cortex_common.storage.remote import S3Access, S3BlobStore

    keys = (settings.s3_key_file, settings.s3_secret_file)
    return S3BlobStore(url, S3Access(settings.s3_endpoint, settings.s3_region, *keys))


async def _beat(
    settings: AggregatorSettings, report: Callable[[], NodeReport], clock: Clock, stop: asyncio.Event
) -> None:
    """Announce this node to discovery, if there is one."""
    if settings.discovery is None:
        return
    address = settings.discovery
    await heartbeat_forever(
        lambda: open_channel(address, settings.tls, Role.DISCOVERY, clock=clock),
        report,
        clock,
        stop,
        what=f"discovery at {address}",
    )


def _reporter(settings: AggregatorSettings, identity: Identity, address: str, clock: Clock) -> Callable[[], NodeReport]:
    """The aggregator as it describes itself."""
    incarnation, started_s = uuid.uuid4().hex, clock.wall_s()

    def report() -> NodeReport:
        return NodeReport(
            name=identity.name,
            role=identity.role,
            region=settings.region,
            address=address,
            incarnation=incarnation,
            version=cortex_version(),
            resources=probe_resources(settings.state_dir),
            started_s=started_s,
            activity="serving",
        )

    return report
