"""The SDK: submit jobs to a running network, follow them, fetch their models."""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self, TypeVar

from cortex.connection import Connection, find_connection
from cortex.local.files import replacing
from cortex.local.layout import Layout
from cortex.local.status import running_report
from cortex.patience import Patience, Result
from cortex.views import IdentitiesView, JobEvent, KeyEpochView, NodeView, SealedDatasetView, VersionView
from cortex.wire import dataset_from_proto, identities_from_proto, key_epoch_from_proto, node_from_proto
from cortex_common.clock import Clock, SystemClock
from cortex_common.envelope import Envelope
from cortex_common.errors import CorruptError, UnauthenticatedError
from cortex_common.identity import Role
from cortex_common.job.spec import JobSpec
from cortex_common.job.statement import submission_of
from cortex_common.job.status import JobStatus
from cortex_common.job.wire import event_from_proto, spec_to_proto, status_from_proto, version_from_proto
from cortex_common.pb.v1 import (
    common_pb2,
    coordinator_pb2,
    coordinator_pb2_grpc,
    discovery_pb2,
    discovery_pb2_grpc,
    identity_pb2,
    identity_pb2_grpc,
)
from cortex_common.rpc.channel import RenewingSyncChannel
from cortex_common.rpc.errors import calling

if TYPE_CHECKING:
    from cortex.shipping import Cut
    from cortex_common.data.sealed import Described

Message = TypeVar("Message")
RPC_TIMEOUT_S = 15.0
# A service that is started again answers within seconds; a stream is worth waiting for longer.
CALL_PATIENCE_S = 10.0
WATCH_PATIENCE_S = 300.0
# As long as sealing anew all that is stored of a large job.
_SEAL_S = 3600.0


