"""How much of each job has left this site: durable, so that a restart does not forget it."""

from __future__ import annotations

import json
import threading
from pathlib import Path

from cortex_common.errors import CorruptError
from cortex_common.ids import JobId
from cortex_common.storage.durable import make_directory, write_durably

_KEPT_JOBS = 10_000


class Outgoing:
    """Bytes of updates sent for each job. What is about to be sent counts before its first byte.

    Calls block, and may be made by several threads: jobs send at the same time.
    """

    def __init__(self, path: Path) -> None:
        """Read what was counted before.

        Raises:
            CorruptError: the file is damaged.
        """
        self._path = path
        self._one_at_a_time = threading.Lock()
        make_directory(path.parent)
        self._spent = self._read()

    def spent(self, job_id: JobId) -> int:
        """Bytes sent for a job, or about to be."""
        return self._spent.get(job_id, 0)

    def reserve(self, job_id: JobId, most_bytes: int) -> None:
        """Count what is about to be sent; on the disk when this returns."""
        self._change(job_id, most_bytes)

    def settle(self, job_id: JobId, most_bytes: int, sent_bytes: int) -> None:
        """Count what was sent instead of what was reserved for it."""
        self._change(job_id, sent_bytes - most_bytes)

    def _change(self, job_id: JobId, by_bytes: int) -> None:
        with self._one_at_a_time:
            changed = {**self._spent, job_id: self.spent(job_id) + by_bytes}
            while len(changed) > _KEPT_JOBS:
                del changed[next(iter(changed))]
            write_durably(self._path, json.dumps(changed).encode(), mode=0o600)
            self._spent = changed

    def _read(self) -> dict[JobId, int]:
        try:
            document = json.loads(self._path.read_bytes())
            return {JobId(str(job)): int(count) for job, count in document.items()}
        except FileNotFoundError:
            return {}
        except (ValueError, TypeError, AttributeError) as error:
            raise CorruptError(f"{self._path}, the bytes that have left for each job, is damaged: {error}") from None
