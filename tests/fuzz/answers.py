"""Decoders of what nodes and people are told: work, answers of the services, and what is carried from elsewhere."""

from __future__ import annotations

import base64
import datetime as dt
import json
from collections.abc import Mapping
from contextlib import suppress
from functools import cache

from cortex.wire import node_from_proto as view_of
from cortex_common.data.sealed import MANIFEST_TYPE
from cortex_common.envelope import Envelope
from cortex_common.errors import CorruptError, CortexError, InvalidArgumentError, UnauthenticatedError
from cortex_common.identity import Identity, Role
from cortex_common.ids import JobId, NodeName
from cortex_common.job.parse import parse_job
from cortex_common.job.statement import JOB_TYPE, JobStatement, statement_of
from cortex_common.job.wire import (
    event_from_proto,
    spec_from_proto,
    spec_to_proto,
    status_from_proto,
    status_to_proto,
    version_from_proto,
)
from cortex_common.network.enrolment import check_answer
from cortex_common.network.membership import trust_of
from cortex_common.network.protocol import TenzroProtocol
from cortex_common.pb.v1 import aggregator_pb2, coordinator_pb2, discovery_pb2, identity_pb2
from cortex_common.security.certificates import read_certificate
from cortex_common.security.encryption import EncryptionManager, ObjectHeader, ObjectKind
from cortex_common.security.signing import SigningKey
from cortex_common.transfer.pacing import UNPACED
from cortex_common.transfer.push import _Push
from cortex_common.transfer.wire import receipt_from_proto
from services.coordinator.wire import accepted_of, aggregated_of, aggregator_of, received_of, role_of, worker_of
from services.gateway.oidc import OidcVerifier
from services.gateway.settings import OidcSettings
from services.gateway.wire import node_from_proto as info_of
from services.worker.gate import Gate
from services.worker.outgoing import Outgoing
from tests.fakes import ManualClock
from tests.fuzz.target import BAD, NOW_S, WRONG, Target, folder, from_proto, tls

_JOB = {"model": {"input_dim": 64, "hidden_dims": [32], "output_dim": 10}, "data": {"train": "digits"}}


# --- work -------------------------------------------------------------------------------------------------------------


def signed_job(data: bytes) -> None:
    """An envelope around anything, and anything as the payload of one."""
    with suppress(InvalidArgumentError):
        _taken(Envelope.from_json(data))
    _taken(Envelope(JOB_TYPE, data))


def _taken(envelope: Envelope) -> None:
    spec = statement_of(envelope).job
    assert spec_from_proto(spec_to_proto(spec)) == spec


@cache
def _signed() -> Envelope:
    made = dt.datetime.fromtimestamp(NOW_S, dt.UTC)
    statement = JobStatement.of(parse_job(_JOB), "north", made, dt.timedelta(hours=1), "cortex")
    return SigningKey.create(folder() / "ann.key").sign(statement.to_envelope())


def signed_job_seeds() -> list[bytes]:
    return [_signed().to_json().encode(), _signed().payload]


@cache
def _gate() -> Gate:
    return Gate(None, "cortex", Outgoing(folder() / "outgoing.json"), ManualClock())


def assignments(data: bytes) -> None:
    """As a worker takes them: what it can read it asks its gate about."""
    for each in TenzroProtocol.from_proto(data).assignments:
        _gate().refusals(each)


def assignment_seeds() -> list[bytes]:
    made = coordinator_pb2.AttendResponse()
    for number, work in enumerate(("initialise", "train", "evaluate", "hold")):
        each = made.assignments.add(
            assignment_id=f"j1/{number}.1/1/{work}/0", job_id="j1", round=number, attempt=1, fence=7, seat=1, seats=2
        )
        getattr(each, work).SetInParent()
        each.job.CopyFrom(spec_to_proto(parse_job(_JOB)))
        each.aggregator, each.aggregator_address, each.chunk_elements = "a1", "127.0.0.1:1", 1024
        for key in (each.data_key, each.older_keys.add()):
            key.key_id, key.epoch, key.key = "ab" * 16, 1, bytes(80)
    whole = made.SerializeToString()
    made.assignments[1].signed_job = _signed().to_json()
    made.assignments[2].sealed.manifest = Envelope(MANIFEST_TYPE, b"{}").to_json()
    return [whole, made.SerializeToString()]


