"""An update on its way is whole on the disk or not there, and is gone on with only as the update it is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cortex_common.errors import OverloadedError
from cortex_common.ids import JobId, KeyId
from cortex_common.job.parse import parse_job
from cortex_common.network.work import Assignment, Train
from cortex_common.security.encryption import DataKey, EncryptionManager, ObjectHeader
from cortex_common.security.objects import WRAPPED_BYTES, WrappedKey
from cortex_common.tensors import ChunkRange, chunk_ranges
from services.worker.failures import UpdateLostError
from services.worker.kept_update import KeptUpdate, Outbox
from tests.unit.worker.test_residuals import CHUNK, ELEMENTS, JOB, KEY, header

NEW_KEY = DataKey(KeyId("new"), 2, bytes(range(1, 33)))
PARTS = chunk_ranges(ELEMENTS, 0, CHUNK)
NUMBERS = np.random.default_rng(3).standard_normal(ELEMENTS).astype(np.float32)
ANSWER = {"steps": 45, "seconds": 1.5, "metrics": {"train_loss": 0.25}}
BOTH = EncryptionManager(KEY, NEW_KEY)


def payload(part: ChunkRange) -> bytes:
    return NUMBERS[part.start : part.stop].tobytes()


def assignment(**changes: Any) -> Assignment:
    key = changes.pop("key", KEY)
    made = Assignment(
        assignment_id="a",
        job_id=JOB,
        transfer_id=JOB,
        round=2,
        attempt=1,
        fence=5,
        seat=0,
        seats=1,
        spec=parse_job({"model": {"input_dim": 4, "output_dim": 2}, "data": {"train": "digits"}}),
        data_key=WrappedKey(key.key_id, key.epoch, bytes(WRAPPED_BYTES)),
        aggregator="agg",
        aggregator_address="127.0.0.1:1",
        base_sha256="version 1",
        chunk_elements=CHUNK,
        work=Train(),
    )
    return replace(made, **changes)


def kept(root: Path) -> tuple[ObjectHeader, KeptUpdate]:
    """An update of round 2, as another process finds it."""
    sent = header(2)
    Outbox(root, JOB).keep(sent, ANSWER, payload, BOTH)
    found = Outbox(root, JOB).load()
    assert found is not None
    return sent, found


def test_what_was_kept_is_sent_under_the_same_header_with_the_same_numbers(tmp_path: Path) -> None:
    sent, found = kept(tmp_path)
    # A coordinator that was started again meanwhile has a higher fence; the object stays the same.
    assert found.header_for(assignment(fence=6), ("topk", "")) == found.header == sent
    assert found.answer == ANSWER
    again = found.encoder(EncryptionManager(KEY))
    assert [bytes(again(part)) for part in PARTS] == [payload(part) for part in PARTS]


@pytest.mark.parametrize("changes", [{"round": 3}, {"seat": 1}, {"base_sha256": "another"}, {"chunk_elements": 256}])
def test_other_work_is_done_and_not_taken_from_the_disk(tmp_path: Path, changes: dict[str, Any]) -> None:
    _, found = kept(tmp_path)
    assert found.header_for(assignment(**changes), ("topk", "")) is None
    assert found.header_for(assignment(), ("int8", "")) is None


@pytest.mark.parametrize("changes", [{"attempt": 2}, {"transfer_id": JobId("job-1-t0")}, {"key": NEW_KEY}])
def test_a_round_tried_again_or_under_another_key_gets_an_object_of_its_own(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    sent, found = kept(tmp_path)
    due = found.header_for(assignment(**changes), ("topk", ""))
    assert due is not None
    assert (due.object_id, due.salt) != (sent.object_id, sent.salt)
    given = assignment(**changes)
    assert (due.job_id, due.attempt, due.key_id) == (given.transfer_id, given.attempt, given.data_key.key_id)
    moved = Outbox(tmp_path, JOB).keep(due, found.answer, found.encoder(BOTH), BOTH)
    again = moved.encoder(EncryptionManager(NEW_KEY if "key" in changes else KEY))
    assert [bytes(again(part)) for part in PARTS] == [payload(part) for part in PARTS]
    assert [path.name for path in (tmp_path / JOB).iterdir()] == ["sealed.update"]


def test_nothing_is_kept_of_an_update_that_could_not_be_made(tmp_path: Path) -> None:
    def breaks(part: ChunkRange) -> bytes:
        if part.index == 1:
            raise OverloadedError("full")
        return payload(part)

    with pytest.raises(OverloadedError):
        Outbox(tmp_path, JOB).keep(header(2), ANSWER, breaks, BOTH)
    assert list((tmp_path / JOB).iterdir()) == []
    assert Outbox(tmp_path, JOB).load() is None


def test_a_key_that_is_gone_and_a_damaged_chunk_cost_the_update_only(tmp_path: Path) -> None:
    _, found = kept(tmp_path)
    with pytest.raises(UpdateLostError, match="data key k"):
        found.encoder(EncryptionManager(NEW_KEY))
    data = bytearray(found.path.read_bytes())
    data[-1] ^= 1
    found.path.write_bytes(data)
    again = found.encoder(BOTH)
    assert bytes(again(PARTS[0])) == payload(PARTS[0])
    with pytest.raises(UpdateLostError, match="chunk 2"):
        again(PARTS[2])
    found.path.write_bytes(data[:-1])
    assert Outbox(tmp_path, JOB).load() is None
    assert not found.path.exists()


def test_no_number_rests_in_the_clear(tmp_path: Path) -> None:
    _, found = kept(tmp_path)
    data = found.path.read_bytes()
    assert found.path.stat().st_mode & 0o777 == 0o600
    assert not any(payload(part)[:64] in data for part in PARTS)


def test_what_was_accepted_is_forgotten(tmp_path: Path) -> None:
    kept(tmp_path)
    Outbox(tmp_path, JOB).forget()
    Outbox(tmp_path, JOB).forget()
    assert Outbox(tmp_path, JOB).load() is None
    assert list(tmp_path.iterdir()) == []
