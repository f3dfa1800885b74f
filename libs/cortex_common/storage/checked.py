"""JSON files that say by themselves whether they are as they were written.

The last key, `check`, is the beginning of the SHA-256 of everything before it: a changed byte is found when the file is
read, where an altered digit in it would have been believed. It is no signature: whoever may write the file may write
another one. A file from before there was such a key is read as it is.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from cortex_common.errors import CorruptError

_MARK = b',"check":"'
_DIGITS = 32


def to_checked_json(facts: Mapping[str, Any]) -> bytes:
    """The facts as a JSON object with its check. There must be at least one."""
    body = json.dumps(facts, separators=(",", ":")).encode()[:-1]
    return b"".join((body, _MARK, _check(body), b'"}'))


def from_checked_json(data: bytes) -> dict[str, Any]:
    """The facts again.

    Raises:
        CorruptError: the data is not as it was written.
    """
    body, mark, end = data.rpartition(_MARK)
    if mark and end != _check(body) + b'"}':
        raise CorruptError("it was changed since it was written: its check is another")
    try:
        facts = json.loads(body + b"}" if mark else data)
    except ValueError as error:
        raise CorruptError(f"it is no JSON: {error}") from None
    if not isinstance(facts, dict):
        raise CorruptError(f"it holds a {type(facts).__name__}; a JSON object was written")
    return facts


def _check(body: bytes) -> bytes:
    return hashlib.sha256(body).hexdigest()[:_DIGITS].encode()
