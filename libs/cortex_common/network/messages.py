"""The messages between a node and its network, as data: the same over gRPC and over WebSocket.

`TenzroProtocol` writes and reads them as JSON and as protobuf, `TenzroBridge` carries them. docs/websocket.md shows
each with its JSON Schema, which is made from the classes here. What comes from the node stands first.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, ClassVar

from pydantic import ConfigDict, Field, StringConstraints

from cortex_common.job.status import JobStatus
from cortex_common.network.work import (
    STRICT,
    Assignment,
    Count,
    Figures,
    Name,
    Outcome,
    Place,
    Unreadable,
    Words,
)
from cortex_common.telemetry.hardware import Resources
from cortex_common.transfer.receipt import Receipt

Hex = Annotated[str, StringConstraints(pattern=r"^([0-9a-f]{2})*$", max_length=8192)]


@dataclass(frozen=True, slots=True)
class Hello:
    """Who attends. `incarnation` differs at every start of the process; a newer one replaces an older one."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    node: Annotated[str, StringConstraints(pattern=r"^[a-z0-9]([a-z0-9._-]{0,61}[a-z0-9])?$")]
    region: Annotated[str, StringConstraints(min_length=1, max_length=63)]
    incarnation: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9._-]{1,64}$")]
    slots: Annotated[int, Field(ge=1, le=64)] = 1


@dataclass(frozen=True, slots=True)
class Join:
    """JOIN: registers the node, answering a CHALLENGE. Sent again whenever another CHALLENGE comes.

    Attributes:
        version: Of the protocol, one of those the CHALLENGE offers.
        hello: Who attends.
        token_id: The middle part of the node token `ctxnode_<id>_<secret>`. The token itself is never sent.
        sealing_key: The node's X25519 public key, 32 bytes: what its job keys are wrapped to.
        challenge: That of the CHALLENGE.
        proof: Ed25519 signature by the key derived from the token over node, sealing key and challenge.
        attends: False for a connection that only transfers weights.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    version: int
    hello: Hello
    token_id: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{1,64}$")]
    sealing_key: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
    challenge: Hex
    proof: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{128}$")]
    attends: bool = True


@dataclass(frozen=True, slots=True)
class DatasetFacts:
    """A data set the node can read: what placement needs to know of it, never its contents."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    name: Name
    input_shape: Annotated[tuple[Count, ...], Field(max_length=8)]
    classes: Count
    examples: Count


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """HEARTBEAT: renews the node's lease, with what it has and how busy it is. Answered by HEARTBEAT_ACK."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    resources: Resources
    datasets: Annotated[tuple[DatasetFacts, ...], Field(max_length=1000)] = ()
    activity: Words = ""
    version: Annotated[str, StringConstraints(max_length=100)] = ""
    started_s: Annotated[float, Field(ge=0, lt=1e11)] = 0.0


@dataclass(frozen=True, slots=True)
class TrainingMetrics:
    """TRAINING_METRICS: what the node does now, for people who wait. Answered by REPORT_ACK.

    Attributes:
        activity: In a few words: pulling, training, uploading …
        progress: 0 to 1 of the activity; 0 when unknown.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    place: Place
    activity: Words
    progress: Annotated[float, Field(ge=0, le=1)] = 0.0
    metrics: Figures = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class WorkResult:
    """WORK_RESULT: how an assignment ended. Answered by REPORT_ACK; sent again until that comes."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    place: Place
    outcome: Annotated[Outcome, Field(discriminator="kind")]


@dataclass(frozen=True, slots=True)
class WeightsUpdate:
    """WEIGHTS_UPDATE: the binary frames that follow are one update: header, chunks, trailer; one at a time."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT


