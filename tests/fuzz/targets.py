"""Every decoder that sees bytes from outside: how it is called, what it may raise, and what good input looks like."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from cortex_common.codec import WeightCompressor
from cortex_common.data.sealed import MANIFEST_TYPE, Described
from cortex_common.envelope import Envelope
from cortex_common.errors import CorruptError, InvalidArgumentError, UnauthenticatedError
from cortex_common.identity import Identity, Role
from cortex_common.ids import JobId, NodeName, RoundNumber, SeatIndex
from cortex_common.job.parse import parse_job, parse_job_text
from cortex_common.job.spec import JobSpec
from cortex_common.job.wire import spec_from_proto, spec_to_proto
from cortex_common.network.protocol import TenzroProtocol
from cortex_common.pb.v1 import aggregator_pb2, coordinator_pb2, discovery_pb2, identity_pb2, job_pb2
from cortex_common.security.audit import Head
from cortex_common.security.certificates import certificate_of, fingerprints, read_certificate
from cortex_common.security.encryption import EncryptionManager
from cortex_common.security.issuing import key_digest, make_request
from cortex_common.security.joining import JoinToken
from cortex_common.security.node_tokens import NodeToken
from cortex_common.security.objects import ObjectHeader, ObjectKind
from cortex_common.security.passes import NodePass, read_pass, sign_pass
from cortex_common.security.signed_heads import sign_head, verified_head
from cortex_common.security.tokens import TokenStore
from cortex_common.tensors import Manifest, TensorKind, chunk_count, chunk_range
from cortex_common.tensors.safetensors import read_safetensors
from cortex_common.transfer.frames import (
    ChunkFrame,
    HeaderFrame,
    TrailerFrame,
    _chunk_from_bytes,
    frame_from_bytes,
    frame_to_bytes,
)
from cortex_common.transfer.wire import header_from_proto, header_to_proto
from services.aggregator.shards import check_header
from services.aggregator.wire import terms_from_proto
from services.coordinator.wire import failure_of, round_of_assignment, scores_of, trained_of
from services.discovery.identity_wire import token_request
from services.discovery.wire import announcement_from_proto
from services.gateway.body import parse_json, parse_yaml
from tests.fuzz.answers import ANSWERS
from tests.fuzz.target import BAD, NOW_S, WRONG, Target, authority, folder, from_proto, tls

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


# --- frames and sealed objects ----------------------------------------------------------------------------------------


MANIFEST = Manifest.of([("w", (4, 3), TensorKind.TRAINABLE), ("n", (), TensorKind.COUNTER)])


def header() -> ObjectHeader:
    return ObjectHeader(
        kind=ObjectKind.UPDATE,
        network="cortex",
        job_id=JobId("job-1"),
        round=RoundNumber(3),
        attempt=1,
        fence=7,
        sender=NodeName("w1"),
        seat=SeatIndex(2),
        key_id=EncryptionManager.new_data_key().key_id,
        codec="int8",
        codec_options='{"block":64}',
        chunk_elements=1024,
        elements=12,
        counters=1,
        chunks=2,
        manifest_sha256=MANIFEST.sha256,
        base_sha256="ab" * 32,
        manifest=MANIFEST.to_json(),
        weight=1.5,
        object_id=bytes(16),
        salt=bytes(32),
    )


def frame_seeds() -> list[bytes]:
    frames = [HeaderFrame(header(), 1), TrailerFrame(2, bytes(32)), ChunkFrame(0, b"")]
    frames += [ChunkFrame(index, bytes(size)) for index, size in ((1, 1), (127, 130), (1 << 20, 20_000))]
    return [frame_to_bytes(frame) for frame in frames]


def chunk_fast_path(data: bytes) -> None:
    """Where the fast path reads a chunk, protobuf must read the same."""
    chunk = _chunk_from_bytes(data)
    if chunk is None:
        return
    frame = aggregator_pb2.PushUpdateRequest.FromString(data).frame
    assert frame.WhichOneof("frame") == "chunk"
    assert (frame.chunk.index, frame.chunk.sealed) == (chunk.index, bytes(chunk.sealed))


def stored_header(data: bytes) -> None:
    with suppress(ValueError, RecursionError):  # the spool reads its own JSON
        document = json.loads(data)
        if isinstance(document, dict):
            ObjectHeader.from_facts(document).canonical()


@cache
def _sealed() -> tuple[Any, list[bytes]]:
    key, made = EncryptionManager.new_data_key(), header()
    made = ObjectHeader.from_facts(made.to_facts() | {"key_id": key.key_id})
    manager = EncryptionManager(key)
    sealer = manager.sealer(made)
    return manager.opener(made), [sealer.seal(index, bytes(100 * index)) for index in range(2)]


def sealed_chunk(data: bytes) -> None:
    """Nothing but what was sealed there opens."""
    opener, sealed = _sealed()
    index = data[0] % 2 if data else 0
    opener.open_into(index, data[1:], bytearray(1 << 16))
    assert data[1:] == sealed[index], "something opened that was never sealed"


def sealed_seeds() -> list[bytes]:
    return [bytes((index,)) + sealed for index, sealed in enumerate(_sealed()[1])]


CODECS = ("none", "bf16", "int8", "int4", "topk")


@cache
def _codec(number: int) -> WeightCompressor:
    return WeightCompressor.create(CODECS[number % len(CODECS)])


def codec_payload(data: bytes) -> None:
    if not data:
        return
    codec, elements = _codec(data[0]), 1000
    codec.decode(data[1:], elements)
    codec.decode_counters(data[1:], 3)


def codec_seeds() -> list[bytes]:
    values = np.linspace(-1, 1, 1000, dtype=np.float32)
    seeds = [bytes((n,)) + bytes(_codec(n).encode(values)) for n in range(len(CODECS))]
    return seeds + [bytes((n,)) + bytes(_codec(n).encode(values * 0)) for n in range(len(CODECS))]


def codec_options(data: bytes) -> None:
    name, _, options = data.partition(b"\n")
    WeightCompressor.from_wire(name.decode("utf-8", "replace"), options.decode("utf-8", "replace"))


def manifest(data: bytes) -> None:
    made = Manifest.from_json(data)
    assert Manifest.from_json(made.to_json()) == made
    # What receives a manifest never lists its chunks, of which there may be 2^28: it counts them, and asks for one.
    last = chunk_count(made.elements, made.counters, 1024) - 1
    first, end = (chunk_range(index, made.elements, made.counters, 1024) for index in (0, last))
    assert (first.start, end.stop) == (0, made.counters or made.elements)


def safetensors_seeds() -> list[bytes]:
    from cortex_common.tensors import Arena, safetensors_parts

    arena = Arena(np.ones(12, np.float32), np.ones(1, np.int64))
    return [b"".join(bytes(part) for part in safetensors_parts(MANIFEST, arena))]


# --- job files --------------------------------------------------------------------------------------------------------


def is_kept_whole(spec: JobSpec) -> None:
    """What was taken can be sent on, and arrives as it was."""
    assert spec_from_proto(spec_to_proto(spec)) == spec


def job_yaml(data: bytes) -> None:
    is_kept_whole(parse_job_text(data.decode("utf-8", "replace")))


def job_body(data: bytes) -> None:
    """As the gateway reads it, JSON or YAML by the first byte."""
    text = data[1:].decode("utf-8", "replace")
    document = (parse_json if data[:1] == b"j" else parse_yaml)(text)
    if isinstance(document, Mapping):
        is_kept_whole(parse_job(document))


def job_examples() -> list[bytes]:
    return [path.read_bytes() for path in sorted(EXAMPLES.glob("*.yaml"))]


def job_body_seeds() -> list[bytes]:
    import yaml

    documents = [yaml.safe_load(text) for text in job_examples()]
    return [b"j" + json.dumps(each).encode() for each in documents] + [b"y" + text for text in job_examples()]


# --- protobuf ---------------------------------------------------------------------------------------------------------


def report(message: coordinator_pb2.ReportRequest) -> None:
    round_of_assignment(message.assignment_id)
    read = {"trained": trained_of, "evaluated": scores_of, "failed": failure_of}.get(str(message.WhichOneof("report")))
    if read:
        read(message)


def enrolment(message: identity_pb2.EnrollRequest) -> None:
    """What discovery does with a request before it looks at the token, and with its hosts."""
    key_digest(message.csr)
    authority().sign(message.csr, Identity("cortex", Role.WORKER, NodeName("w1")), list(message.hosts))


def report_seeds() -> list[bytes]:
    made = coordinator_pb2.ReportRequest(
        worker="w1", incarnation="1", assignment_id="j1/3/1/train/0", job_id="j1", seat=1
    )
    trained, evaluated, failed = (coordinator_pb2.ReportRequest.FromString(made.SerializeToString()) for _ in range(3))
    trained.trained.receipt.job_id, trained.trained.metrics["loss"] = "j1", 0.5
    evaluated.evaluated.slices.add(slice=1, examples=10, loss_sum=5, correct=7)
    failed.failed.reason = "no room"
    return [each.SerializeToString() for each in (made, trained, evaluated, failed)]


def round_seeds() -> list[bytes]:
    seats = [aggregator_pb2.Seat(seat=1, worker="w1")]
    spec = aggregator_pb2.RoundSpec(job_id="j1", round=1, attempt=1, seats=seats, codec="int8", chunk_elements=1024)
    spec.data_key.key_id = "ab" * 16
    spec.upstream.aggregator, spec.upstream.address, spec.upstream.job_id = "a1", "127.0.0.1:1", "j1"
    root = spec.SerializeToString()
    spec.upstream.job_id, spec.upstream.model_job_id = "j1-t3", "j1"
    return [root, spec.SerializeToString()]


def shard_offer(message: aggregator_pb2.OfferShardRequest) -> None:
    """What an aggregator does with an offer before it looks for the shard: the digest names files."""
    header = header_from_proto(message.header)
    check_header(header)
    assert Path(header.model_sha256).name == header.model_sha256
    assert ObjectHeader.from_facts(json.loads(json.dumps(header.to_facts()))) == header


def shard_offer_seeds() -> list[bytes]:
    facts = header().to_facts() | {"kind": "shard", "model_sha256": "ab" * 32, "manifest": "", "elements": 2000}
    offered = header_to_proto(ObjectHeader.from_facts(facts))
    return [aggregator_pb2.OfferShardRequest(header=offered).SerializeToString()]


def heartbeat_seeds() -> list[bytes]:
    request = discovery_pb2.HeartbeatRequest()
    node = request.node
    node.name, node.role, node.region, node.incarnation, node.address = "w1", 4, "eu", "1", "127.0.0.1:1"
    node.datasets.add(name="digits", input_shape=[8, 8], classes=10)
    node.resources.gpus.add(name="gpu", memory_bytes=1 << 30)
    return [request.SerializeToString()]


def enrolment_seeds() -> list[bytes]:
    request = identity_pb2.EnrollRequest(token_id="0" * 12, secret=bytes(32), csr=make_request("w1")[1])
    request.hosts.extend(["localhost", "::1", "node.example"])
    return [request.SerializeToString()]


def token_request_seeds() -> list[bytes]:
    return [identity_pb2.CreateJoinTokenRequest(role=4, name="w1", region="eu", life_s=60).SerializeToString()]


# --- identities -------------------------------------------------------------------------------------------------------


def pem(kind: str) -> Callable[[bytes], bytes]:
    """DER as PEM, so that changes reach the parser of the certificate, not only that of the armour."""

    def wrapped(data: bytes) -> bytes:
        if data[:1] == b"-":
            return data
        return f"-----BEGIN {kind}-----\n{base64.encodebytes(data).decode()}-----END {kind}-----\n".encode()

    return wrapped


def certificate(data: bytes) -> None:
    read_certificate.__wrapped__(pem("CERTIFICATE")(data))


def bundle(data: bytes) -> None:
    fingerprints(pem("CERTIFICATE")(data))


def request(data: bytes) -> None:
    key_digest(pem("CERTIFICATE REQUEST")(data))


def der_of(text: bytes) -> bytes:
    lines = text.decode().split("-----\n", 1)[1].split("\n-----END", 1)[0]
    return base64.b64decode(lines)


def certificate_seeds() -> list[bytes]:
    chains = [tls(role).certificate.read_bytes() for role in (Role.DISCOVERY, Role.WORKER)]
    return [*(der_of(chain) for chain in chains), der_of(authority().bundle), chains[0]]


def request_seeds() -> list[bytes]:
    made = make_request("w1")[1]
    return [der_of(made), made]


def join_token_seeds() -> list[bytes]:
    made = JoinToken.fresh(Identity("cortex", Role.WORKER, NodeName("w1")), "eu", "d:1", "ab" * 32)
    return [made.encode().encode()]


def join_token(data: bytes) -> None:
    """As text, or, without the prefix, as what the text holds."""
    text = data.decode("utf-8", "replace")
    JoinToken.decode(text if text.startswith("ctx") else "ctxjoin_" + base64.urlsafe_b64encode(data).decode())


def join_token_inside() -> list[bytes]:
    return [base64.urlsafe_b64decode(join_token_seeds()[0].removeprefix(b"ctxjoin_"))]


@cache
def _tokens() -> TokenStore:
    return TokenStore(folder() / "tokens.json")


@cache
def _api_token() -> str:
    return _tokens().create("alice", ["read"])


def api_token(data: bytes) -> None:
    text = data.decode("utf-8", "replace")
    if _tokens().verify(text):
        assert text == _api_token(), "a token that was never made"


def node_pass(data: bytes) -> None:
    read_pass(data, authority().bundle, _pass_time())


@cache
def _pass_time() -> float:
    return certificate_of(tls()).not_before.timestamp() + 600


def pass_seeds() -> list[bytes]:
    node, gateway = (Identity("cortex", role, NodeName("n1")) for role in (Role.WORKER, Role.GATEWAY))
    made = NodePass(node, "eu", gateway, "ab" * 32, "0" * 12, NOW_S, NOW_S + 60)
    return [sign_pass(made, tls())]


def signed_head(data: bytes) -> None:
    with suppress(ValueError, RecursionError):
        document = json.loads(data)
        if isinstance(document, dict):
            head = verified_head(document)
            with suppress(UnauthenticatedError):
                head.require_root(authority().bundle)


def head_seeds() -> list[bytes]:
    return [json.dumps(sign_head(Head(3, "ab" * 32), tls(), _pass_time())).encode()]


def node_message(data: bytes) -> None:
    TenzroProtocol.decode(data.decode("utf-8", "replace"))


def message_seeds() -> list[bytes]:
    documents: list[dict[str, Any]] = [
        {"type": name, "id": 1} | _example(TenzroProtocol.schema(name)) for name in TenzroProtocol.types()
    ]
    return [json.dumps(document).encode() for document in documents]


def _example(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Something for every property: of the right kind, mostly."""
    kinds: dict[str, Any] = {"string": "x", "integer": 1, "number": 0.5, "boolean": True, "array": [], "object": {}}
    properties = schema.get("properties", {})
    return {
        name: kinds.get(str(each.get("type")), {})
        for name, each in properties.items()
        if name not in ("type", "id", "ref")
    }