class Client:
    """A person's line to a network. Not tied to a thread; close it, or use it as a context manager.

    Args:
        connection: Which network; by default the one `find_connection` finds.
        directory: Shortcut for the network that `cortex up --dir DIR` started.
        clock: For tests.

    Raises:
        NotFoundError: no network to be found; says how to start one.
    """

    def __init__(
        self, connection: Connection | None = None, *, directory: Path | str | None = None, clock: Clock | None = None
    ) -> None:
        found = connection or find_connection(Path(directory) if directory is not None else None)
        self.connection = found
        self._clock = clock or SystemClock()
        self._lines = {
            Role.COORDINATOR: RenewingSyncChannel(found.coordinator, found.tls, Role.COORDINATOR),
            Role.DISCOVERY: RenewingSyncChannel(found.discovery, found.tls, Role.DISCOVERY),
        }

    @property
    def _jobs(self) -> coordinator_pb2_grpc.JobServiceStub:
        return coordinator_pb2_grpc.JobServiceStub(self._lines[Role.COORDINATOR].current())

    @property
    def _keys(self) -> coordinator_pb2_grpc.KeyServiceStub:
        return coordinator_pb2_grpc.KeyServiceStub(self._lines[Role.COORDINATOR].current())

    @property
    def _datasets(self) -> coordinator_pb2_grpc.DatasetServiceStub:
        return coordinator_pb2_grpc.DatasetServiceStub(self._lines[Role.COORDINATOR].current())

    @property
    def _nodes(self) -> discovery_pb2_grpc.DiscoveryServiceStub:
        return discovery_pb2_grpc.DiscoveryServiceStub(self._lines[Role.DISCOVERY].current())

    @property
    def _identities(self) -> identity_pb2_grpc.IdentityServiceStub:
        return identity_pb2_grpc.IdentityServiceStub(self._lines[Role.DISCOVERY].current())

    def submit(self, job: JobSpec | Envelope | Mapping[str, object] | Path | str, request_id: str | None = None) -> str:
        """Submit a job and return its id once it is stored durably.

        Args:
            job: A job, the same as a mapping, one that is signed, or the path of a job file, signed or not.
            request_id: The same id again gives the same job, whatever happened in between; chosen at random by default.

        Raises:
            InvalidArgumentError: lists every mistake in the job.
        """
        request = coordinator_pb2.SubmitJobRequest(request_id=request_id or uuid.uuid4().hex)
        given = submission_of(job)
        if isinstance(given, Envelope):
            request.signed_job = given.to_json()
        else:
            request.job.CopyFrom(spec_to_proto(given))
        return self._call(lambda: self._jobs.SubmitJob(request, timeout=RPC_TIMEOUT_S).job_id)

    def status(self, job_id: str) -> JobStatus:
        """Where a job stands.

        Raises:
            NotFoundError: no such job.
        """
        request = coordinator_pb2.GetJobRequest(job_id=job_id)
        return self._call(lambda: status_from_proto(self._jobs.GetJob(request, timeout=RPC_TIMEOUT_S).job))

    def jobs(self, limit: int = 100) -> list[JobStatus]:
        """The newest jobs first, without their history."""
        request = coordinator_pb2.ListJobsRequest(limit=limit)
        answer = self._call(lambda: self._jobs.ListJobs(request, timeout=RPC_TIMEOUT_S))
        return [status_from_proto(job) for job in answer.jobs]

    def watch(self, job_id: str, on_away: Callable[[str], None] = lambda _: None) -> Iterator[JobStatus]:
        """The status now and at each change, until the job has ended; goes on through restarts of the coordinator.

        Args:
            job_id: Which job.
            on_away: Told why, each time the coordinator cannot be reached.

        Raises:
            NotFoundError: no such job.
            UnavailableError: the coordinator was away for five minutes.
        """
        request = coordinator_pb2.WatchJobRequest(job_id=job_id)

        def attempt() -> Iterator[JobStatus]:
            messages = self._stream(lambda: self._jobs.WatchJob(request, wait_for_ready=False))
            return (status_from_proto(message.job) for message in messages)

        for status in self._patience(WATCH_PATIENCE_S).stream(attempt, on_away):
            yield status
            if status.status.is_terminal:
                return

    def wait(self, job_id: str) -> JobStatus:
        """The status of a job once it has ended."""
        for status in self.watch(job_id):
            if status.status.is_terminal:
                return status
        return self.status(job_id)

    def cancel(self, job_id: str) -> None:
        """End a job; what it has trained so far stays.

        Raises:
            PreconditionError: it has ended otherwise.
        """
        request = coordinator_pb2.CancelJobRequest(job_id=job_id)
        self._call(lambda: self._jobs.CancelJob(request, timeout=RPC_TIMEOUT_S))

    def pause(self, job_id: str) -> None:
        """Stop a job after the round in progress."""
        request = coordinator_pb2.PauseJobRequest(job_id=job_id)
        self._call(lambda: self._jobs.PauseJob(request, timeout=RPC_TIMEOUT_S))

    def resume(self, job_id: str) -> None:
        """Go on with a paused job.

        Raises:
            PreconditionError: it is not paused.
        """
        request = coordinator_pb2.ResumeJobRequest(job_id=job_id)
        self._call(lambda: self._jobs.ResumeJob(request, timeout=RPC_TIMEOUT_S))

    def events(self, job_id: str, follow: bool = False, after: int = 0) -> Iterator[JobEvent]:
        """What happened to a job so far and, with `follow`, goes on to happen until it has ended."""
        seen = after

        def attempt() -> Iterator[JobEvent]:
            def start() -> Iterator[coordinator_pb2.WatchEventsResponse]:
                request = coordinator_pb2.WatchEventsRequest(job_id=job_id, follow=follow, after=seen)
                return self._jobs.WatchEvents(request)

            return (event_from_proto(message.event) for message in self._stream(start))

        for event in self._patience(WATCH_PATIENCE_S if follow else CALL_PATIENCE_S).stream(attempt):
            seen = max(seen, event.sequence)
            yield event

    def versions(self, job_id: str) -> list[VersionView]:
        """The stored versions of a job's model."""
        request = coordinator_pb2.ListVersionsRequest(job_id=job_id)
        answer = self._call(lambda: self._jobs.ListVersions(request, timeout=RPC_TIMEOUT_S))
        return [version_from_proto(version) for version in answer.versions]

    def download_model(
        self,
        job_id: str,
        round_number: int | None,
        path: Path,
        on_progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> VersionView:
        """Write a version as a safetensors file; `path` appears only when it is whole and its digest is right.

        Args:
            job_id: Which job.
            round_number: Which version; None for the newest.
            path: The file to write.
            on_progress: Told bytes done and in all.

        Raises:
            NotFoundError: no such job, or no such version any more.
            CorruptError: what arrived is not what was announced.
        """

        def attempt() -> VersionView:
            with calling(self._name(Role.COORDINATOR)), replacing(path) as file:
                request = coordinator_pb2.DownloadModelRequest(job_id=job_id, round=round_number)
                digest, done, version = hashlib.sha256(), 0, None
                for message in self._jobs.DownloadModel(request):
                    version = version_from_proto(message.version) if message.HasField("version") else version
                    file.write(message.data)
                    digest.update(message.data)
                    done += len(message.data)
                    on_progress(done, version.size_bytes if version else 0)
                return _verified(job_id, version, digest.hexdigest(), done)

        return self._patience(CALL_PATIENCE_S).call(attempt)

    def nodes(self) -> list[NodeView]:
        """Every node known to discovery, those that are gone included for an hour."""
        request = discovery_pb2.ListNodesRequest()
        answer = self._call(lambda: self._nodes.ListNodes(request, timeout=RPC_TIMEOUT_S), Role.DISCOVERY)
        return [node_from_proto(node) for node in answer.nodes]

    def close(self) -> None:
        """Close the line."""
        for line in self._lines.values():
            line.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def join_token(self, role: Role, name: str, region: str, life_s: float) -> tuple[str, datetime]:
        """A token with which one node may join the network, once, and when it expires.

        Raises:
            AlreadyExistsError: the name belongs to a node of another role.
        """
        kind = common_pb2.Role.Value(f"ROLE_{role.name}")
        request = identity_pb2.CreateJoinTokenRequest(role=kind, name=name, region=region, life_s=life_s)
        answer = self._call(lambda: self._identities.CreateJoinToken(request, timeout=RPC_TIMEOUT_S), Role.DISCOVERY)
        return answer.token, answer.expires_at.ToDatetime(UTC)

    def node_token(self, name: str, region: str, life_s: float = 0.0) -> tuple[str, datetime]:
        """A token with which a worker takes part over WebSocket until it expires, and when that is.

        Args:
            name: The node's; the token is good for no other.
            region: Where the node is.
            life_s: Seconds; 0 means 30 days.

        Raises:
            AlreadyExistsError: the name belongs to a node of another role.
        """
        request = identity_pb2.CreateNodeTokenRequest(name=name, region=region, life_s=life_s)
        answer = self._call(lambda: self._identities.CreateNodeToken(request, timeout=RPC_TIMEOUT_S), Role.DISCOVERY)
        return answer.token, answer.expires_at.ToDatetime(UTC)

    def identities(self) -> IdentitiesView:
        """Who has certificates of the network, who is shut out, which join tokens are open."""
        request = identity_pb2.ListIdentitiesRequest()
        answer = self._call(lambda: self._identities.ListIdentities(request, timeout=RPC_TIMEOUT_S), Role.DISCOVERY)
        return identities_from_proto(answer)

    def revoke_node(self, name: str, reason: str = "", role: Role | None = None) -> list[str]:
        """Shut a node out; the identities this concerns.

        Raises:
            NotFoundError: nobody has the name.
        """
        kind = common_pb2.ROLE_UNSPECIFIED if role is None else common_pb2.Role.Value(f"ROLE_{role.name}")
        request = identity_pb2.RevokeNodeRequest(name=name, role=kind, reason=reason)
        answer = self._call(lambda: self._identities.RevokeNode(request, timeout=RPC_TIMEOUT_S), Role.DISCOVERY)
        return list(answer.identities)

    def rotate_authority(self, *, root: bool = False) -> list[str]:
        """Have a new issuing authority made, or a new root too; what was made.

        Raises:
            PreconditionError: there is no authority, or the root's key is kept elsewhere.
        """
        request = identity_pb2.RotateAuthorityRequest(root=root)
        answer = self._call(lambda: self._identities.RotateAuthority(request, timeout=RPC_TIMEOUT_S), Role.DISCOVERY)
        return list(answer.made)

    def keys(self, job_id: str = "") -> list[KeyEpochView]:
        """The data keys of a job, or of every job that has not ended; never their bytes.

        Raises:
            NotFoundError: no such job.
        """
        request = coordinator_pb2.ListKeysRequest(job_id=job_id)
        answer = self._call(lambda: self._keys.ListKeys(request, timeout=RPC_TIMEOUT_S), Role.COORDINATOR)
        return [key_epoch_from_proto(each) for each in answer.epochs]

    def rotate_data_key(self, job_id: str, *, reseal: bool = False) -> int:
        """Have the next round of a job begin with a new data key.

        Args:
            job_id: Which.
            reseal: Seal everything that is stored of it under the new key too; an ended job's at once.

        Returns:
            Versions of an ended job that were sealed anew.

        Raises:
            NotFoundError: no such job.
            PreconditionError: it has ended, and `reseal` is not set.
        """
        request = coordinator_pb2.RotateDataKeyRequest(job_id=job_id, reseal=reseal)
        answer = self._call(lambda: self._keys.RotateDataKey(request, timeout=_SEAL_S), Role.COORDINATOR)
        return answer.resealed

    def rotate_key_encryption_key(self) -> tuple[str, int]:
        """Have every data key wrapped under a new key-encryption key; its id, and how many data keys there are.

        Raises:
            PreconditionError: where the keys are cannot be written.
        """
        request = coordinator_pb2.RotateKeyEncryptionKeyRequest()
        answer = self._call(lambda: self._keys.RotateKeyEncryptionKey(request, timeout=_SEAL_S), Role.COORDINATOR)
        return answer.kek_id, answer.rewrapped

    def add_dataset(
        self,
        folder: Path,
        told: Described,
        key: bytes,
        org: str,
        on_shard: Callable[[str, int], None] = lambda aggregator, index: None,
        on_cut: Callable[[str, Cut], None] = lambda aggregator, cut: None,
    ) -> list[str]:
        """Bring a sealed data set to every aggregator, and its key to the coordinator; the aggregators it is at.

        Args:
            folder: Where its shards are.
            told: Its manifest, see `cortex.shipping.read_manifest`.
            key: The data set's.
            org: Whose jobs may train on it.
            on_shard: Told of each that has arrived, and where.
            on_cut: Told of each upload that goes on in the middle of a shard, and where.

        Raises:
            UnavailableError: there is no aggregator, or one cannot be reached; another call goes on with what arrived.
            AlreadyExistsError: it is known with another key, or for another organisation.
        """
        from cortex.shipping import ship_everywhere

        aggregators = self._aggregators()
        ship_everywhere(aggregators, self.connection.tls, folder, told, on_shard, on_cut, self._patience)
        request = coordinator_pb2.AddDatasetRequest(manifest=told.envelope.to_json(), key=key, org=org)
        self._call(lambda: self._datasets.AddDataset(request, timeout=RPC_TIMEOUT_S))
        return list(aggregators)

    def datasets(self) -> list[SealedDatasetView]:
        """The sealed data sets that jobs may train on."""
        request = coordinator_pb2.ListDatasetsRequest()
        answer = self._call(lambda: self._datasets.ListDatasets(request, timeout=RPC_TIMEOUT_S))
        return [dataset_from_proto(each) for each in answer.datasets]

    def remove_dataset(self, reference: str) -> int:
        """Erase the key to a data set, then its shards; how many of these there were.

        Raises:
            NotFoundError: there is none.
            PreconditionError: a job trains on it.
        """
        from cortex.shipping import drop_shards

        request = coordinator_pb2.RemoveDatasetRequest(reference=reference)
        answer = self._call(lambda: self._datasets.RemoveDataset(request, timeout=RPC_TIMEOUT_S))
        digests = list(answer.shard_sha256)
        return sum(drop_shards(address, self.connection.tls, digests) for address in self._aggregators().values())

    def _aggregators(self) -> dict[str, str]:
        """Addresses of the aggregators that live."""
        live = (node for node in self.nodes() if node.role == Role.AGGREGATOR and node.health != "expired")
        return {node.name: node.address for node in live if node.address}

    def _stream(self, start: Callable[[], Iterator[Message]]) -> Iterator[Message]:
        """Messages of a call to the coordinator, made again if it ended with its certificate and there is a new one."""
        line = self._lines[Role.COORDINATOR]
        while True:
            before = line.current()
            try:
                with calling(self._name(Role.COORDINATOR)):
                    yield from start()
            except UnauthenticatedError:
                if line.current() is before:
                    raise
            else:
                return

    def _call(self, attempt: Callable[[], Result], role: Role = Role.COORDINATOR) -> Result:
        def named() -> Result:
            with calling(self._name(role)):
                return attempt()

        return self._patience(CALL_PATIENCE_S).call(named)

    def _patience(self, limit_s: float) -> Patience:
        return Patience(self._clock, limit_s, self._is_hopeless)

    def _is_hopeless(self) -> str | None:
        """Nobody starts the services of a local network again when its supervisor is gone."""
        directory = self.connection.directory
        if directory is None or running_report(Layout.of(directory)) is not None:
            return None
        return f"the network in {directory} is not running; start it with `cortex up --dir {directory}`"

    def _name(self, role: Role) -> str:
        address = self.connection.coordinator if role is Role.COORDINATOR else self.connection.discovery
        return f"{role.value} at {address}"


def _verified(job_id: str, version: VersionView | None, digest: str, size_bytes: int) -> VersionView:
    if version is None:
        raise CorruptError(f"model of job {job_id}: the answer names no version")
    if version.sha256 != digest or version.size_bytes != size_bytes:
        raise CorruptError(
            f"model of job {job_id}, round {version.round}: {size_bytes} bytes with sha256 {digest} arrived, "
            f"announced were {version.size_bytes} with {version.sha256}"
        )
    return version
