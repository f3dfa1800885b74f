"""Key-encryption keys in a file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cortex_common.errors import CorruptError, NotFoundError, PreconditionError
from cortex_common.security.keyring import FileKeyring
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
