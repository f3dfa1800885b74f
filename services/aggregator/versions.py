"""Model versions: sealed blobs (the version whole, as a delta, its outer state), and the facts that come last."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import accumulate
from threading import Lock
from types import TracebackType
from typing import Any, Self

from cortex_common.errors import CorruptError, NotFoundError, OverloadedError, PreconditionError
from cortex_common.ids import JobId, NodeName, RoundNumber, SeatIndex, Sha256Hex
from cortex_common.logging import get_logger
from cortex_common.security.encryption import ObjectHeader, ObjectKind
from cortex_common.storage import BlobReader, BlobStore, BlobWriter
from cortex_common.storage.checked import from_checked_json, to_checked_json
from cortex_common.tensors import Manifest
from services.aggregator.domain import Contribution, RoundKey, missing_version

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class SealedPart:
    """One sealed object of a version. `sizes` are the lengths of its sealed chunks."""

    header: ObjectHeader
    sizes: tuple[int, ...]
    blob: str
    content_sha256: Sha256Hex

    @property
    def what(self) -> str:
        """For errors."""
        return f"the {self.header.kind.value} of round {self.header.round} of job {self.header.job_id}"


@dataclass(frozen=True)
class Version:
    """One version. `sizes` are the lengths of its sealed chunks; `sequence` the last receipt's of its round.

    A region's copy may hold the delta only: then `blob` and `sizes` are empty, and the header is the delta's. `readers`
    are the workers that may download it, even when no round of its job is known here any more.
    """

    header: ObjectHeader
    sizes: tuple[int, ...]
    content_sha256: Sha256Hex
    blob: str
    file_bytes: int
    update_norm: float
    contributions: tuple[Contribution, ...]
    sequence: int
    created_s: float
    state: SealedPart | None = None
    delta: SealedPart | None = None
    readers: tuple[NodeName, ...] = ()

    @property
    def whole(self) -> SealedPart | None:
        """All of it, exactly; None in a copy that holds the delta only."""
        return SealedPart(self.header, self.sizes, self.blob, self.content_sha256) if self.blob else None

    @property
    def what(self) -> str:
        """For errors."""
        return f"version {self.sha256[:12]} of round {self.header.round} of job {self.header.job_id}"

    @property
    def sha256(self) -> Sha256Hex:
        """The model's digest."""
        return Sha256Hex(self.header.model_sha256)

    def has_member(self, worker: NodeName) -> bool:
        """Whether a worker had a seat in the round that made it; versions from before know contributors only."""
        return worker in self.readers or any(each.worker == worker for each in self.contributions)

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
        parts = (self.whole, self.state, self.delta)
        return frozenset(part.blob for part in parts if part is not None)


class VersionStore:
    """Versions by job and round over a blob store."""

    def __init__(self, blobs: BlobStore) -> None:
        self._blobs = blobs
        self._versions: dict[JobId, dict[RoundNumber, Version]] = {}
        self._changing: dict[JobId, Lock] = defaultdict(Lock)

    def load(self) -> None:
        """Index what is stored; a blob without facts was never finished and is removed.

        Facts that cannot be read are set aside, and blobs that may be theirs with them.
        """
        names = list(self._blobs.names(""))
        known: set[str] = set()
        damaged: list[str] = []
        for name in names:
            if name.endswith(".json"):
                try:
                    version = _read(self._blobs, name)
                except CorruptError as error:
                    damaged.append(name.removesuffix(".json") + "-")
                    self._set_aside(name, error.message)
                else:
                    known |= version.blobs
                    self._put(version)
        for name in names:
            if name.endswith(".blob") and name not in known:
                if name.startswith(tuple(damaged)):
                    self._set_aside(name, "its version's facts cannot be read")
                else:
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

    def draft(
        self, header: ObjectHeader, state: ObjectHeader | None = None, delta: ObjectHeader | None = None
    ) -> Draft:
        """Begin a version, with a state and a delta beside it or without."""
        return Draft(self, header, state, delta)

    def commit(self, version: Version, parts: Sequence[BlobWriter] = ()) -> None:
        """Make a version count: of its blobs, `parts` become durable with it, the others must be so already.

        Replaces the round's former version, unless that is of a later attempt.

        Raises:
            OverloadedError: the store is full; the former version still counts.
            PreconditionError: a later attempt has made the round's version meanwhile.
        """
        header = version.header
        with self._changing[header.job_id]:
            former = self.of_round(header.job_id, header.round)
            if former is not None and former.header.attempt > header.attempt:
                key = RoundKey(header.job_id, header.round, header.attempt)
                raise PreconditionError(f"{key}: attempt {former.header.attempt} has made its version already")
            facts = to_checked_json(_to_facts(version))
            self._blobs.publish(_facts_name(version), facts, parts)
            self._put(version)
            self.erase(former.blobs - version.blobs if former else ())

    def admit(self, job_id: JobId, number: RoundNumber, readers: frozenset[NodeName]) -> None:
        """Let these workers download a round's version too; durable.

        Raises:
            OverloadedError: the store is full.
        """
        with self._changing[job_id]:
            version = self.of_round(job_id, number)
            if version is None or readers <= set(version.readers):
                return
            admitted = replace(version, readers=tuple(sorted(readers.union(version.readers))))
            self._blobs.publish(_facts_name(admitted), to_checked_json(_to_facts(admitted)), ())
            self._put(admitted)

    def delete(self, version: Version) -> None:
        """Remove a version; nothing happens when another one has replaced it."""
        header = version.header
        with self._changing[header.job_id]:
            if self.of_round(header.job_id, header.round) is version:
                self._blobs.delete(_facts_name(version))
                self.erase(version.blobs)
                self._versions[header.job_id].pop(header.round, None)

    def sweep(self, job_id: JobId) -> None:
        """Remove durably everything of a job that belongs to no version of it. Nobody may be writing one."""
        with self._changing[job_id]:
            versions = self.of_job(job_id)
            self._blobs.sweep(job_id, {_facts_name(each) for each in versions}.union(*(v.blobs for v in versions)))
        if not versions:
            self._versions.pop(job_id, None)
            self._changing.pop(job_id, None)

    def is_whole(self, part: SealedPart) -> bool:
        """Whether a blob is there with all its bytes; what they are shows when they are opened."""
        try:
            with self._blobs.open(part.blob) as blob:
                return blob.size == sum(part.sizes)
        except NotFoundError:
            return False

    def of_job(self, job_id: JobId) -> tuple[Version, ...]:
        """All versions of a job, by round."""
        versions = dict(self._versions.get(job_id, {}))
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

    def delta_from(self, wanted: Version, held_sha256: str) -> SealedPart | None:
        """What gives the numbers of a version to who holds that one: its delta, or that of another with its digest."""
        for version in self.of_job(wanted.header.job_id):
            delta = version.delta
            if version.sha256 == wanted.sha256 and delta is not None and delta.header.base_sha256 == held_sha256:
                return delta
        return None

    def all(self) -> Iterator[Version]:
        """Every version."""
        # Copies: threads that fold and prune add and remove meanwhile.
        for versions in list(self._versions.values()):
            yield from list(versions.values())

    def open(self, version: Version) -> PartReader:
        """Read a version's sealed chunks. NotFoundError: only its delta is here."""
        if version.whole is None:
            raise NotFoundError(f"{version.what} is here as a delta only")
        return self.open_part(version.whole)

    def open_part(self, part: SealedPart) -> PartReader:
        """Read the sealed chunks of one object."""
        return PartReader(part, self._blobs.open(part.blob))

    def open_state(self, version: Version) -> PartReader | None:
        """Read the sealed chunks of a version's outer state; None if it has none. CorruptError: it is gone."""
        if version.state is None:
            return None
        try:
            return self.open_part(version.state)
        except NotFoundError as error:
            raise CorruptError(f"the outer state of {version.what} is gone: {error.message}") from error

    def _set_aside(self, name: str, reason: str) -> None:
        log.error("damaged_file_set_aside", path=self._blobs.set_aside(name), reason=reason)

    def _put(self, version: Version) -> None:
        self._versions.setdefault(version.header.job_id, {})[version.header.round] = version


