"""How far the state files of a directory have come: an older one that is put back in its place is found and refused.

The ledger, one file of the directory, holds a key and for each state file its mark: the highest version of it that was
on the disk. A state file carries its version and a code (HMAC-SHA-256 under the key) over its name and content. One of
a version below its mark, or without the right code, is not what was written here last.

A file is written and synced first, its mark after that, in place and not synced: after a kill a mark is right or one
behind, after a power cut any number behind, and a torn mark is none. So nothing falls below its mark by itself. The
versions of all files are drawn from one counter: a file written anew is never below what an old page of the ledger has.
What has no mark is taken as it is: files from before there was a ledger, or whose ledger was lost or removed.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from cortex_common.errors import CorruptError
from cortex_common.logging import get_logger
from cortex_common.storage.checked import from_checked_json, to_checked_json
from cortex_common.storage.durable import make_directory, set_aside, sync_file, write_durably

_log = get_logger(__name__)

LEDGER = "marks"
_MAGIC = b"CTXMARK1"
_KEY_BYTES = 32
# The key has a page of its own, which is never written again: no torn write of a mark can reach it.
_HEAD_BYTES = 4096
_NAME_BYTES, _VERSION_BYTES, _CHECK_BYTES = 16, 8, 8
_SLOT_BYTES = _NAME_BYTES + _VERSION_BYTES + _CHECK_BYTES


class _Mark(NamedTuple):
    slot: int
    version: int


class HighWaterMarks:
    """The ledger of a directory, made with a new key where there is none or where it cannot be read.

    One process uses it at a time; its threads share one object. Names are of whatever form the user of it likes.
    """

    def __init__(self, directory: Path) -> None:
        self._path = directory / LEDGER
        self._lock = threading.Lock()
        make_directory(directory)
        data = self._path.read_bytes() if self._path.exists() else b""
        self._key = _key_of(data) or self._begun_anew(bool(data))
        self._marks: dict[bytes, _Mark] = {}
        self._free: list[int] = []
        self._slots = max(0, -(-(len(data) - _HEAD_BYTES) // _SLOT_BYTES)) if _key_of(data) else 0
        self._read(data)
        self._latest = max((mark.version for mark in self._marks.values()), default=0)

    def stamped(self, name: str, facts: Mapping[str, Any]) -> tuple[dict[str, Any], int]:
        """The facts with their version and code, to be written; and the version, for `raise_to` afterwards."""
        with self._lock:
            self._latest += 1
            version = self._latest
        numbered = {**facts, "version": version}
        return {**numbered, "code": self._code(name, numbered)}, version

    def raise_to(self, name: str, version: int) -> None:
        """This version of the file is on the disk: no older one is taken from now on.

        A mark that cannot be written protects as long as the process lives: no service fails for it.
        """
        known = self._known(name)
        with self._lock:
            self._latest = max(self._latest, version)
            before = self._marks.get(known)
            if before is not None and before.version >= version:
                return
            slot = before.slot if before else self._free.pop() if self._free else self._slots
            self._slots = max(self._slots, slot + 1)
            self._marks[known] = _Mark(slot, version)
            self._put(slot, self._entry(known, version))

    def check(self, name: str, facts: Mapping[str, Any]) -> None:
        """Take facts as they were read only if they are the newest written here.

        Raises:
            CorruptError: an older file was put back, or one that was not written here; says what an operator can do.
        """
        plain = {key: value for key, value in facts.items() if key != "code"}
        is_ours = hmac.compare_digest(str(facts.get("code", "")).encode(), self._code(name, plain).encode())
        version, mark = facts.get("version", 0), self._marks.get(self._known(name))
        if not isinstance(version, int):
            raise CorruptError(f"its version is {str(version)[:40]!r}; a number was written")
        if mark is not None and version < mark.version:
            raise self._refused(f"it is an older one put back: version {version}, but {mark.version} was written here")
        if mark is not None and not is_ours:
            raise self._refused("it was not written here: its code is of another place")
        if is_ours:
            self.raise_to(name, version)

    def require_unknown(self, name: str) -> None:
        """Believe that there is no such file only if there never was one, or it was forgotten.

        Raises:
            CorruptError: it is gone.
        """
        mark = self._marks.get(self._known(name))
        if mark is not None:
            raise self._refused(f"it is gone, but version {mark.version} was written here")

    def forget(self, name: str, *, durably: bool = False) -> None:
        """The file is about to be removed.

        Args:
            name: Of the file.
            durably: Also a power cut that loses the file must not bring the mark back.
        """
        with self._lock:
            mark = self._marks.pop(self._known(name), None)
            if mark is not None:
                self._free.append(mark.slot)
                self._put(mark.slot, bytes(_SLOT_BYTES), durably=durably)

    def _refused(self, why: str) -> CorruptError:
        return CorruptError(
            f"{why}; put back the newest, or, if this one is meant, stop the service and remove {self._path}: "
            "then everything beside it is taken as it is"
        )

    def _begun_anew(self, is_damaged: bool) -> bytes:
        """A new key, on the disk before any file relies on it."""
        if is_damaged:
            _log.warning("marks_damaged", path=str(set_aside(self._path)))
        key = secrets.token_bytes(_KEY_BYTES)
        head = _MAGIC + key + hashlib.sha256(_MAGIC + key).digest()
        write_durably(self._path, head.ljust(_HEAD_BYTES, b"\0"), mode=0o600)
        return key

    def _read(self, data: bytes) -> None:
        for slot in range(self._slots):
            start = _HEAD_BYTES + slot * _SLOT_BYTES
            entry = data[start : start + _SLOT_BYTES]
            known, version = entry[:_NAME_BYTES], int.from_bytes(entry[_NAME_BYTES:-_CHECK_BYTES], "big")
            if entry != self._entry(known, version):
                self._free.append(slot)
            elif known not in self._marks or self._marks[known].version < version:
                self._marks[known] = _Mark(slot, version)

    def _put(self, slot: int, entry: bytes, *, durably: bool = False) -> None:
        try:
            file = os.open(self._path, os.O_WRONLY)
            try:
                os.pwrite(file, entry, _HEAD_BYTES + slot * _SLOT_BYTES)
                if durably:
                    sync_file(file, self._path)
            finally:
                os.close(file)
        except OSError as error:
            _log.warning("mark_not_written", path=str(self._path), reason=error.strerror or str(error))

    def _entry(self, known: bytes, version: int) -> bytes:
        body = known + version.to_bytes(_VERSION_BYTES, "big")
        return body + self._mac(b"mark", body)[:_CHECK_BYTES]

    def _known(self, name: str) -> bytes:
        return self._mac(b"name", name.encode())[:_NAME_BYTES]

    def _code(self, name: str, facts: Mapping[str, Any]) -> str:
        body = json.dumps([name, facts], separators=(",", ":")).encode()
        return self._mac(b"file", body)[:_NAME_BYTES].hex()

    def _mac(self, use: bytes, data: bytes) -> bytes:
        return hmac.digest(self._key, use + data, "sha256")


def _key_of(data: bytes) -> bytes:
    """The key in a ledger; nothing if it is not readable."""
    end = len(_MAGIC) + _KEY_BYTES
    head, check = data[:end], data[end : end + hashlib.sha256().digest_size]
    is_whole = head.startswith(_MAGIC) and len(data) >= _HEAD_BYTES and check == hashlib.sha256(head).digest()
    return head[len(_MAGIC) :] if is_whole else b""


@dataclass(frozen=True, slots=True)
class MarkedFile:
    """A JSON object in a file that is replaced as a whole, and that must not become older."""

    path: Path
    marks: HighWaterMarks
    name: str

    def read(self, parse: Callable[[bytes], dict[str, Any]] = from_checked_json) -> dict[str, Any] | None:
        """What was written last; None if nothing was.

        Args:
            parse: For files of versions before, which may have had other forms.

        Raises:
            CorruptError: it is damaged, older, from elsewhere, or gone.
            OSError: it cannot be read.
        """
        try:
            data = self.path.read_bytes()
        except FileNotFoundError:
            self.marks.require_unknown(self.name)
            return None
        facts = parse(data)
        self.marks.check(self.name, facts)
        return facts

    def write(self, facts: Mapping[str, Any], write: Callable[[Path, bytes], None] = write_durably) -> None:
        """Replace it.

        Args:
            facts: At least one.
            write: Replaces a file in one step and returns when it is on the disk; what it raises, this raises.
        """
        stamped, version = self.marks.stamped(self.name, facts)
        write(self.path, to_checked_json(stamped))
        self.marks.raise_to(self.name, version)

    def remove(self) -> None:
        """Forget it. Its mark goes first, for good: no power cut leaves a mark without its file."""
        self.marks.forget(self.name, durably=True)
        self.path.unlink(missing_ok=True)