# --- answers of discovery ---------------------------------------------------------------------------------------------


def trust_seeds() -> list[bytes]:
    said = identity_pb2.WatchTrustResponse(roots=tls().ca.read_bytes())
    said.denials.add(identity="spiffe://cortex/worker/eve", serials=["ab12", "0"], reason="lost").at.FromSeconds(9)
    return [said.SerializeToString()]


def enrolment_answer(message: identity_pb2.EnrollResponse) -> None:
    check_answer(message, Identity("cortex", Role.WORKER, NodeName("n1")))
    # It would remember thousands of them.
    read_certificate.cache_clear()


def enrolment_answer_seeds() -> list[bytes]:
    own = tls(Role.WORKER)
    answer = identity_pb2.EnrollResponse(certificate=own.certificate.read_bytes(), roots=own.ca.read_bytes())
    return [answer.SerializeToString()]


def nodes(message: discovery_pb2.WatchNodesResponse) -> None:
    """As coordinator, gateway and the command read them."""
    for node in message.nodes:
        role_of(node), worker_of(node), aggregator_of(node), view_of(node)
        with suppress(CortexError):
            info_of(node)


def node_seeds() -> list[bytes]:
    said = discovery_pb2.WatchNodesResponse()
    for role in range(1, 7):
        node = said.nodes.add(name=f"n{role}", role=role, region="eu", address="127.0.0.1:1", health=1)  # type: ignore[arg-type]
        node.datasets.add(name="digits", input_shape=[8, 8], classes=10)
        node.resources.gpus.add(name="gpu", memory_bytes=1 << 30)
        node.last_seen_at.FromSeconds(9)
    return [said.SerializeToString()]


# --- answers of an aggregator -----------------------------------------------------------------------------------------


@cache
def _push() -> _Push:
    """An update that has been sent."""
    key = EncryptionManager.new_data_key()
    header = ObjectHeader(
        kind=ObjectKind.UPDATE, network="cortex", job_id=JobId("j1"), round=1, attempt=0, fence=1, sender="w1", seat=1,
        key_id=key.key_id, codec="none", codec_options="{}", chunk_elements=1024, elements=12, counters=0, chunks=1,
        manifest_sha256="0" * 64, base_sha256="0" * 64,
    ).fresh()  # fmt: skip
    return _Push(lambda: None, header, lambda _: b"", EncryptionManager(key), None, None, UNPACED)  # type: ignore[arg-type,return-value]


def answer_to_update(message: aggregator_pb2.PushUpdateResponse) -> None:
    _push()._require_own(receipt_from_proto(message.receipt))


def answer_seeds() -> list[bytes]:
    own, resumed = aggregator_pb2.PushUpdateResponse(), aggregator_pb2.PushUpdateResponse()
    own.receipt.job_id, own.receipt.round, own.receipt.seat, own.receipt.worker = "j1", 1, 1, "w1"
    own.receipt.content_sha256, own.receipt.weight = "ab" * 32, 1.5
    resumed.resume.first_chunk = 3
    return [own.SerializeToString(), resumed.SerializeToString()]


def progress(message: aggregator_pb2.WatchRoundResponse) -> None:
    received_of(message), accepted_of(message)


def progress_seeds() -> list[bytes]:
    said = aggregator_pb2.WatchRoundResponse(bytes_down=7)
    said.seats.add(seat=0, worker="w1", chunks_received=3, chunks_total=4)
    said.seats.add(seat=1, worker="w2").receipt.MergeFromString(_receipt())
    return [said.SerializeToString()]


def _receipt() -> bytes:
    return aggregator_pb2.PushUpdateResponse.FromString(answer_seeds()[0]).receipt.SerializeToString()


def made_version_seeds() -> list[bytes]:
    said = aggregator_pb2.SealRoundResponse(update_norm=0.25)
    said.version.job_id, said.version.round, said.version.sha256 = "j1", 3, "ab" * 32
    return [said.SerializeToString()]


# --- answers of the coordinator ---------------------------------------------------------------------------------------


def status(message: coordinator_pb2.WatchJobResponse) -> None:
    """What was taken can be shown, and says the same again."""
    taken = status_from_proto(message.job)
    assert status_from_proto(status_to_proto(taken)).model_dump_json() == taken.model_dump_json()