def dataset_manifest(data: bytes) -> None:
    """An envelope around anything, and anything as the payload of one."""
    with suppress(InvalidArgumentError):
        Described.of(Envelope.from_json(data))
    Described.of(Envelope(MANIFEST_TYPE, data))


def dataset_seeds() -> list[bytes]:
    shard = {"examples": 5, "object_id": "ab" * 16, "salt": "cd" * 32, "sha256": "ef" * 32}
    document = {
        "name": "ward-7",
        "input_shape": [8, 8],
        "input_type": "|u1",
        "classes": 10,
        "key_id": "12" * 16,
        "chunk_bytes": 1 << 20,
        "signer": "ed25519:" + "A" * 43 + "=",
        "created_at": "2026-01-01T00:00:00Z",
        "shards": [shard, shard],
    }
    payload = json.dumps(document).encode()
    return [payload, Envelope(MANIFEST_TYPE, payload).to_json().encode()]


TARGETS: Mapping[str, Target] = {
    "frame": Target(frame_from_bytes, BAD, frame_seeds),
    "chunk-fast-path": Target(chunk_fast_path, (), frame_seeds),
    "stored-header": Target(stored_header, (CorruptError,), lambda: [json.dumps(header().to_facts()).encode()]),
    "sealed-chunk": Target(sealed_chunk, (CorruptError,), sealed_seeds),
    "codec-payload": Target(codec_payload, BAD, codec_seeds),
    "codec-options": Target(
        codec_options, WRONG, lambda: [f"{name}\n{_codec(n).options_json}".encode() for n, name in enumerate(CODECS)]
    ),
    "manifest": Target(manifest, WRONG, lambda: [MANIFEST.to_json()]),
    "safetensors": Target(read_safetensors, WRONG, safetensors_seeds),
    "job-yaml": Target(job_yaml, WRONG, job_examples),
    "job-body": Target(job_body, WRONG, job_body_seeds),
    "job-proto": Target(
        from_proto(job_pb2.JobSpec, lambda each: is_kept_whole(spec_from_proto(each))),
        WRONG,
        lambda: [spec_to_proto(parse_job_text(text.decode())).SerializeToString() for text in job_examples()],
    ),
    "report": Target(from_proto(coordinator_pb2.ReportRequest, report), WRONG, report_seeds),
    "round": Target(from_proto(aggregator_pb2.RoundSpec, terms_from_proto), WRONG, round_seeds),
    "shard-offer": Target(from_proto(aggregator_pb2.OfferShardRequest, shard_offer), WRONG, shard_offer_seeds),
    "heartbeat": Target(
        from_proto(discovery_pb2.HeartbeatRequest, lambda each: announcement_from_proto(each.node)),
        WRONG,
        heartbeat_seeds,
    ),
    "enrolment": Target(from_proto(identity_pb2.EnrollRequest, enrolment), WRONG, enrolment_seeds),
    "token-request": Target(from_proto(identity_pb2.CreateJoinTokenRequest, token_request), WRONG, token_request_seeds),
    "certificate": Target(certificate, (UnauthenticatedError,), certificate_seeds),
    "bundle": Target(bundle, (CorruptError,), certificate_seeds),
    "request": Target(request, WRONG, request_seeds),
    "join-token": Target(join_token, WRONG, lambda: [*join_token_seeds(), *join_token_inside()]),
    "node-token": Target(
        lambda data: NodeToken.decode(data.decode("utf-8", "replace")),
        WRONG,
        lambda: [NodeToken.fresh().encode().encode()],
    ),
    "api-token": Target(api_token, (UnauthenticatedError,), lambda: [_api_token().encode()]),
    "node-pass": Target(node_pass, (UnauthenticatedError,), pass_seeds),
    "signed-head": Target(signed_head, (CorruptError,), head_seeds),
    "dataset": Target(dataset_manifest, WRONG, dataset_seeds),
    "node-message": Target(node_message, WRONG, message_seeds),
    **ANSWERS,
}
