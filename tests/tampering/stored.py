"""What rests: versions, spooled updates, residuals, logs; read as after a restart."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from cortex_common.codec import WeightCompressor
from cortex_common.errors import CorruptError, NotFoundError
from cortex_common.identity import Identity, Role, TlsFiles
from cortex_common.ids import JobId
from cortex_common.security.audit import AuditLog, Entry, read_log
from cortex_common.security.audit_proof import Trust, prove_log
from cortex_common.security.certificates import certificate_of
from cortex_common.security.encryption import ObjectHeader, ObjectKind
from cortex_common.security.shards import sealed_size
from cortex_common.security.signed_heads import HEADS_FILE, sign_head
from cortex_common.storage import DirectoryBlobStore
from cortex_common.storage.checked import to_checked_json
from cortex_common.transfer import Receipt, TrailerFrame
from cortex_common.transfer.content import chunk_digest, content_digest
from services.aggregator.domain import Contribution, Phase, RoundKey, RoundTerms
from services.aggregator.rounds import LiveRound
from services.aggregator.sealed import Plaintext, SealedChunks, SealedSource
from services.aggregator.shard_spool import JOURNAL, SEALED, ShardSpool
from services.aggregator.spool import SeatSpool
from services.aggregator.store import DirectoryRoundStore, StoredRound
from services.aggregator.versions import SealedPart, Version, VersionStore, _to_facts
from services.discovery.identities import Identities, Issued, Revocation, Ticket
from services.discovery.identity_store import FileIdentityStore
from services.worker.kept_update import Outbox
from services.worker.residuals import Kept, ResidualStore, kept_header
from tests.tampering.damage import Pieces, Subject
from tests.tampering.objects import (
    CHUNK,
    CRYPT,
    JOB,
    OTHER_JOB,
    PARTS,
    WORKER,
    arena_of,
    delta,
    header_of,
    model,
    sealed,
)

_FACTS, _BLOBS = "job-1/2.json", ("whole.blob", "delta.blob", "state.blob")


def opened(source: SealedChunks) -> bytes:
    """All numbers of an object."""
    reading, plain, numbers = SealedSource(source, CRYPT), Plaintext(), bytearray()
    for part in PARTS:
        numbers += reading.values(part, np.empty(part.elements, np.float32), plain).tobytes()
    return bytes(numbers)


def version_pieces(job: str = JOB, number: int = 2, seed: int = 1) -> Pieces:
    """The facts of a version, then the chunks of itself, its delta and its state."""
    header, whole = model(job, number, seed)
    delta_header, changes = delta(job, number, seed)
    state_header = replace(header_of(ObjectKind.STATE, job, number), manifest=b'{"slots":1}')
    states = sealed(state_header, arena_of(seed + 10))

    def part(of: ObjectHeader, chunks: list[bytes], blob: str) -> SealedPart:
        return SealedPart(of, tuple(map(len, chunks)), f"{JOB}/{blob}", content_digest(map(chunk_digest, chunks)).hex())

    content = content_digest(map(chunk_digest, whole)).hex()
    version = Version(
        header=header,
        sizes=tuple(map(len, whole)),
        content_sha256=content,
        blob=f"{JOB}/{_BLOBS[0]}",
        file_bytes=400,
        update_norm=0.25,
        contributions=(Contribution(0, WORKER, content, 1.5),),
        sequence=seed,
        created_s=1e9,
        delta=part(delta_header, changes, _BLOBS[1]),
        state=part(state_header, states, _BLOBS[2]),
    )
    return to_checked_json(_to_facts(version)), *whole, *changes, *states


def version_stored(root: Path) -> Subject:
    """A version with its delta and its outer state, read by an aggregator that starts."""
    folder, wanted = root / JOB, model()[0].model_sha256
    folder.mkdir(parents=True)

    def read(pieces: Sequence[bytes]) -> Any:
        (root / _FACTS).write_bytes(pieces[0])
        for index, blob in enumerate(_BLOBS):
            chunks = pieces[1 + index * len(PARTS) : 1 + (index + 1) * len(PARTS)]
            (folder / blob).write_bytes(b"".join(chunks))
        store = VersionStore(DirectoryBlobStore(root))
        store.load()
        version = store.by_sha256(JOB, wanted)
        with ExitStack() as files:
            readers = [store.open(version), store.open_part(version.delta), store.open_part(version.state)]  # type: ignore[arg-type]
            for reader in readers:
                files.callback(reader.close)
            return version, [opened(reader) for reader in readers]

    return Subject(
        "version, delta and outer state as stored",
        version_pieces(),
        version_pieces(number=1, seed=2),
        version_pieces(OTHER_JOB, seed=3),
        read,
    )


def spool_pieces(root: Path, job: str = JOB, number: int = 2, seed: int = 1) -> Pieces:
    """A seat's file: header, sealed chunks, receipt."""
    root.mkdir(parents=True, exist_ok=True)
    header = header_of(ObjectKind.UPDATE, job, number)
    spool, ends = SeatSpool.start(root, header), []
    chunks = sealed(header, arena_of(seed))
    for chunk in chunks:
        ends.append((root / "seat-0.update").stat().st_size)
        spool.append(chunk)
    ends.append((root / "seat-0.update").stat().st_size)
    content = content_digest(map(chunk_digest, chunks)).hex()
    spool.commit(Receipt(job, number, 0, 0, WORKER, content, 1.5, spool.size_bytes, seed))
    spool.close()
    data = (root / "seat-0.update").read_bytes()
    return tuple(data[begin:end] for begin, end in zip([0, *ends], [*ends, len(data)], strict=True))


