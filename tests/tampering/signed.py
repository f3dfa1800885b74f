"""What people sign: jobs and sealed data sets, read by the worker that is to run and to open them."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError

from cortex_common.data.catalogue import DatasetInfo
from cortex_common.data.loading import Dataset
from cortex_common.data.normalise import BYTES
from cortex_common.data.sealed import Described, dataset_of
from cortex_common.errors import CorruptError, ForbiddenError
from cortex_common.ids import JobId, NodeName, RoundNumber, SeatIndex
from cortex_common.job.parse import parse_job
from cortex_common.job.spec import JobSpec
from cortex_common.job.statement import JobStatement
from cortex_common.job.wire import spec_from_proto, spec_to_proto
from cortex_common.network.work import Assignment, SealedPart, Train
from cortex_common.pb.v1 import job_pb2
from cortex_common.security.objects import DataKey
from cortex_common.security.shards import ShardIntake, header_of, seal_dataset, sealed_size, shard_file, shard_key
from cortex_common.security.signing import SigningKey
from services.worker.gate import Gate
from services.worker.outgoing import Outgoing
from services.worker.shards import _proven
from tests.fakes import ManualClock
from tests.tampering.damage import Pieces, Subject
from tests.tampering.objects import JOB, KEYS

_SHARDS = (0, 1)
_CHUNK_BYTES = 1024


def job(train: str = "digits", rounds: int = 5) -> JobSpec:
    model = {"input_dim": 64, "hidden_dims": [32], "output_dim": 10}
    return parse_job({"model": model, "data": {"train": train}, "training": {"rounds": rounds}})


def assignment(spec: JobSpec, signed_job: str = "") -> Assignment:
    return Assignment(
        assignment_id="a1",
        job_id=JobId(JOB),
        transfer_id=JobId(JOB),
        round=RoundNumber(1),
        attempt=0,
        fence=1,
        seat=SeatIndex(0),
        seats=4,
        spec=spec,
        data_key=KEYS[JOB],
        aggregator=NodeName("a"),
        aggregator_address="127.0.0.1:1",
        base_sha256="0" * 64,
        chunk_elements=1024,
        work=Train(),
        signed_job=signed_job,
    )


def text_of(piece: bytes) -> str:
    """As protobuf takes it."""
    try:
        return piece.decode()
    except UnicodeDecodeError as error:
        raise CorruptError(f"not UTF-8: {error}") from None


def job_signed(root: Path) -> Subject:
    """A signed job and what is to be run by it, on a site that takes only jobs that somebody it knows has signed."""
    clock, key = ManualClock(), SigningKey.create(root / "ann.key")
    policy = root / "site-policy.toml"
    policy.write_text(f'allowed_signers = [{{name = "ann", key = "{key.public}"}}]\n')
    gate = Gate(policy, "cortex", Outgoing(root / "outgoing.json"), clock)

    def pieces(spec: JobSpec, signer: SigningKey = key) -> Pieces:
        now = datetime.fromtimestamp(clock.wall_s(), UTC)
        statement = JobStatement.of(spec, "north", now, timedelta(hours=1), "cortex")
        return signer.sign(statement.to_envelope()).to_json().encode(), spec_to_proto(spec).SerializeToString()

    def read(given: Sequence[bytes]) -> Any:
        try:
            spec = spec_from_proto(job_pb2.JobSpec.FromString(given[1]))
        except DecodeError as error:
            raise CorruptError("not a job") from error
        if refused := gate.refusals(assignment(spec, text_of(given[0]))):
            raise ForbiddenError("; ".join(f"{each.rule}: {each.message}" for each in refused))
        return spec

    stranger = SigningKey.create(root / "bob.key")
    return Subject("signed job", pieces(job()), pieces(job(rounds=4)), pieces(job(rounds=500), stranger), read)


def dataset_pieces(
    folder: Path, signer: SigningKey, seed: int, name: str = "ward-7"
) -> tuple[Pieces, Described, DataKey]:
    """The signed manifest, then the sealed chunks of each shard; what jobs name it by, and its key."""
    random = np.random.default_rng(seed)
    inputs, labels = random.integers(0, 256, (200, 20), np.uint8), random.integers(0, 4, 200, np.int64)
    dataset = Dataset(DatasetInfo("any", (20,), 4, 200), inputs, labels, BYTES)
    parts = [np.arange(0, 100), np.arange(100, 200)]
    made = datetime.fromtimestamp(1e9 + seed, UTC)
    told, key = seal_dataset(name, dataset, parts, signer, folder, made, chunk_bytes=_CHUNK_BYTES)
    pieces = [told.envelope.to_json().encode()]
    for shard in _SHARDS:
        header, position = header_of(told.manifest, shard), 0
        data = (folder / shard_file(shard)).read_bytes()
        for chunk in range(header.chunks):
            pieces.append(data[position : position + sealed_size(header, chunk)])
            position += sealed_size(header, chunk)
    return tuple(pieces), told, key


def datasets_of_two_signers(root: Path) -> list[tuple[Pieces, Described, DataKey]]:
    """A data set, an older one of the same name, and one of somebody else."""
    ann, bob = (SigningKey.create(root / f"{name}.key") for name in ("ann", "bob"))
    wanted = [("ours", ann, "ward-7"), ("earlier", ann, "ward-7"), ("foreign", bob, "ward-8")]
    return [dataset_pieces(root / folder, signer, seed, name) for seed, (folder, signer, name) in enumerate(wanted, 1)]


def dataset_sealed(root: Path) -> Subject:
    """A sealed data set, opened by a worker whose job names it."""
    (pieces, told, key), (earlier, _, _), (foreign, _, _) = datasets_of_two_signers(root)
    given, chunks = assignment(job(told.reference)), (len(pieces) - 1) // len(_SHARDS)

    def read(found: Sequence[bytes]) -> Any:
        proven = _proven(given, SealedPart(text_of(found[0]), _SHARDS, ()))
        memory = bytearray()
        for place, shard in enumerate(_SHARDS):
            opened = bytearray(proven.manifest.shard_bytes(shard))
            intake = ShardIntake(proven.manifest, shard, shard_key(key, shard), memoryview(opened))
            for index in range(chunks):
                intake.take(index, found[1 + place * chunks + index])
            intake.finish()
            memory += opened
        dataset = dataset_of(proven.manifest, _SHARDS, memoryview(memory))
        return proven.manifest, dataset.inputs.tobytes(), dataset.labels.tobytes()

    return Subject("sealed data set and its signed manifest", pieces, earlier, foreign, read)


def everything_signed(root: Path) -> list[Subject]:
    for name in ("job", "data"):
        (root / name).mkdir(parents=True)
    return [job_signed(root / "job"), dataset_sealed(root / "data")]
