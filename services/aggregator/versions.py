"""Model versions: a sealed blob each, the outer optimiser's state beside it; the facts that make it one come last."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import accumulate
from types import TracebackType
from typing import Any, Self

from cortex_common.errors import CorruptError, NotFoundError, PreconditionError
from cortex_common.ids import JobId, NodeName, RoundNumber, SeatIndex, Sha256Hex
from cortex_common.security.encryption import ObjectHeader, ObjectKind
from cortex_common.storage import BlobReader, BlobStore, BlobWriter
from cortex_common.tensors import Manifest
from services.aggregator.domain import Contribution, RoundKey, missing_version


@dataclass(frozen=True, slots=True)
class OuterState:
    """The sealed state beside a version. `sizes` are the lengths of its sealed chunks."""

    header: ObjectHeader
    sizes: tuple[int, ...]
    blob: str


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
    state: OuterState | None = None

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

    @property
    def blobs(self) -> frozenset[str]:
        """Names of everything it consists of."""
        return frozenset({self.blob, self.state.blob} if self.state else {self.blob})


class VersionStore:
    """Versions by job and round over a blob store."""

    def __init__(self, blobs: BlobStore) -> None:
        self._blobs = blobs
        self._versions: dict[JobId, dict[RoundNumber, Version]] = {}

    def load(self) -> None:
        """Index what is stored; a blob without facts was never finished and is removed."""
        names = list(self._blobs.names(""))
        known: set[str] = set()
        for name in names:
            if name.endswith(".json"):
                version = _read(self._blobs, name)
                known |= version.blobs
                self._put(version)
        for name in names:
            if name.endswith(".blob") and name not in known:
                self._blobs.delete(name)

    def create(self, header: ObjectHeader) -> tuple[str, BlobWriter]:
        """Begin a blob; it has a name of its own, so an older version of the round stays whole meanwhile."""
        kind = "" if header.kind is ObjectKind.MODEL else f".{header.kind.value}"
        name = f"{header.job_id}/{header.round}-{header.attempt}-{header.object_id.hex()[:8]}{kind}.blob"
        return name, self._blobs.create(name)

    def erase(self, names: Iterable[str]) -> None:
        """Remove blobs that no version names."""
        for name in names:
            self._blobs.delete(name)

    def draft(self, header: ObjectHeader, state: ObjectHeader | None = None) -> Draft:
        """Begin a version, with a state beside it or without."""
        return Draft(self, header, state)

    def commit(self, version: Version) -> None:
        """Make a version count: its blobs must be durable already. Replaces the round's former version."""
        former = self.of_round(version.header.job_id, version.header.round)
        self._blobs.put(_facts_name(version), json.dumps(_to_facts(version), separators=(",", ":")).encode())
        self._put(version)
        self.erase(former.blobs - version.blobs if former else ())

    def delete(self, version: Version) -> None:
        """Remove a version."""
        self._blobs.delete(_facts_name(version))
        self.erase(version.blobs)
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
        what = f"version {version.sha256[:12]}"
        return VersionReader(version.header, version.sizes, self._blobs.open(version.blob), what)

    def open_state(self, version: Version) -> VersionReader | None:
        """Read the sealed chunks of a version's outer state; None if it has none. CorruptError: it is gone."""
        if version.state is None:
            return None
        what = f"the outer state of version {version.sha256[:12]}"
        try:
            blob = self._blobs.open(version.state.blob)
        except NotFoundError as error:
            raise CorruptError(f"{what} is gone: {error.message}") from error
        return VersionReader(version.state.header, version.state.sizes, blob, what)

    def _put(self, version: Version) -> None:
        self._versions.setdefault(version.header.job_id, {})[version.header.round] = version


class Draft:
    """A version being written: nothing of it stays unless its block reaches `commit`."""

    def __init__(self, versions: VersionStore, header: ObjectHeader, state: ObjectHeader | None) -> None:
        self._versions = versions
        self._keep = False
        self.state: BlobWriter | None
        self.state_blob, self.state = versions.create(state) if state else ("", None)
        self.blob, self.values = versions.create(header)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for writer in filter(None, (self.values, self.state)):
            writer.__exit__(kind, error, trace)
        if not self._keep:
            self._versions.erase(filter(None, (self.blob, self.state_blob)))

    def commit(self, version: Version) -> None:
        """Blobs first, facts last: the version and its state exist once the facts do."""
        if self.state is not None:
            self.state.commit()
        self.values.commit()
        # From here on the facts may be on the disk: what they name must stay.
        self._keep = True
        self._versions.commit(version)


class VersionReader:
    """Sealed chunks of one version, or of its outer state; threads may share it."""

    def __init__(self, header: ObjectHeader, sizes: Sequence[int], blob: BlobReader, what: str) -> None:
        self.header = header
        self._sizes = sizes
        self._offsets = (0, *accumulate(sizes))
        self._blob = blob
        self._what = what

    def read(self, index: int) -> bytes:
        """Sealed chunk `index`. CorruptError: the blob is cut short."""
        sealed = self._blob.read_at(self._offsets[index], self._sizes[index])
        if len(sealed) != self._sizes[index]:
            raise CorruptError(f"{self._what}: its blob is cut short at chunk {index}")
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
    if version.state is not None:
        facts["state"] = {**asdict(version.state), "header": version.state.header.to_facts()}
    return facts


def _read(blobs: BlobStore, name: str) -> Version:
    with blobs.open(name) as blob:
        data = blob.read_at(0, blob.size)
    try:
        facts = json.loads(data)
        facts["header"] = ObjectHeader.from_facts(facts["header"])
        facts["sizes"] = tuple(facts["sizes"])
        facts["state"] = _read_state(facts.get("state"))
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


def _read_state(facts: Mapping[str, Any] | None) -> OuterState | None:
    if facts is None:
        return None
    return OuterState(ObjectHeader.from_facts(facts["header"]), tuple(facts["sizes"]), facts["blob"])
