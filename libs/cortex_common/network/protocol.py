"""TenzroProtocol: the messages between a node and its network, written and read, and their versions."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, get_args

from google.protobuf.message import DecodeError
from google.protobuf.message import Message as Proto
from pydantic import TypeAdapter, ValidationError

from cortex_common.errors import CortexError, InvalidArgumentError, PreconditionError, Violation
from cortex_common.network import messages as m
from cortex_common.network import wire
from cortex_common.pb.v1 import coordinator_pb2

MAX_TEXT_BYTES = 1 << 20
_MAX_DEPTH = 64
_ENVELOPE = ("type", "id", "ref")
_MAX_ID = (1 << 53) - 1
_SPECIAL = {m.JobStatusMessage: "JOB_STATUS", m.ErrorMessage: "ERROR"}


@dataclass(frozen=True, slots=True)
class Envelope:
    """A message with what ties request and answer together: `id` is the sender's, `ref` the id that is answered."""

    message: m.Message
    id: int | None = None
    ref: int | None = None


class TenzroProtocol:
    """Writes and reads the messages of `cortex_common.network.messages`, as JSON text and as protobuf.

    Unknown types, unknown fields and values out of range are one `InvalidArgumentError` that lists every mistake.

    >>> from cortex import TenzroProtocol
    >>> from cortex_common.network.messages import ReportAck
    >>> from cortex_common.network.protocol import Envelope
    >>> protocol = TenzroProtocol()
    >>> text = protocol.encode(Envelope(ReportAck(wanted=True), ref=7))
    >>> text
    '{"type":"REPORT_ACK","ref":7,"wanted":true}'
    >>> protocol.decode(text).message
    ReportAck(wanted=True)
    """

    VERSIONS: tuple[int, ...] = (1,)

    @staticmethod
    def negotiate(offered: Sequence[int]) -> int:
        """The highest version both sides know.

        Raises:
            PreconditionError: there is none.
        """
        common = set(offered) & set(TenzroProtocol.VERSIONS)
        if not common:
            known = ", ".join(map(str, TenzroProtocol.VERSIONS))
            raise PreconditionError(f"protocol versions {list(offered)} offered; known here: {known}")
        return max(common)

    @staticmethod
    def encode(envelope: Envelope) -> str:
        """The message as a JSON text."""
        message = envelope.message
        body = _adapter(type(message)).dump_python(message, mode="json")
        head: dict[str, Any] = {"type": type_of(type(message))}
        head |= {key: value for key, value in (("id", envelope.id), ("ref", envelope.ref)) if value is not None}
        return json.dumps(head | _finite(body), separators=(",", ":"), allow_nan=False)

    @staticmethod
    def decode(text: str) -> Envelope:
        """Read a JSON text.

        Raises:
            InvalidArgumentError: not JSON, not a message of this protocol, or with mistakes: all of them.
        """
        document = _parsed(text)
        name = document.get("type")
        kind = _types().get(name) if isinstance(name, str) else None
        if kind is None:
            raise InvalidArgumentError(f"type: {_shown(name)} given; allowed: {', '.join(sorted(_types()))}")
        identifiers = {key: _identifier(key, document.get(key)) for key in ("id", "ref")}
        body = {key: value for key, value in document.items() if key not in _ENVELOPE}
        try:
            return Envelope(_adapter(kind).validate_python(body), **identifiers)
        except ValidationError as error:
            raise InvalidArgumentError.of(str(name), _violations(error)) from None
        except (KeyError, ValueError, TypeError) as error:
            raise InvalidArgumentError(f"{name}: {error}") from None

    @staticmethod
    def to_proto(message: m.Message, hello: m.Hello) -> Proto:
        """A node's message as the protobuf request that means the same over gRPC.

        Args:
            message: JOIN's `Hello`, a report, or MODEL_PULL.
            hello: Who sends it.

        Raises:
            InvalidArgumentError: it has no protobuf form.
        """
        match message:
            case m.Join():
                return wire.attend_request(message.hello, bytes.fromhex(message.sealing_key))
            case m.TrainingMetrics() | m.WorkResult():
                return wire.report_request(message, hello)
            case m.ModelPull():
                return wire.pull_request(message)
            case _:
                raise InvalidArgumentError(f"{type_of(type(message))} has no protobuf form of its own")

    @staticmethod
    def from_proto(data: bytes) -> m.Assignments:
        """The assignments in an AttendResponse.

        Raises:
            InvalidArgumentError: it cannot be read.
        """
        try:
            return wire.assignments_from_proto(coordinator_pb2.AttendResponse.FromString(data))
        except DecodeError as error:
            raise InvalidArgumentError(f"not an AttendResponse: {error}") from None

    @staticmethod
    def schema(name: str) -> dict[str, Any]:
        """The JSON Schema of a message type, envelope included."""
        kind = _types()[name]
        schema = _adapter(kind).json_schema(mode="serialization" if kind in get_args(m.ToNode) else "validation")
        number = {"type": "integer", "minimum": 0, "maximum": _MAX_ID}
        head = {"type": {"const": name}, "id": number, "ref": number}
        schema["title"], schema["description"] = name, _documentation(kind)
        schema["properties"] = head | schema.get("properties", {})
        schema["required"] = ["type", *schema.get("required", ())]
        return schema

    @staticmethod
    def types() -> Mapping[str, type[m.Message]]:
        """Every message type by its name on the wire."""
        return _types()


