"""Cortex errors over gRPC and back: one status per class, mistakes carried as google.rpc.BadRequest."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import grpc
from google.protobuf import duration_pb2
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]

from cortex_common.errors import (
    AlreadyExistsError,
    ConflictError,
    CorruptError,
    CortexError,
    ForbiddenError,
    InvalidArgumentError,
    NotFoundError,
    OverloadedError,
    PreconditionError,
    UnauthenticatedError,
    UnavailableError,
    Violation,
)

STATUS_OF: dict[type[CortexError], grpc.StatusCode] = {
    InvalidArgumentError: grpc.StatusCode.INVALID_ARGUMENT,
    UnauthenticatedError: grpc.StatusCode.UNAUTHENTICATED,
    ForbiddenError: grpc.StatusCode.PERMISSION_DENIED,
    NotFoundError: grpc.StatusCode.NOT_FOUND,
    AlreadyExistsError: grpc.StatusCode.ALREADY_EXISTS,
    PreconditionError: grpc.StatusCode.FAILED_PRECONDITION,
    ConflictError: grpc.StatusCode.ABORTED,
    OverloadedError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    UnavailableError: grpc.StatusCode.UNAVAILABLE,
    CorruptError: grpc.StatusCode.DATA_LOSS,
}
# What gRPC itself may answer besides, by what the caller should do about it.
_CLASS_OF: dict[grpc.StatusCode, type[CortexError]] = {
    **{code: kind for kind, code in STATUS_OF.items()},
    grpc.StatusCode.DEADLINE_EXCEEDED: UnavailableError,
    grpc.StatusCode.CANCELLED: UnavailableError,
    grpc.StatusCode.OUT_OF_RANGE: InvalidArgumentError,
}

DETAILS_KEY = "grpc-status-details-bin"
_DOMAIN = "cortex"
# Trailers beyond a peer's metadata limit would lose the whole answer.
_MAX_TEXT_BYTES = 4096
_MAX_DETAILS_BYTES = 8192


def status_of(error: CortexError) -> grpc.StatusCode:
    """The gRPC status of an error; of the nearest listed class for a subclass."""
    for kind in type(error).__mro__:
        if kind in STATUS_OF:
            return STATUS_OF[kind]
    return grpc.StatusCode.INTERNAL


def rich_status(error: CortexError) -> status_pb2.Status:
    """What goes into the trailers: code, text, and every mistake while there is room."""
    code: tuple[int, str] = status_of(error).value
    status = status_pb2.Status(code=code[0], message=_shortened(error.message))
    status.details.add().Pack(error_details_pb2.ErrorInfo(reason=type(error).__name__, domain=_DOMAIN))
    if isinstance(error, InvalidArgumentError) and error.violations:
        status.details.add().Pack(_bad_request(error.violations))
    if isinstance(error, OverloadedError) and error.retry_after_s is not None:
        wait = duration_pb2.Duration(seconds=error.retry_after_s)
        status.details.add().Pack(error_details_pb2.RetryInfo(retry_delay=wait))
    return status


def error_from_rpc(error: grpc.RpcError, what: str = "") -> CortexError:
    """The Cortex error a peer raised, or the one that says why the peer gave no answer.

    Args:
        error: From grpc or grpc.aio.
        what: Who was called, for people: "coordinator at 127.0.0.1:50051".
    """
    call: Any = error
    code: grpc.StatusCode = call.code()
    details: str = call.details() or ""
    status = _rich_status_of(call.trailing_metadata())
    kind = _CLASS_OF.get(code, CortexError)
    if status is not None:
        if kind is OverloadedError:
            return OverloadedError(details, _retry_after_s(status))
        return InvalidArgumentError(details, _violations(status)) if kind is InvalidArgumentError else kind(details)
    peer = what or "the peer"
    if code is grpc.StatusCode.UNAVAILABLE:
        return UnavailableError(f"{peer} cannot be reached: {_cause(details)}")
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return UnavailableError(f"{peer} did not answer in time")
    if code is grpc.StatusCode.UNIMPLEMENTED:
        return CortexError(f"{peer} does not know this call ({details}): is it the right service, of the same version?")
    return kind(f"{peer}: {details or code.name.lower().replace('_', ' ')}")


def error_of_code(code: str, message: str, mistakes: Iterable[tuple[str, str]] = ()) -> CortexError:
    """The Cortex error behind the name of a gRPC status, as it travels over WebSocket."""
    status = next((each for each in grpc.StatusCode if each.name == code), grpc.StatusCode.UNKNOWN)
    kind = _CLASS_OF.get(status, CortexError)
    if kind is InvalidArgumentError:
        return InvalidArgumentError(message, [Violation(path, text) for path, text in mistakes])
    return kind(message)


@contextmanager
def calling(what: str) -> Iterator[None]:
    """Turn RPC errors inside the block into Cortex errors that name `what` was called.

    Raises:
        CortexError: the class the peer raised; UnavailableError when it cannot be reached, or the call is cut off.
    """
    with unless_cut(what):
        try:
            yield
        except grpc.RpcError as error:
            raise error_from_rpc(error, what) from error


@contextmanager
def unless_cut(what: str) -> Iterator[None]:
    """Tell the end of a call that was cut off on this side from that of the task which makes it.

    Raises:
        UnavailableError: the call was cut off.
    """
    try:
        yield
    except asyncio.CancelledError:
        # gRPC raises it for both; only a task is asked to end.
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        raise UnavailableError(f"{what}: the call was cut off") from None


_TRANSPORT = re.compile(r"last error: \w+: (?:ipv[46]:)?(?P<address>\S+?): (?P<cause>.+?)(?: \(\d+\))?$", re.DOTALL)


def _cause(details: str) -> str:
    """Why a connection failed, without gRPC's wrapping; says so when it was TLS."""
    match = _TRANSPORT.search(details)
    cause = (match["cause"] if match else details) or "no connection"
    cause = cause.removeprefix("Failed to connect to remote host: ").removeprefix("connect: ")
    lower = cause.lower()
    if "certificate_verify_failed" in lower:
        return f"TLS refused: its certificate is not from the authority in the CA file, or has expired ({_tail(cause)})"
    if "hostname verification check failed" in lower or "is not in peer certificate" in lower:
        return "TLS refused: a node of another role answers there"
    if "errors resolving" in lower:
        return "its host name cannot be resolved"
    if "handshake" in lower or "ssl" in lower or "tsi_" in lower:
        return f"TLS refused ({_tail(cause)})"
    if any(sign in lower for sign in ("socket closed", "connection reset", "endpoint closing", "broken pipe")):
        return f"the connection was closed ({cause}); a peer that does not accept this node's certificate does that too"
    return cause


