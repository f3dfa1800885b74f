"""Work that a network gives to a node, and how it ends: parts of the messages of `network.messages`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, ConfigDict, Field, PlainSerializer, StringConstraints

from cortex_common.ids import JobId, KeyId, NodeName, RoundNumber, SeatIndex
from cortex_common.job.site_policy import Refusal
from cortex_common.job.spec import JobSpec
from cortex_common.security.objects import WrappedKey
from cortex_common.transfer.receipt import Receipt

_MAX_SHARDS = 256
_MAX_WORDS = 4096
STRICT = ConfigDict(extra="forbid")
Name = Annotated[str, StringConstraints(min_length=1, max_length=200)]
Words = Annotated[str, StringConstraints(max_length=_MAX_WORDS)]
Count = Annotated[int, Field(ge=0, lt=1 << 63)]
Figures = Annotated[Mapping[str, float], Field(max_length=200)]


def _key_from_json(value: Any) -> Any:
    if not isinstance(value, Mapping):
        return value
    return WrappedKey(KeyId(str(value["key_id"])), int(value["epoch"]), bytes.fromhex(str(value["wrapped"])))


def _key_to_json(key: WrappedKey) -> dict[str, str | int]:
    return {"key_id": key.key_id, "epoch": key.epoch, "wrapped": key.wrapped.hex()}


JobKey = Annotated[
    WrappedKey, BeforeValidator(_key_from_json), PlainSerializer(_key_to_json, return_type=dict[str, str | int])
]


@dataclass(frozen=True, slots=True)
class Initialise:
    """Build the network from its seed and push it as the update of round 0."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    kind: Literal["initialise"] = "initialise"


@dataclass(frozen=True, slots=True)
class Train:
    """Pull the base, train, push the update."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    kind: Literal["train"] = "train"


@dataclass(frozen=True, slots=True)
class Evaluate:
    """Pull the base, evaluate `slices` of the test set cut into `of`: slice i is examples i*N//of to (i+1)*N//of."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    slices: tuple[Count, ...]
    of: Count
    kind: Literal["evaluate"] = "evaluate"


@dataclass(frozen=True, slots=True)
class Hold:
    """Stay ready: the next round is about to open."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    kind: Literal["hold"] = "hold"


Work = Initialise | Train | Evaluate | Hold


@dataclass(frozen=True, slots=True)
class WorkKey:
    """What makes two assignments the same work."""

    job_id: JobId
    round: RoundNumber
    attempt: int
    seat: SeatIndex
    work: Work


@dataclass(frozen=True, slots=True)
class SealedPart:
    """The shards of a sealed data set that a seat trains on: the signed manifest, their indices, the key of each."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    manifest: Annotated[str, StringConstraints(max_length=1 << 20)]
    shards: Annotated[tuple[Count, ...], Field(max_length=_MAX_SHARDS)]
    keys: Annotated[tuple[JobKey, ...], Field(max_length=_MAX_SHARDS)]


@dataclass(frozen=True, slots=True)
class Assignment:
    """A piece of work, as the coordinator gave it.

    Attributes:
        transfer_id: Id under which the aggregator knows the round: the job's, or that of its tier in a region.
        data_key: To seal with; wrapped to the sealing key that this node said it has, as the others.
        older_keys: To read with: what was sealed before the present key epoch began.
        seats: Of the job; seat i trains partition i of this many.
        aggregator_address: host:port to exchange weights with; over WebSocket the gateway does.
        base_sha256: Version to start from; empty in round 0.
        included_round: Last round whose version holds an update of this node; None if none does.
        base_seats: Seats whose updates, whoever sent them, are in the base version.
        signed_job: The envelope the job was submitted in, DSSE in JSON; empty if it was not signed.
        sealed: What to train on, if the job's data are sealed.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    assignment_id: str
    job_id: JobId
    transfer_id: JobId
    round: RoundNumber
    attempt: int
    fence: int
    seat: SeatIndex
    seats: int
    spec: JobSpec
    data_key: JobKey
    aggregator: NodeName
    aggregator_address: str
    base_sha256: str
    chunk_elements: int
    work: Annotated[Work, Field(discriminator="kind")]
    included_round: int | None = None
    base_seats: frozenset[SeatIndex] = frozenset()
    older_keys: tuple[JobKey, ...] = ()
    signed_job: str = ""
    sealed: SealedPart | None = None

    @property
    def key(self) -> WorkKey:
        """What makes it the same work as another assignment."""
        return WorkKey(self.job_id, self.round, self.attempt, self.seat, self.work)

    @property
    def place(self) -> Place:
        """What a report about it names."""
        return Place(self.assignment_id, self.job_id, self.round, self.seat)


@dataclass(frozen=True, slots=True)
class Place:
    """Which assignment a report is about."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    assignment_id: Name
    job_id: Name
    round: Count
    seat: Count


@dataclass(frozen=True, slots=True)
class Unreadable:
    """An assignment that was not understood, and why: to be refused, a newer node may know it."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    place: Place
    reason: str


@dataclass(frozen=True, slots=True)
class Trained:
    """The update was accepted; `receipt` says so."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    receipt: Receipt
    train_seconds: float
    exchange_seconds: float
    examples: Count
    steps: Count
    metrics: Figures
    bytes_up: Count
    bytes_down: Count
    kind: Literal["trained"] = "trained"


@dataclass(frozen=True, slots=True)
class SliceScore:
    """Sums over one slice of the test set."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    slice: Count
    examples: Count
    loss_sum: float
    correct: Count


@dataclass(frozen=True, slots=True)
class Evaluated:
    """The slices were evaluated."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    slices: tuple[SliceScore, ...]
    kind: Literal["evaluated"] = "evaluated"


@dataclass(frozen=True, slots=True)
class Failed:
    """The work cannot be done; `is_permanent`: by nobody, so the job fails; `refusals`: the site forbids it."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    reason: Words
    is_permanent: bool
    refusals: Annotated[tuple[Refusal, ...], Field(max_length=100)] = ()
    kind: Literal["failed"] = "failed"

    def __post_init__(self) -> None:
        """Cut what is too long to be told: a report that is refused would be sent again for ever."""
        object.__setattr__(self, "reason", self.reason[:_MAX_WORDS])


Outcome = Trained | Evaluated | Failed