def spool_stored(root: Path) -> Subject:
    """An accepted update, read by an aggregator that starts and is to fold it."""
    key = RoundKey(JOB, 2, 0)
    terms = RoundTerms(key, 1, "0" * 64, {0: WORKER}, "none", "{}", "fedavg", "{}", CHUNK)
    store = DirectoryRoundStore(root / "state")
    stored = StoredRound(terms, Phase.OPEN)
    store.save(stored)

    def read(pieces: Sequence[bytes]) -> Any:
        (store.directory(key) / "seat-0.update").write_bytes(b"".join(pieces))
        live = LiveRound.restored(stored, store)
        try:
            if 0 not in live.receipts:
                raise NotFoundError("no update of seat 0 is accepted here")
            return live.receipts[0], live.spool(0).header, opened(live.spool(0))
        finally:
            live.close_files()

    scratch = root / "scratch"
    return Subject(
        "spooled update",
        spool_pieces(scratch),
        spool_pieces(scratch, number=1, seed=2),
        spool_pieces(scratch, OTHER_JOB, seed=3),
        read,
    )


def shard_pieces(root: Path, job: str = JOB, number: int = 2, seed: int = 1) -> tuple[str, Pieces]:
    """A shard of a data set whose chunks are all here: its digest, the journal's records, and the chunks."""
    root.mkdir(parents=True, exist_ok=True)
    header = replace(header_of(ObjectKind.SHARD, job, number), chunk_elements=1024, elements=3000, chunks=3)
    chunks = [np.random.default_rng(seed + n).bytes(sealed_size(header, n)) for n in range(header.chunks)]
    header = replace(header, model_sha256=hashlib.sha256(b"".join(chunks)).hexdigest())
    spool, journal = ShardSpool.start(root, header), root / f"{header.model_sha256}{JOURNAL}"
    ends = [0, journal.stat().st_size]
    for chunk in chunks:
        spool.append(chunk)
        ends.append(journal.stat().st_size)
    data = journal.read_bytes()
    spool.erase()
    return header.model_sha256, (*(data[begin:end] for begin, end in pairwise(ends)), *chunks)


def shard_stored(root: Path) -> Subject:
    """A shard on its way, read by an aggregator that starts; whole, or what it lacks is sent again."""
    digest, pieces = shard_pieces(root)
    trailer = TrailerFrame(3, content_digest(map(chunk_digest, pieces[-3:])))

    def read(given: Sequence[bytes]) -> Any:
        records = len(pieces) - 3
        (root / f"{digest}{JOURNAL}").write_bytes(b"".join(given[:records]))
        (root / f"{digest}{SEALED}").write_bytes(b"".join(given[records:]))
        spool = ShardSpool.load(root, digest)
        spool.prove()
        spool.finish(trailer)
        return spool.header, spool.path.read_bytes()

    earlier, foreign = shard_pieces(root, number=1, seed=10)[1], shard_pieces(root, OTHER_JOB, seed=20)[1]
    return Subject("shard on its way", pieces, earlier, foreign, read)