def status_seeds() -> list[bytes]:
    said = coordinator_pb2.WatchJobResponse()
    job = said.job
    job.job_id, job.name, job.status, job.round, job.rounds = "j1", "digits", "training", 3, 5
    job.metrics["train_loss"] = 0.5
    job.history.add(round=2, accepted=3, seconds=0.5, metrics={"test_accuracy": 0.9}).dropped.add(
        worker="w2", reason="late"
    )
    job.model.round, job.model.sha256, job.model.parameters = 2, "ab" * 32, 2410
    job.workers.add(seat=1, worker="w1", region="eu", activity="training", since_s=1.5)
    job.refusals.add(worker="w3", rule="min_group", message="3 given")
    job.privacy.epsilon = 1.0
    job.submitted_at.FromSeconds(9)
    running = said.SerializeToString()
    job.status, job.error = "failed", "no quorum"
    job.finished_at.FromSeconds(99)
    return [running, said.SerializeToString()]


def listed(message: coordinator_pb2.ListVersionsResponse) -> None:
    for version in message.versions:
        version_from_proto(version).model_dump_json()


def listed_seeds() -> list[bytes]:
    said = coordinator_pb2.ListVersionsResponse()
    version = said.versions.add(job_id="j1", round=3, sha256="ab" * 32, parameters=2410, size_bytes=9700)
    version.metrics["test_accuracy"] = 0.9
    version.created_at.FromSeconds(9)
    return [said.SerializeToString()]


def event(message: coordinator_pb2.WatchEventsResponse) -> None:
    event_from_proto(message.event).model_dump_json()


def event_seeds() -> list[bytes]:
    said = coordinator_pb2.WatchEventsResponse()
    said.event.sequence, said.event.name, said.event.round, said.event.message = 7, "round_opened", 3, "attempt 1"
    said.event.at.FromSeconds(9)
    return [said.SerializeToString()]


# --- tokens of an issuer elsewhere ------------------------------------------------------------------------------------


@cache
def _verifier() -> OidcVerifier:
    return OidcVerifier(OidcSettings(issuer="https://issuer.example", audience="cortex"), ManualClock())


def oidc_head(data: bytes) -> None:
    """Anything as a token, and as the head of one."""
    with suppress(UnauthenticatedError):
        _verifier()._head(data.decode("utf-8", "replace"))
    _verifier()._head(_part(data) + "." + _part(b"{}") + ".AAAA")


def oidc_seeds() -> list[bytes]:
    head = json.dumps({"alg": "ES256", "kid": "k1", "typ": "JWT"}).encode()
    return [head, f"{_part(head)}.{_part(b'{}')}.AAAA".encode()]


def _part(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


ANSWERS: Mapping[str, Target] = {
    "signed-job": Target(signed_job, WRONG, signed_job_seeds),
    "assignments": Target(assignments, WRONG, assignment_seeds),
    "trust": Target(from_proto(identity_pb2.WatchTrustResponse, trust_of), (CorruptError,), trust_seeds),
    "enrolment-answer": Target(
        from_proto(identity_pb2.EnrollResponse, enrolment_answer),
        (UnauthenticatedError, CorruptError),
        enrolment_answer_seeds,
    ),
    "nodes": Target(from_proto(discovery_pb2.WatchNodesResponse, nodes), (), node_seeds),
    "receipt": Target(from_proto(aggregator_pb2.PushUpdateResponse, answer_to_update), BAD, answer_seeds),
    "progress": Target(from_proto(aggregator_pb2.WatchRoundResponse, progress), (), progress_seeds),
    "made-version": Target(from_proto(aggregator_pb2.SealRoundResponse, aggregated_of), (), made_version_seeds),
    "status": Target(from_proto(coordinator_pb2.WatchJobResponse, status), (CorruptError,), status_seeds),
    "versions": Target(from_proto(coordinator_pb2.ListVersionsResponse, listed), (), listed_seeds),
    "event": Target(from_proto(coordinator_pb2.WatchEventsResponse, event), (), event_seeds),
    "oidc-head": Target(oidc_head, (UnauthenticatedError,), oidc_seeds),
}
