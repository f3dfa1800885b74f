"""Key-encryption keys in a file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cortex_common.errors import CorruptError, NotFoundError, PreconditionError
from cortex_common.security.keyring import FileKeyring, RestingKey

SECRET = bytes(range(32))


def test_the_file_is_its_owners_alone(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "keyring.json"
    FileKeyring(path)
    assert path.stat().st_mode & 0o777 == 0o600


def test_what_is_wrapped_opens_after_a_restart(tmp_path: Path) -> None:
    ring = FileKeyring(tmp_path / "keyring.json")
    resting = ring.wrap(SECRET, b"for job 1")
    assert SECRET not in resting.wrapped
    assert resting.kek_id == ring.current
    assert FileKeyring(tmp_path / "keyring.json").unwrap(resting, b"for job 1") == SECRET


def test_the_same_secret_never_rests_as_the_same_bytes(tmp_path: Path) -> None:
    ring = FileKeyring(tmp_path / "keyring.json")
    assert ring.wrap(SECRET, b"c") != ring.wrap(SECRET, b"c")


def test_another_context_or_a_changed_byte_opens_nothing(tmp_path: Path) -> None:
    ring = FileKeyring(tmp_path / "keyring.json")
    resting = ring.wrap(SECRET, b"for job 1")
    with pytest.raises(CorruptError, match="of another context"):
        ring.unwrap(resting, b"for job 2")
    for place in range(len(resting.wrapped)):
        spoilt = bytearray(resting.wrapped)
        spoilt[place] ^= 1
        with pytest.raises(CorruptError):
            ring.unwrap(RestingKey(resting.kek_id, bytes(spoilt)), b"for job 1")
    for length in range(len(resting.wrapped)):
        with pytest.raises(CorruptError):
            ring.unwrap(RestingKey(resting.kek_id, resting.wrapped[:length]), b"for job 1")


def test_another_keyring_does_not_know_the_key(tmp_path: Path) -> None:
    resting = FileKeyring(tmp_path / "one.json").wrap(SECRET, b"c")
    with pytest.raises(NotFoundError, match=r"kek-.*two\.json"):
        FileKeyring(tmp_path / "two.json").unwrap(resting, b"c")


@pytest.mark.parametrize("mode", [0o644, 0o660, 0o604])
def test_a_file_that_others_may_read_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "keyring.json"
    FileKeyring(path)
    path.chmod(mode)
    with pytest.raises(PreconditionError, match="allowed: 600"):
        FileKeyring(path)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"current":"a","keys":{}}', '{"current":"a","keys":{"a":"00"}}', '{"keys":3}']
)
def test_a_damaged_file_is_never_replaced(tmp_path: Path, text: str) -> None:
    path = tmp_path / "keyring.json"
    path.write_text(text)
    path.chmod(0o600)
    with pytest.raises(CorruptError, match="damaged"):
        FileKeyring(path)
    assert path.read_text() == text


def test_secrets_are_not_in_what_is_printed(tmp_path: Path) -> None:
    ring = FileKeyring(tmp_path / "keyring.json")
    key = json.loads((tmp_path / "keyring.json").read_text())["keys"][ring.current]
    assert key not in repr(vars(ring))