def residual_pieces(root: Path, job: str = JOB, number: int = 2, seed: int = 1) -> Pieces:
    """What a worker keeps of its last update: the facts, then the sealed chunks."""
    update = header_of(ObjectKind.UPDATE, job, number, "int8")
    kept = Kept(number, update.codec, update.codec_options, (7, number, 0), kept_header(update), "kept.blob")
    store, arena = ResidualStore(root, JOB), arena_of(seed)
    writer = store.write(kept, (), CRYPT)
    for part in PARTS:
        writer.append(part, arena.values[part.start : part.stop])
    writer.commit()
    writer.close()
    blob, position, pieces = (root / JOB / "kept.blob").read_bytes(), 0, []
    for part in PARTS:
        size = 4 * part.elements + 16
        pieces.append(blob[position : position + size])
        position += size
    facts = (root / JOB / "kept.json").read_bytes()
    (root / JOB / "kept.blob").unlink()
    return facts, *pieces


def residual_stored(root: Path) -> Subject:
    """What quantisation left out, read by a worker that starts."""

    def read(pieces: Sequence[bytes]) -> Any:
        (root / JOB / "kept.json").write_bytes(pieces[0])
        (root / JOB / "kept.blob").write_bytes(b"".join(pieces[1:]))
        known = ResidualStore(root, JOB).load()
        if not known:
            raise NotFoundError("nothing is kept")
        reader, numbers = ResidualStore(root, JOB).read(known[0]), bytearray()
        with closing(reader):
            for part in PARTS:
                values = np.empty(part.elements, np.float32)
                reader.whole(part, CRYPT, values)
                numbers += values.tobytes()
        return known, bytes(numbers)

    return Subject(
        "residual as stored",
        residual_pieces(root),
        residual_pieces(root, number=1, seed=2),
        residual_pieces(root, OTHER_JOB, seed=3),
        read,
    )


def outbox_pieces(root: Path, job: str = JOB, number: int = 2, seed: int = 1) -> Pieces:
    """What a worker keeps of an update until it is accepted: header and figures, then each sealed chunk."""
    header, arena = header_of(ObjectKind.UPDATE, job, number), arena_of(seed)
    codec = WeightCompressor.from_wire(header.codec, header.codec_options)
    box = Outbox(root, JobId(job))
    kept = box.keep(header, {"steps": number}, lambda part: codec.encode(arena.values[part.start : part.stop]), CRYPT)
    data = kept.path.read_bytes()
    box.forget()
    return tuple(data[begin:end] for begin, end in pairwise((0, *kept.ends)))


def outbox_stored(root: Path) -> Subject:
    """An update on its way, read by a worker that starts and goes on with it."""
    path = root / JOB / "sealed.update"

    def read(pieces: Sequence[bytes]) -> Any:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"".join(pieces))
        kept = Outbox(root, JobId(JOB)).load()
        if kept is None:
            raise NotFoundError("nothing is kept")
        payload = kept.encoder(CRYPT)
        return kept.header, kept.answer, [bytes(payload(part)) for part in PARTS]

    return Subject(
        "update on its way",
        outbox_pieces(root),
        outbox_pieces(root, number=1, seed=2),
        outbox_pieces(root, OTHER_JOB, seed=3),
        read,
    )


def log_pieces(root: Path, who: str) -> Pieces:
    """An audit log, a line each."""
    log = AuditLog(root)
    for number in range(5):
        entry = Entry(f"spiffe://cortex/operator/{who}", f"/cortex.v1.JobService/CancelJob{number}", "allowed", "OK")
        log.append(entry, 1e9 + number)
    [path] = root.glob("audit-*.jsonl")
    return tuple(path.read_bytes().splitlines(keepends=True))


def audit_stored(root: Path, tls: TlsFiles) -> Subject:
    """An audit log whose head was signed, checked as `cortex audit verify` does."""
    pieces = log_pieces(root / "log", "ann")
    head, at_s = AuditLog(root / "log").head, certificate_of(tls).not_before.timestamp() + 60
    statement = json.dumps(sign_head(head, tls, at_s)).encode()
    earlier = json.dumps(sign_head(replace(head, number=3), tls, at_s - 30)).encode()
    trust = Trust(tls.ca.read_bytes(), lambda *_: False, at_s)
    folder = root / "read"
    folder.mkdir()

    def read(given: Sequence[bytes]) -> Any:
        (folder / "audit-000000000001.jsonl").write_bytes(b"".join(given[:-1]))
        (folder / HEADS_FILE).write_bytes(given[-1])
        proof = prove_log(folder, certificate_of(tls).identity, trust)
        if proof.problems:
            raise CorruptError("; ".join(proof.problems))
        return proof, list(read_log(folder))

    return Subject(
        "audit log and its signed head",
        (*pieces, statement),
        (*log_pieces(root / "earlier", "ann-before"), earlier),
        (*log_pieces(root / "foreign", "bob"), earlier),
        read,
    )