def _tail(cause: str) -> str:
    """The last part of an OpenSSL error chain, which is the readable one."""
    return cause.rpartition("OPENSSL_internal:")[2].strip() or cause


def _bad_request(violations: Sequence[Violation]) -> error_details_pb2.BadRequest:
    request = error_details_pb2.BadRequest()
    size = 0
    for count, violation in enumerate(violations):
        size += len(violation.path.encode()) + len(violation.message.encode()) + 8
        if size > _MAX_DETAILS_BYTES:
            request.field_violations.add(field="", description=f"and {len(violations) - count} more")
            break
        request.field_violations.add(field=violation.path, description=violation.message)
    return request


def _shortened(text: str) -> str:
    data = text.encode()
    if len(data) <= _MAX_TEXT_BYTES:
        return text
    return data[: _MAX_TEXT_BYTES - 4].decode(errors="ignore") + " …"


def _rich_status_of(metadata: Iterable[tuple[str, str | bytes]] | None) -> status_pb2.Status | None:
    """The status a Cortex server attached; None when the answer is not from one."""
    for key, value in metadata or ():
        if key == DETAILS_KEY and isinstance(value, bytes):
            try:
                return status_pb2.Status.FromString(value)
            except DecodeError:
                return None
    return None


def _retry_after_s(status: status_pb2.Status) -> int | None:
    info = error_details_pb2.RetryInfo()
    for detail in status.details:
        if detail.Is(info.DESCRIPTOR):
            detail.Unpack(info)
            return int(info.retry_delay.seconds)
    return None


def _violations(status: status_pb2.Status) -> tuple[Violation, ...]:
    request = error_details_pb2.BadRequest()
    for detail in status.details:
        if detail.Is(request.DESCRIPTOR):
            detail.Unpack(request)
    return tuple(Violation(each.field, each.description) for each in request.field_violations)
