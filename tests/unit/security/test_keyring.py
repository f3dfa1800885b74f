"""Key-encryption keys in a file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from cortex_common.errors import CorruptError, NotFoundError, PreconditionError
from cortex_common.security.keyring import FileKeyring
from cortex_common.security.objects import KEY_BYTES
from tests.conformance.key_encryption import SECRET, KeyEncryptionConformance
from tests.fakes import ManualClock


@pytest.fixture
def clock():
    return ManualClock()


@pytest.fixture
def again(tmp_path, clock):
    return lambda: FileKeyring(tmp_path / "deep" / "keyring.json", clock)


@pytest.fixture
def ring(again):
    return again()


class TestFileKeyring(KeyEncryptionConformance):
    pass


def test_the_file_is_its_owners_alone(ring: FileKeyring, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "keyring.json"
    for change in (ring.rotate, lambda: ring.erase(ring.ids[0])):
        assert path.stat().st_mode & 0o777 == 0o600
        change()
    assert path.stat().st_mode & 0o777 == 0o600


def test_another_keyring_does_not_know_the_key(ring: FileKeyring, clock: ManualClock, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"kek-.*two\.json"):
        FileKeyring(tmp_path / "two.json", clock).unwrap(ring.wrap(SECRET, b"c"), b"c")


@pytest.mark.parametrize("mode", [0o644, 0o660, 0o604])
def test_a_file_that_others_may_read_is_refused(tmp_path: Path, clock: ManualClock, mode: int) -> None:
    path = tmp_path / "keyring.json"
    FileKeyring(path, clock)
    path.chmod(mode)
    with pytest.raises(PreconditionError, match="allowed: 600"):
        FileKeyring(path, clock)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"current":"a","keys":{}}', '{"current":"a","keys":{"a":"00"}}', '{"keys":3}']
)
def test_a_damaged_file_is_never_replaced(tmp_path: Path, clock: ManualClock, text: str) -> None:
    path = tmp_path / "keyring.json"
    path.write_text(text)
    path.chmod(0o600)
    with pytest.raises(CorruptError, match="damaged"):
        FileKeyring(path, clock)
    assert path.read_text() == text


def test_secrets_are_not_in_what_is_printed(ring: FileKeyring, tmp_path: Path) -> None:
    key = json.loads((tmp_path / "deep" / "keyring.json").read_text())["keys"][ring.current]
    assert key not in repr(vars(ring))


def test_what_another_process_has_changed_in_the_file_stays(
    ring: FileKeyring, again: Callable[[], FileKeyring]
) -> None:
    first, other = ring.current, again()
    made = other.rotate()
    resting = other.wrap(SECRET, b"c")
    last = ring.rotate()
    assert again().ids == (first, made, last)
    ring.erase(first)
    assert again().ids == (made, last)
    assert again().unwrap(resting, b"c") == SECRET


def test_a_changed_byte_is_found_before_anything_is_wrapped_under_it(tmp_path: Path, clock: ManualClock) -> None:
    path = tmp_path / "keyring.json"
    first = FileKeyring(path, clock).wrap(SECRET, b"c")
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        try:
            opened = FileKeyring(path, clock)
        except CorruptError:
            continue
        assert opened.unwrap(first, b"c") == SECRET
    assert place > KEY_BYTES


def test_a_file_of_versions_before_is_read_and_has_a_check_from_then_on(tmp_path: Path, clock: ManualClock) -> None:
    path, name, key = tmp_path / "keyring.json", "kek-20260101T000000000000Z-00000000", bytes(KEY_BYTES).hex()
    path.write_text(json.dumps({"current": name, "keys": {name: key}}, indent=1))
    path.chmod(0o600)
    made = FileKeyring(path, clock).rotate()
    assert FileKeyring(path, clock).ids == (name, made)
    assert b'"check"' in path.read_bytes()


def test_keys_that_were_damaged_or_cannot_be_written_are_not_replaced(ring: FileKeyring, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "keyring.json"
    path.write_bytes(path.read_bytes()[:-9])
    before = path.read_bytes()
    with pytest.raises(PreconditionError, match="damaged"):
        ring.rotate()
    assert path.read_bytes() == before
