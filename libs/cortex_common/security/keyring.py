"""Where data keys rest: one file a job, readable by this process's user only."""

from __future__ import annotations

import json
import os
from pathlib import Path

from cortex_common.errors import CorruptError, NotFoundError
from cortex_common.ids import JobId, KeyId
from cortex_common.security.encryption import DataKey, EncryptionManager
from cortex_common.storage.durable import write_durably


class FileKeyring:
    """Data keys of jobs in a directory of 0600 files.

    The seam of the key hierarchy: callers ask for a job's key and never see where it rests.
    """

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._directory = directory
        self._keys: dict[JobId, DataKey] = {}

    def create(self, job_id: JobId) -> DataKey:
        """A fresh key, on disk before it is returned."""
        key = EncryptionManager.new_data_key()
        document = {"key_id": key.key_id, "epoch": key.epoch, "key": key.key.hex()}
        write_durably(self._path(job_id), json.dumps(document).encode(), mode=0o600)
        return key

    def get(self, job_id: JobId) -> DataKey:
        """The job's key.

        Raises:
            NotFoundError: no key of this job.
            CorruptError: the file is damaged.
        """
        if job_id not in self._keys:
            self._keys[job_id] = self._read(job_id)
        return self._keys[job_id]

    def forget(self, job_id: JobId) -> None:
        """Erase the key of a job that never came to be."""
        self._keys.pop(job_id, None)
        self._path(job_id).unlink(missing_ok=True)

    def _read(self, job_id: JobId) -> DataKey:
        path = self._path(job_id)
        try:
            document = json.loads(path.read_bytes())
            return DataKey(KeyId(document["key_id"]), int(document["epoch"]), bytes.fromhex(document["key"]))
        except FileNotFoundError:
            raise NotFoundError(f"data key of job {job_id}: {path} is missing") from None
        except (ValueError, KeyError, TypeError) as error:
            raise CorruptError(f"data key of job {job_id}: {path} is damaged: {error}") from None

    def _path(self, job_id: JobId) -> Path:
        return self._directory / f"{os.fspath(job_id)}.json"
