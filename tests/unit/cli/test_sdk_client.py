"""The SDK against a coordinator that says what the test tells it to, over real mutual TLS."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime

import grpc
import pytest

from cortex.client import Client
from cortex.connection import Connection
from cortex_common.errors import CorruptError, InvalidArgumentError, NotFoundError, UnavailableError
from cortex_common.identity import Role
from cortex_common.job.status import EventInfo, JobPhase, JobStatus, VersionInfo
from cortex_common.job.wire import event_to_proto, status_to_proto, version_to_proto
from cortex_common.pb.v1 import common_pb2, coordinator_pb2, coordinator_pb2_grpc, discovery_pb2, discovery_pb2_grpc

NOW = datetime(2026, 1, 1, tzinfo=UTC)
MODEL = b"weights" * 1000
JOB = {"model": {"kind": "mlp", "input_dim": 64, "hidden_dims": [8], "output_dim": 10}, "data": {"train": "digits"}}


def status(phase: JobPhase, round_number: int = 0) -> JobStatus:
    return JobStatus(job_id="j1", name="job", status=phase, round=round_number, rounds=3, submitted_at=NOW)


def version(data: bytes = MODEL) -> VersionInfo:
    sha256 = hashlib.sha256(data).hexdigest()
    return VersionInfo(
        job_id="j1", round=3, sha256=sha256, manifest_sha256="", parameters=7, size_bytes=len(data), created_at=NOW
    )


@dataclass
class Script(coordinator_pb2_grpc.JobServiceServicer):
    """Answers calls from lists; an exception class in a list breaks the call there."""

    statuses: list[list[JobStatus | None]] = field(default_factory=list)
    events: list[list[EventInfo | None]] = field(default_factory=list)
    model: list[bytes | None] = field(default_factory=lambda: [MODEL])
    failures: int = 0
    request_ids: list[str] = field(default_factory=list)
    after: list[int] = field(default_factory=list)

    def SubmitJob(self, request, context):  # noqa: N802
        self.request_ids.append(request.request_id)
        if self.failures:
            self.failures -= 1
            context.abort(grpc.StatusCode.UNAVAILABLE, "starting")
        return coordinator_pb2.SubmitJobResponse(job_id="j1")

    def GetJob(self, request, context):  # noqa: N802
        context.abort(grpc.StatusCode.NOT_FOUND, f"no job {request.job_id!r}")

    def WatchJob(self, request, context):  # noqa: N802
        for item in self.statuses.pop(0):
            if item is None:
                context.abort(grpc.StatusCode.UNAVAILABLE, "killed")
            yield coordinator_pb2.WatchJobResponse(job=status_to_proto(item))

    def WatchEvents(self, request, context):  # noqa: N802
        self.after.append(request.after)
        for item in self.events.pop(0):
            if item is None:
                context.abort(grpc.StatusCode.UNAVAILABLE, "killed")
            yield coordinator_pb2.WatchEventsResponse(event=event_to_proto(item))

    def DownloadModel(self, request, context):  # noqa: N802
        yield coordinator_pb2.DownloadModelResponse(version=version_to_proto(version()))
        for piece in self.model:
            if piece is None:
                context.abort(grpc.StatusCode.NOT_FOUND, "no such version any more")
            yield coordinator_pb2.DownloadModelResponse(data=piece)


class Nodes(discovery_pb2_grpc.DiscoveryServiceServicer):
    def ListNodes(self, request, context):  # noqa: N802
        node = common_pb2.Node(name="eu-1", role=common_pb2.ROLE_WORKER, health=common_pb2.NODE_HEALTH_LIVE)
        node.resources.cpu_cores = 4
        return discovery_pb2.ListNodesResponse(nodes=[node])


@pytest.fixture
def script() -> Script:
    return Script()


@pytest.fixture
def serve(tls_of) -> Iterator[Callable[..., str]]:
    """Serve something under a role, at a free port or a given one."""
    servers = []

    def start(role: Role, attach: Callable[[grpc.Server], None]) -> str:
        files = tls_of(role)
        server = grpc.server(ThreadPoolExecutor(4))
        attach(server)
        credentials = grpc.ssl_server_credentials(
            [(files.key.read_bytes(), files.certificate.read_bytes())], files.ca.read_bytes(), True
        )
        address = f"127.0.0.1:{server.add_secure_port('127.0.0.1:0', credentials)}"
        server.start()
        servers.append(server)
        return address

    yield start
    for server in servers:
        server.stop(None).wait()


@pytest.fixture
def client(script, serve, tls_of) -> Iterator[Client]:
    connection = Connection(
        coordinator=serve(Role.COORDINATOR, lambda s: coordinator_pb2_grpc.add_JobServiceServicer_to_server(script, s)),
        discovery=serve(
            Role.DISCOVERY, lambda s: discovery_pb2_grpc.add_DiscoveryServiceServicer_to_server(Nodes(), s)
        ),
        tls=tls_of(Role.OPERATOR, "operator"),
        source="test",
    )
    with Client(connection) as client:
        yield client


def test_a_submission_that_met_a_restart_is_sent_again_under_the_same_request_id(client, script):
    script.failures = 2

    assert client.submit(JOB) == "j1"
    assert len(script.request_ids) == 3
    assert len(set(script.request_ids)) == 1


def test_mistakes_in_a_job_are_found_before_anything_is_sent(client, script):
    with pytest.raises(InvalidArgumentError, match="input_dim"):
        client.submit({**JOB, "model": {"kind": "mlp", "input_dim": 0, "output_dim": 10}})

    assert script.request_ids == []


def test_a_job_can_be_given_as_a_file(client, tmp_path):
    (tmp_path / "job.json").write_text(json.dumps(JOB))

    assert client.submit(tmp_path / "job.json") == "j1"


def test_watching_goes_on_through_a_restart_of_the_coordinator(client, script):
    script.statuses = [
        [status(JobPhase.TRAINING, 1), None],
        [status(JobPhase.TRAINING, 2), status(JobPhase.COMPLETED, 3)],
    ]
    away: list[str] = []

    rounds = [update.round for update in client.watch("j1", away.append)]

    assert rounds == [1, 2, 3]
    assert len(away) == 1


def test_events_are_not_told_twice_after_a_restart(client, script):
    first, second = (EventInfo(sequence=n, at=NOW, name="round_closed", round=n, message="") for n in (1, 2))
    script.events = [[first, None], [second]]

    assert [event.sequence for event in client.events("j1", follow=True)] == [1, 2]
    assert script.after == [0, 1]


def test_an_unknown_job_is_told_at_once(client):
    with pytest.raises(NotFoundError, match="j9"):
        client.status("j9")


def test_a_downloaded_model_is_what_was_announced(client, tmp_path):
    found = client.download_model("j1", None, tmp_path / "new" / "model.safetensors")

    assert (tmp_path / "new" / "model.safetensors").read_bytes() == MODEL
    assert found == version()


@pytest.mark.parametrize(
    ("pieces", "error"),
    [([MODEL[:-1]], CorruptError), ([MODEL[:-1] + b"!"], CorruptError), ([MODEL[:9], None], NotFoundError)],
)
def test_a_bad_download_leaves_nothing_behind_and_spoils_nothing(client, script, tmp_path, pieces, error):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"an older model")
    script.model = pieces

    with pytest.raises(error):
        client.download_model("j1", None, path)

    assert path.read_bytes() == b"an older model"
    assert list(tmp_path.iterdir()) == [path]


def test_nodes_are_told_with_their_resources(client):
    (node,) = client.nodes()

    assert (node.name, node.role, node.health, node.resources.cpu_cores) == ("eu-1", "worker", "live", 4)


def test_a_local_network_that_does_not_run_is_not_waited_for(tls_of, tmp_path):
    tls = tls_of(Role.OPERATOR, "operator")
    connection = Connection("127.0.0.1:1", "127.0.0.1:1", tls, source="test", directory=tmp_path)

    with (
        Client(connection) as client,
        pytest.raises(UnavailableError, match="is not running; start it with `cortex up"),
    ):
        client.jobs()


def test_a_server_of_another_role_is_not_trusted(serve, tls_of, script, tmp_path):
    impostor = serve(Role.WORKER, lambda s: coordinator_pb2_grpc.add_JobServiceServicer_to_server(script, s))
    connection = Connection(impostor, impostor, tls_of(Role.OPERATOR, "operator"), source="test", directory=tmp_path)

    with Client(connection) as client, pytest.raises(UnavailableError):
        client.submit(JOB)
    assert script.request_ids == []