@dataclass(frozen=True, slots=True)
class ModelPull:
    """MODEL_PULL: send a version that an assignment names, as binary frames. One at a time a connection.

    Attributes:
        held_sha256: The version the node holds; equal to `sha256` means only header and trailer come.
        first_chunk: Where to go on after a cut.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    job_id: Name
    sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
    held_sha256: Annotated[str, StringConstraints(pattern=r"^([0-9a-f]{64})?$")] = ""
    first_chunk: Annotated[int, Field(ge=0, lt=1 << 32)] = 0
    round: Annotated[int, Field(ge=0, lt=1 << 32)] = 0


@dataclass(frozen=True, slots=True)
class Cancel:
    """CANCEL: ends the transfer that `ref` names; it can be resumed by a new one."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT


@dataclass(frozen=True, slots=True)
class JobStatusRequest:
    """JOB_STATUS_REQUEST: where a job of this node's assignments stands. Answered by JOB_STATUS."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    job_id: Name


@dataclass(frozen=True, slots=True)
class Leave:
    """LEAVE: the node goes; its lease ends at once. The connection is closed after it."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT


@dataclass(frozen=True, slots=True)
class Challenge:
    """CHALLENGE: comes first, and again before the node's admission runs out; to be answered with JOIN."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    versions: tuple[int, ...]
    network: str
    challenge: Hex


@dataclass(frozen=True, slots=True)
class Welcome:
    """WELCOME: the node is admitted.

    Attributes:
        window: Frames of an update that may be on their way without a WEIGHTS_ACK.
        max_frame_bytes: Of a binary frame.
        max_message_bytes: Of a text frame.
        admitted_s: Seconds until another CHALLENGE must have been answered.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    version: int
    network: str
    node: str
    window: int
    max_frame_bytes: int
    max_message_bytes: int
    admitted_s: float


@dataclass(frozen=True, slots=True)
class Assignments:
    """ASSIGNMENTS: everything wanted of the node now; work that is missing is to be dropped. Comes at each change.

    Attributes:
        unreadable: What this side did not understand: to be refused.
        is_first: The coordinator is reached anew: it may not know what was reported before, report it again.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    assignments: tuple[Assignment, ...]
    unreadable: tuple[Unreadable, ...] = ()
    is_first: bool = False


@dataclass(frozen=True, slots=True)
class HeartbeatAck:
    """HEARTBEAT_ACK: the lease is renewed; the next heartbeat is due in `heartbeat_s`."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    heartbeat_s: float


@dataclass(frozen=True, slots=True)
class ReportAck:
    """REPORT_ACK: heard. `wanted` false: the assignment is no longer wanted, drop it."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    wanted: bool


@dataclass(frozen=True, slots=True)
class WeightsResume:
    """WEIGHTS_RESUME: send the chunks from `first_chunk` on; none if `already_accepted`, the receipt follows."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    first_chunk: int
    already_accepted: bool = False


@dataclass(frozen=True, slots=True)
class WeightsAck:
    """WEIGHTS_ACK: this many frames of the update, header included, have been passed on since WEIGHTS_UPDATE."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    frames: int


@dataclass(frozen=True, slots=True)
class WeightsAccepted:
    """WEIGHTS_ACCEPTED: the update is verified and durable; it counts, once."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    receipt: Receipt


@dataclass(frozen=True, slots=True)
class JobStatusMessage:
    """JOB_STATUS: where a job stands; when asked, and at each change of a job the node has an assignment of."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    job: JobStatus


@dataclass(frozen=True, slots=True)
class Mistake:
    """One mistake in a request."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    path: str
    message: str


@dataclass(frozen=True, slots=True)
class ErrorMessage:
    """ERROR: what `ref` asked for was not done, and why. `code` is the name of a gRPC status."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    code: str
    message: str
    mistakes: tuple[Mistake, ...] = ()


FromNode = (
    Join | Heartbeat | TrainingMetrics | WorkResult | WeightsUpdate | ModelPull | Cancel | JobStatusRequest | Leave
)
ToNode = (
    Challenge
    | Welcome
    | Assignments
    | HeartbeatAck
    | ReportAck
    | WeightsResume
    | WeightsAck
    | WeightsAccepted
    | JobStatusMessage
    | ErrorMessage
)
Message = FromNode | ToNode
