"""A shard on its way in: whatever a kill or a power cut left of its two files, what is held is as it came."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cortex_common.errors import CorruptError
from cortex_common.ids import JobId, KeyId, NodeName, RoundNumber, SeatIndex, Sha256Hex
from cortex_common.security.objects import ObjectHeader, ObjectKind
from cortex_common.security.shards import sealed_bytes, sealed_size
from cortex_common.transfer import TrailerFrame
from cortex_common.transfer.content import chunk_digest, content_digest
from services.aggregator.shard_spool import ShardSpool

CHUNKS, SIZE = 5, 5000
PLAIN = ObjectHeader(
    ObjectKind.SHARD, "", JobId("ward"), RoundNumber(0), 0, 0, NodeName(""), SeatIndex(0), KeyId("k"),
    "none", "", 1024, SIZE, 0, CHUNKS, Sha256Hex(""), object_id=bytes(16), salt=bytes(32),
)  # fmt: skip
SEALED = [bytes([index]) * sealed_size(PLAIN, index) for index in range(CHUNKS)]
DIGEST = hashlib.sha256(b"".join(SEALED)).hexdigest()
FACTS = PLAIN.to_facts() | {"model_sha256": DIGEST}
HEADER = ObjectHeader.from_facts(FACTS)
CONTENT = content_digest(map(chunk_digest, SEALED))


def begun(folder: Path, chunks: int) -> ShardSpool:
    """A spool with the first chunks."""
    spool = ShardSpool.start(folder, HEADER)
    for sealed in SEALED[:chunks]:
        spool.append(sealed)
    return spool


@given(
    held=st.integers(0, CHUNKS),
    lost=st.integers(0, 1500),
    lost_records=st.integers(0, 100),
    junk=st.tuples(st.binary(max_size=60), st.binary(max_size=60)),
)
def test_whatever_end_is_torn_the_rest_is_as_it_came_and_can_be_gone_on_with(
    held: int, lost: int, lost_records: int, junk: tuple[bytes, bytes]
) -> None:
    with TemporaryDirectory() as name:
        folder = Path(name)
        begun(folder, held).close()
        journal = folder / f"{DIGEST}.journal"
        header_bytes = journal.stat().st_size - 44 * held
        for path, cut, floor, tail in (
            (folder / f"{DIGEST}.sealed", lost, 0, junk[0]),
            (journal, lost_records, header_bytes, junk[1]),
        ):
            os.truncate(path, max(path.stat().st_size - cut, floor))
            with path.open("ab") as file:
                file.write(tail)
        spool = ShardSpool.load(folder, DIGEST)
        assert (spool.header, spool.chunks) == (HEADER, 0), "nothing counts before it is proven"
        spool.prove()
        whole = [n for n in range(held + 1) if sealed_bytes(HEADER, n) <= sealed_bytes(HEADER, held) - lost]
        kept = (44 * held - lost_records) // 44 if lost_records else held
        assert spool.chunks >= max(0, min(max(whole, default=0), kept))
        assert spool.chunks <= held
        assert spool.path.read_bytes() == b"".join(SEALED[: spool.chunks])
        for sealed in SEALED[spool.chunks :]:
            spool.append(sealed)
        assert spool.finish(TrailerFrame(CHUNKS, CONTENT)) == CONTENT
        spool.close()
        again = ShardSpool.load(folder, DIGEST)
        again.prove()
        assert again.finish(TrailerFrame(CHUNKS, CONTENT)) == CONTENT
        again.erase()
        assert list(folder.iterdir()) == []


def test_what_is_not_whole_or_not_the_shard_is_refused(tmp_path: Path) -> None:
    spool = begun(tmp_path, CHUNKS - 1)
    with pytest.raises(CorruptError, match="not those its trailer tells of"):
        spool.finish(TrailerFrame(CHUNKS, CONTENT))
    spool.append(SEALED[-1][:-1] + b"x")
    assert spool.is_spoilt
    wrong = content_digest(map(chunk_digest, [*SEALED[:-1], SEALED[-1][:-1] + b"x"]))
    with pytest.raises(CorruptError, match=f"its chunks are not those of {DIGEST}"):
        spool.finish(TrailerFrame(CHUNKS, wrong))
    spool.erase()


def test_a_spool_that_was_dropped_meanwhile_holds_nothing(tmp_path: Path) -> None:
    begun(tmp_path, 3).close()
    spool = ShardSpool.load(tmp_path, DIGEST)
    ShardSpool.load(tmp_path, DIGEST).erase()
    spool.prove()
    assert spool.chunks == 0


def test_a_journal_of_another_shard_is_refused(tmp_path: Path) -> None:
    begun(tmp_path, 1).close()
    for suffix in (".sealed", ".journal"):
        (tmp_path / f"{DIGEST}{suffix}").rename(tmp_path / f"{'0' * 64}{suffix}")
    with pytest.raises(CorruptError, match=f"it tells of shard {DIGEST}"):
        ShardSpool.load(tmp_path, "0" * 64)