def type_of(kind: type[m.Message]) -> str:
    """The name of a message class on the wire: WeightsUpdate is WEIGHTS_UPDATE."""
    return _SPECIAL.get(kind) or re.sub(r"(?<=[a-z])(?=[A-Z])", "_", kind.__name__).upper()


def error_message(error: CortexError, code: str) -> m.ErrorMessage:
    """What a node is told of an error."""
    violations = error.violations if isinstance(error, InvalidArgumentError) else ()
    return m.ErrorMessage(code, error.message[:4096], tuple(m.Mistake(each.path, each.message) for each in violations))


@cache
def _types() -> Mapping[str, type[m.Message]]:
    return {type_of(kind): kind for kind in get_args(m.Message)}


@cache
def _adapter_by_name(name: str) -> TypeAdapter[Any]:
    return TypeAdapter(_types()[name])


def _adapter(kind: type[m.Message]) -> TypeAdapter[Any]:
    return _adapter_by_name(type_of(kind))


def _parsed(text: str) -> dict[str, Any]:
    try:
        document = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except RecursionError:
        raise InvalidArgumentError("the message is nested too deeply") from None
    except ValueError as error:
        raise InvalidArgumentError(f"the message is not JSON: {error}") from None
    if not isinstance(document, dict):
        raise InvalidArgumentError("the message is not a JSON object")
    return document


def _unique(pairs: Sequence[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise InvalidArgumentError("the message is ambiguous: a key is given twice in one object")
    return found


def _no_constant(name: str) -> float:
    raise InvalidArgumentError(f"the message is not JSON: {name} given; allowed: finite numbers")


def _identifier(key: str, value: object) -> int | None:
    if value is None or (isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MAX_ID):
        return value
    raise InvalidArgumentError(f"{key}: {_shown(value)} given; allowed: a whole number from 0 to {_MAX_ID}")


def _shown(value: object) -> str:
    return repr(value)[:80]


def _violations(error: ValidationError) -> list[Violation]:
    mistakes = error.errors(include_url=False, include_context=False)[:20]
    return [
        Violation(".".join(str(part) for part in each["loc"]), f"{_shown(each['input'])} given; {each['msg']}")
        for each in mistakes
    ]


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: a figure that is not finite is left out."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items() if not _is_odd(each)}
    if isinstance(value, list):
        return [_finite(each) for each in value]
    return value


def _is_odd(value: object) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _documentation(kind: type[m.Message]) -> str:
    return " ".join((kind.__doc__ or "").split("\n\n")[0].split())