def round_log_stored(root: Path) -> Subject:
    """The journal of a round: what reads is the newest state it was in, or nothing does."""
    store = DirectoryRoundStore(root / "read")

    def pieces(job: str, number: int) -> Pieces:
        terms = RoundTerms(RoundKey(job, number, 0), 1, "0" * 64, {0: WORKER}, "none", "{}", "fedavg", "{}", CHUNK)
        ends, path = [0], store.directory(terms.key) / "round.log"
        for stored in states(terms):
            store.save(stored)
            ends.append(path.stat().st_size)
        data = path.read_bytes()
        return tuple(data[begin:end] for begin, end in pairwise(ends))

    def states(terms: RoundTerms) -> Iterator[StoredRound]:
        yield StoredRound(terms, Phase.OPEN)
        yield StoredRound(replace(terms, fence=2), Phase.OPEN)
        yield StoredRound(replace(terms, fence=2), Phase.SEALED)

    earlier, foreign, ours = pieces(JOB, 1), pieces(OTHER_JOB, 2), pieces(JOB, 2)
    directory, marks = store.directory(RoundKey(JOB, 2, 0)), (root / "read" / "marks").read_bytes()

    def read(given: Sequence[bytes]) -> Any:
        shutil.rmtree(store.spool)
        directory.mkdir(parents=True)
        (directory / "round.log").write_bytes(b"".join(given))
        (root / "read" / "marks").write_bytes(marks)
        found = list(DirectoryRoundStore(root / "read").load())
        if not found:
            raise NotFoundError("no such round")
        return found

    return Subject("journal of a round", ours, earlier, foreign, read)


def fence_stored(root: Path) -> Subject:
    """The highest fence of a job, which keeps a coordinator that was replaced out."""
    store = DirectoryRoundStore(root)

    def piece(job: str, fence: int) -> Pieces:
        store.raise_fence(job, fence)
        return ((root / "fences" / job).read_bytes(),)

    def read(pieces: Sequence[bytes]) -> Any:
        (root / "fences" / JOB).write_bytes(pieces[0])
        return DirectoryRoundStore(root).fence(JOB)

    foreign, earlier = piece(OTHER_JOB, 1235), piece(JOB, 1233)
    return Subject("fence", piece(JOB, 1234), earlier, foreign, read)


def identities_stored(root: Path) -> Subject:
    """Who may belong to the network, and who is shut out."""
    worker, other = (Identity("cortex", Role.WORKER, name) for name in ("eu-1", "eu-2"))

    def piece(at_s: float, folder: str = "read") -> Pieces:
        ticket = Ticket("ab12", "cd" * 32, other, "eu", at_s + 100, at_s)
        issued = {worker: (Issued(0xABCDEF, at_s, at_s + 1),)}
        state = Identities({"ab12": ticket}, issued, {worker: "eu"}, {worker: Revocation(at_s, "lost", "ann")})
        FileIdentityStore(root / folder / "identities.json").save(state)
        return ((root / folder / "identities.json").read_bytes(),)

    def read(pieces: Sequence[bytes]) -> Any:
        (root / "read" / "identities.json").write_bytes(pieces[0])
        return FileIdentityStore(root / "read" / "identities.json").load()

    foreign = [piece(at_s, "another-network") for at_s in (7e8, 8e8, 11e8)][-1]
    earlier = piece(9e8)
    return Subject("identities", piece(1e9), earlier, foreign, read)


def everything_stored(root: Path, tls: TlsFiles) -> list[Subject]:
    made: list[Callable[[Path], Subject]] = [
        version_stored,
        spool_stored,
        shard_stored,
        residual_stored,
        outbox_stored,
        lambda folder: audit_stored(folder, tls),
        round_log_stored,
        fence_stored,
        identities_stored,
    ]
    return [make(root / str(index)) for index, make in enumerate(made)]
