"""Decisions of an aggregator, without I/O: what may be opened, uploaded, sealed."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from cortex_common.codec import WeightCompressor
from cortex_common.errors import (
    ConflictError,
    CortexError,
    ForbiddenError,
    InvalidArgumentError,
    NotFoundError,
    PreconditionError,
    Violation,
)
from cortex_common.identity import Identity
from cortex_common.ids import JobId, NodeName, RoundNumber, SeatIndex, Sha256Hex
from cortex_common.security.objects import ObjectHeader, ObjectKind
from cortex_common.tensors import Manifest, check_chunk_elements
from cortex_common.transfer.receipt import Receipt
from cortex_common.validation import ValidationManager

_JOB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_MAX_WEIGHT = 2.0**53


class Phase(StrEnum):
    """State of a round here."""

    OPEN = "open"
    SEALED = "sealed"
    """The list of contributions is frozen."""
    ABORTED = "aborted"


@dataclass(frozen=True, slots=True)
class RoundKey:
    """Which attempt of which round of which job."""

    job_id: JobId
    round: RoundNumber
    attempt: int

    def __str__(self) -> str:
        again = f" (attempt {self.attempt})" if self.attempt else ""
        return f"round {self.round}{again} of job {self.job_id}"


@dataclass(frozen=True, slots=True)
class Upstream:
    """The round one tier up, that takes this round's result as an update in `seat`.

    Versions are there under `model_job_id`; left out, it is that round's own, as in what versions before have stored.
    """

    aggregator: NodeName
    address: str
    job_id: JobId
    seat: SeatIndex
    model_job_id: JobId = JobId("")  # noqa: RUF009 - a plain string

    def __post_init__(self) -> None:
        if not self.model_job_id:
            object.__setattr__(self, "model_job_id", self.job_id)


@dataclass(frozen=True, slots=True)
class RoundTerms:
    """Everything about a round but its data key; survives on disk."""

    key: RoundKey
    fence: int
    base_sha256: str
    seats: Mapping[SeatIndex, NodeName]
    codec: str
    codec_options: str
    strategy: str
    strategy_options: str
    chunk_elements: int
    upstream: Upstream | None = None
    download_codec: str = "none"
    download_options: str = ""
    """In which the version this round makes is a delta from its base."""
    readers: tuple[NodeName, ...] = ()
    """Workers that hold a seat of the job, but take no part in this round."""

    @property
    def members(self) -> frozenset[NodeName]:
        """Who holds a seat of the job, as far as this round says."""
        return frozenset((*self.seats.values(), *self.readers))

    def has_member(self, worker: NodeName) -> bool:
        """Whether a worker is one of them."""
        return worker in self.seats.values() or worker in self.readers

    @property
    def model_job_id(self) -> JobId:
        """Job whose versions the round starts from: a tier's round starts from the root's."""
        return self.upstream.model_job_id if self.upstream else self.key.job_id

    def refreshed(self, newer: RoundTerms) -> RoundTerms:
        """A frozen round, opened again: its cohort is what it was, the upper aggregator may have moved."""
        return replace(self, fence=newer.fence, upstream=newer.upstream)

    @property
    def substance(self) -> tuple[object, ...]:
        """What may not change when the same round is opened again; fence, cohort and the address above may."""
        return (
            self.base_sha256,
            self.codec,
            self.codec_options,
            self.strategy,
            self.strategy_options,
            self.chunk_elements,
            self.download_codec,
            self.download_options,
        )


@dataclass(frozen=True, slots=True)
class Contribution:
    """One update of a frozen list. `weight` is its share in the mean."""

    seat: SeatIndex
    worker: NodeName
    content_sha256: Sha256Hex
    weight: float


def check_job_id(job_id: str) -> None:
    """Job ids become folder names. InvalidArgumentError: one that cannot."""
    if not _JOB_ID.fullmatch(job_id):
        raise InvalidArgumentError(f"job_id {job_id[:130]!r}: allowed are 1 to 128 of letters, digits, '.', '_', '-'")


def check_terms(terms: RoundTerms, max_seats: int) -> None:
    """A round that can be worked.

    Raises:
        InvalidArgumentError: an impossible limit.
    """
    for job_id in (terms.key.job_id, terms.model_job_id):
        check_job_id(job_id)
    check_chunk_elements(terms.chunk_elements)
    if not 0 < len(terms.seats) <= max_seats:
        raise InvalidArgumentError(f"round.seats: {len(terms.seats)} given; allowed are 1 to {max_seats}")
    first = terms.key.round == 0
    if first and (len(terms.seats) != 1 or terms.base_sha256 or terms.codec != "none"):
        raise InvalidArgumentError("round 0 is one seat, no base and codec none: its update is the first version")
    if not first and not _SHA256.fullmatch(terms.base_sha256):
        raise InvalidArgumentError(f"round.base_sha256 {terms.base_sha256[:70]!r}: allowed are 64 hex digits")


def check_fence(job_id: JobId, seen: int, given: int) -> None:
    """A coordinator that lost its leadership must not act.

    Raises:
        ConflictError: the fence is older than one seen.
    """
    if given < seen:
        raise ConflictError(f"job {job_id}: fence {given} is stale, a coordinator with fence {seen} has taken over")


def check_order(opening: RoundKey, newest: RoundKey | None) -> None:
    """Rounds and attempts only go forward.

    Raises:
        PreconditionError: a later one is known.
    """
    if newest is not None and (newest.round, newest.attempt) > (opening.round, opening.attempt):
        raise PreconditionError(f"{opening} cannot be opened: {newest} has been opened since")


def closed_error(key: RoundKey, phase: Phase, reason: str, open_now: RoundKey | None) -> CortexError:
    """Why an upload comes too late, and what is open instead."""
    now = f"{open_now} is open now" if open_now else "no round of this job is open now"
    state = {
        Phase.SEALED: "is sealed: its list of contributions is frozen",
        Phase.ABORTED: f"was given up ({reason})",
        Phase.OPEN: "is open",
    }[phase]
    return PreconditionError(f"{key} {state}; {now}")


def unknown_error(key: RoundKey, open_now: RoundKey | None) -> CortexError:
    """Why an upload to a round never opened here is refused."""
    now = f"{open_now} is open now" if open_now else "no round of this job is open here"
    return PreconditionError(f"{key} is not open; {now}")


def check_owner(terms: RoundTerms, header: ObjectHeader, caller: Identity) -> None:
    """A worker fills its own seat and speaks for itself.

    Raises:
        ForbiddenError: not so.
    """
    if header.sender != caller.name:
        raise ForbiddenError(f"header.sender {header.sender!r}: {caller.name!r} may only send its own updates")
    owner = terms.seats.get(header.seat)
    if owner is None:
        raise ForbiddenError(f"header.seat {header.seat}: {terms.key} has no such seat")
    if owner != caller.name:
        raise ForbiddenError(f"header.seat {header.seat} of {terms.key} belongs to {owner!r}, not to {caller.name!r}")


def stranger_error(job_id: JobId, caller: Identity) -> ForbiddenError:
    """Why a worker may download nothing of a job: the same whether there is such a job, or such a version, or not."""
    return ForbiddenError(f"job {job_id[:130]!r}: {caller.role} {caller.name!r} has no seat in it here")


def check_header(
    terms: RoundTerms,
    header: ObjectHeader,
    network: str,
    key_id: str,
    base: Manifest | None,
    validation: ValidationManager,
) -> Manifest:
    """An update's header fits its round; gives the layout of the update.

    Args:
        terms: The open round.
        header: As sent.
        network: This network.
        key_id: The round's data key.
        base: Layout of the base version; None in round 0, whose update brings it.
        validation: Limits of a layout.

    Raises:
        InvalidArgumentError: lists everything that does not fit, and what is allowed.
    """
    pairs = (
        ("kind", header.kind, ObjectKind.UPDATE),
        ("network", header.network, network),
        ("key_id", header.key_id, key_id),
        ("codec", header.codec, terms.codec),
        ("codec_options", _canonical(header), _canonical(terms)),
        ("chunk_elements", header.chunk_elements, terms.chunk_elements),
        ("base_sha256", header.base_sha256, terms.base_sha256),
        ("model_sha256", header.model_sha256, ""),
    )
    violations = [
        Violation(f"header.{name}", f"{str(given)[:80]!r} given; allowed here is {str(wanted)!r}")
        for name, given, wanted in pairs
        if given != wanted
    ]
    if not 0 <= header.fence <= terms.fence:
        violations.append(Violation("header.fence", f"{header.fence} given; allowed here is up to {terms.fence}"))
    if not (math.isfinite(header.weight) and 0 < header.weight <= _MAX_WEIGHT):
        violations.append(Violation("header.weight", f"{header.weight} given; allowed is above 0, up to 2^53"))
    if base is not None and header.manifest:
        violations.append(Violation("header.manifest", "only the update of round 0 brings a layout"))
    if violations:
        raise InvalidArgumentError.of(f"update for {terms.key}", violations)
    manifest = base or validation.read_manifest(header.manifest)
    if wrong := validation.layout_violations(header, manifest):
        raise InvalidArgumentError.of(f"update for {terms.key}", wrong)
    return manifest


def _canonical(coded: ObjectHeader | RoundTerms) -> str:
    """Codec options in the one form that can be compared; as they are when they do not belong to the codec."""
    try:
        return WeightCompressor.from_wire(coded.codec, coded.codec_options).options_json
    except InvalidArgumentError:
        return coded.codec_options


def check_contributions(
    key: RoundKey, contributions: Sequence[Contribution], receipts: Mapping[SeatIndex, Receipt]
) -> tuple[Contribution, ...]:
    """A list that can be sealed, in seat order.

    Raises:
        InvalidArgumentError: empty, a seat twice, weights that cannot be averaged, several in round 0.
        PreconditionError: a listed update is not accepted here.
    """
    listed = tuple(sorted(contributions, key=lambda each: each.seat))
    if not listed or len({each.seat for each in listed}) != len(listed):
        raise InvalidArgumentError(f"{key}: a list of contributions names at least one seat, each once")
    if key.round == 0 and len(listed) != 1:
        raise InvalidArgumentError(f"{key}: exactly one update is the first version, {len(listed)} are listed")
    if any(not math.isfinite(each.weight) or each.weight < 0 for each in listed) or not sum(
        each.weight for each in listed
    ):
        raise InvalidArgumentError(f"{key}: weights must be finite, not negative, and add up to more than 0")
    for each in listed:
        receipt = receipts.get(each.seat)
        if receipt is None:
            raise PreconditionError(f"{key}: no update of seat {each.seat} ({each.worker}) is accepted here")
        if (receipt.worker, receipt.content_sha256) != (each.worker, each.content_sha256):
            raise PreconditionError(
                f"{key}: seat {each.seat} holds update {receipt.content_sha256[:12]} of {receipt.worker}, "
                f"listed is {each.content_sha256[:12]} of {each.worker}"
            )
    return listed


def missing_version(job_id: JobId, sha256: str, held: Sequence[RoundNumber]) -> NotFoundError:
    """Why a version cannot be served or built upon."""
    rounds = ", ".join(map(str, held)) or "none"
    return NotFoundError(f"job {job_id}: no version {sha256[:70]!r} here; versions of these rounds are: {rounds}")
