"""Model versions: a sealed blob each, and the facts that make it one, written last."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

from cortex_common.errors import CorruptError, PreconditionError
from cortex_common.ids import JobId, NodeName, RoundNumber, SeatIndex, Sha256Hex
from cortex_common.security.encryption import ObjectHeader
from cortex_common.storage import BlobReader, BlobStore, BlobWriter
from cortex_common.tensors import Manifest
from services.aggregator.domain import Contribution, RoundKey, missing_version


@dataclass(frozen=True)
class Version:
    """One version. `sizes` are the lengths of its sealed chunks; `sequence` the last receipt's of its round."""

    header: ObjectHeader
    sizes: tuple[int, ...]
    content_sha256: Sha256Hex
    blob: str
    file_bytes: int
    update_norm: float
    contributions: tuple[Contribution, ...]
    sequence: int
    created_s: float

    @property
    def sha256(self) -> Sha256Hex:
        """The model's digest."""
        return Sha256Hex(self.header.model_sha256)

    def of_list(self, key: RoundKey, contributions: Sequence[Contribution]) -> Version:
        """This version, if it is made of the list asked for.

        Raises:
            PreconditionError: it is made of another one.
        """
        if tuple(sorted(contributions, key=lambda each: each.seat)) != self.contributions:
            raise PreconditionError(f"{key} is sealed with another list of contributions")
        return self

    @cached_property
    def manifest(self) -> Manifest:
        """The layout."""
        return Manifest.from_json(self.header.manifest)

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Where each sealed chunk begins in the blob, and the end."""
        return (0, *accumulate(self.sizes))


class VersionStore:
    """Versions by job and round over a blob store."""

    def __init__(self, blobs: BlobStore) -> None:
        self._blobs = blobs
        self._versions: dict[JobId, dict[RoundNumber, Version]] = {}

    def load(self) -> None:
        """Index what is stored; a blob without facts was never finished and is removed."""
        names = list(self._blobs.names(""))
        known = set()
        for name in names:
            if name.endswith(".json"):
                version = _read(self._blobs, name)
                known.add(version.blob)
                self._put(version)
        for name in names:
            if name.endswith(".blob") and name not in known:
                self._blobs.delete(name)

    def create(self, header: ObjectHeader) -> tuple[str, BlobWriter]:
        """Begin a version's blob; it has a name of its own, so an older version of the round stays whole meanwhile."""
        name = f"{header.job_id}/{header.round}-{header.attempt}-{header.object_id.hex()[:8]}.blob"
        return name, self._blobs.create(name)

    def commit(self, version: Version) -> None:
        """Make a version count: its blob must be durable already. Replaces the round's former version."""
        former = self.of_round(version.header.job_id, version.header.round)
        self._blobs.put(_facts_name(version), json.dumps(_to_facts(version), separators=(",", ":")).encode())
        self._put(version)
        if former is not None and former.blob != version.blob:
            self._blobs.delete(former.blob)

    def delete(self, version: Version) -> None:
        """Remove a version."""
        self._blobs.delete(_facts_name(version))
        self._blobs.delete(version.blob)
        self._versions.get(version.header.job_id, {}).pop(version.header.round, None)

    def of_job(self, job_id: JobId) -> tuple[Version, ...]:
        """All versions of a job, by round."""
        versions = self._versions.get(job_id, {})
        return tuple(versions[number] for number in sorted(versions))

    def of_round(self, job_id: JobId, number: RoundNumber) -> Version | None:
        """The version a round made."""
        return self._versions.get(job_id, {}).get(number)

    def by_sha256(self, job_id: JobId, sha256: str) -> Version:
        """The newest version with this digest.

        Raises:
            NotFoundError: names the rounds whose versions are here.
        """
        versions = self.of_job(job_id)
        for version in reversed(versions):
            if version.sha256 == sha256:
                return version
        raise missing_version(job_id, sha256, [each.header.round for each in versions])

    def all(self) -> Iterator[Version]:
        """Every version."""
        for versions in self._versions.values():
            yield from versions.values()

    def open(self, version: Version) -> VersionReader:
        """Read a version's sealed chunks."""
        return VersionReader(version, self._blobs.open(version.blob))

    def _put(self, version: Version) -> None:
        self._versions.setdefault(version.header.job_id, {})[version.header.round] = version


class VersionReader:
    """Sealed chunks of one version; threads may share it."""

    def __init__(self, version: Version, blob: BlobReader) -> None:
        self.header = version.header
        self._version = version
        self._blob = blob

    def read(self, index: int) -> bytes:
        """Sealed chunk `index`. CorruptError: the blob is cut short."""
        size = self._version.sizes[index]
        sealed = self._blob.read_at(self._version.offsets[index], size)
        if len(sealed) != size:
            raise CorruptError(f"version {self._version.sha256[:12]}: its blob is cut short at chunk {index}")
        return sealed

    def close(self) -> None:
        """Give it up."""
        self._blob.close()


def _facts_name(version: Version) -> str:
    return f"{version.header.job_id}/{version.header.round}.json"


def _to_facts(version: Version) -> dict[str, Any]:
    facts = {name: value for name, value in vars(version).items() if name in Version.__dataclass_fields__}
    facts["header"] = version.header.to_facts()
    facts["contributions"] = [asdict(each) for each in version.contributions]
    return facts


def _read(blobs: BlobStore, name: str) -> Version:
    with blobs.open(name) as blob:
        data = blob.read_at(0, blob.size)
    try:
        facts = json.loads(data)
        facts["header"] = ObjectHeader.from_facts(facts["header"])
        facts["sizes"] = tuple(facts["sizes"])
        facts["contributions"] = tuple(
            Contribution(
                SeatIndex(each["seat"]),
                NodeName(each["worker"]),
                Sha256Hex(each["content_sha256"]),
                float(each["weight"]),
            )
            for each in facts["contributions"]
        )
        return Version(**facts)
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptError(f"version {name} is not readable: {error}") from error