class Draft:
    """A version being written: nothing of it stays unless its block reaches `commit`."""

    def __init__(
        self, versions: VersionStore, header: ObjectHeader, state: ObjectHeader | None, delta: ObjectHeader | None
    ) -> None:
        self._versions = versions
        self._keep = False
        self.state: BlobWriter | None
        self.delta: BlobWriter | None
        self.state_blob, self.state = versions.create(state) if state else ("", None)
        self.delta_blob, self.delta = versions.create(delta) if delta else ("", None)
        self.blob, self.values = versions.create(header)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for writer in filter(None, (self.values, self.state, self.delta)):
            writer.__exit__(kind, error, trace)
        if not self._keep:
            self._versions.erase(filter(None, (self.blob, self.state_blob, self.delta_blob)))

    def commit(self, version: Version) -> None:
        """Blobs first, facts last: the version, its state and its delta exist once the facts do."""
        # Unless the store says that it is full, the facts may be on the disk afterwards: what they name must stay.
        self._keep = True
        try:
            self._versions.commit(version, list(filter(None, (self.state, self.delta, self.values))))
        except (OverloadedError, PreconditionError):
            self._keep = False
            raise


class PartReader:
    """Sealed chunks of one object; threads may share it."""

    def __init__(self, part: SealedPart, blob: BlobReader) -> None:
        self.header = part.header
        self._part = part
        self._offsets = (0, *accumulate(part.sizes))
        self._blob = blob

    def read(self, index: int) -> bytes:
        """Sealed chunk `index`. CorruptError: the blob is cut short."""
        size = self._part.sizes[index]
        sealed = self._blob.read_at(self._offsets[index], size)
        if len(sealed) != size:
            raise CorruptError(f"{self._part.what}: its blob is cut short at chunk {index}")
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
    for name, part in (("state", version.state), ("delta", version.delta)):
        facts[name] = {**asdict(part), "header": part.header.to_facts()} if part is not None else None
    return facts


def _read(blobs: BlobStore, name: str) -> Version:
    with blobs.open(name) as blob:
        data = blob.read_at(0, blob.size)
    try:
        facts = from_checked_json(data)
        facts["header"] = ObjectHeader.from_facts(facts["header"])
        facts["sizes"] = tuple(facts["sizes"])
        facts["readers"] = tuple(NodeName(name) for name in facts.get("readers", ()))
        for part in ("state", "delta"):
            facts[part] = _read_part(facts.get(part))
        facts["contributions"] = tuple(
            Contribution(
                SeatIndex(each["seat"]),
                NodeName(each["worker"]),
                Sha256Hex(each["content_sha256"]),
                float(each["weight"]),
            )
            for each in facts["contributions"]
        )
        version = Version(**facts)
    except (CorruptError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptError(f"version {name} is not readable: {error!r}") from error
    if _facts_name(version) != name:
        raise CorruptError(f"version {name} is not readable: it describes {_facts_name(version)}")
    return version


def _read_part(facts: Mapping[str, Any] | None) -> SealedPart | None:
    if facts is None:
        return None
    header, content = ObjectHeader.from_facts(facts["header"]), Sha256Hex(facts.get("content_sha256", ""))
    return SealedPart(header, tuple(facts["sizes"]), facts["blob"], content)
