"""Errors as statuses, and what a broken connection says."""

from __future__ import annotations

import grpc
import pytest
from google.rpc import status_pb2

from cortex_common import errors
from cortex_common.errors import CortexError, InvalidArgumentError, UnavailableError, Violation
from cortex_common.rpc.errors import DETAILS_KEY, STATUS_OF, calling, error_from_rpc, rich_status, status_of


class FailedCall(grpc.RpcError):
    """What grpc raises, as far as the mapping looks at it."""

    def __init__(self, code: grpc.StatusCode, details: str, status: status_pb2.Status | None = None) -> None:
        self._answer = (code, details)
        self._metadata = () if status is None else ((DETAILS_KEY, status.SerializeToString()),)

    def code(self) -> grpc.StatusCode:
        return self._answer[0]

    def details(self) -> str:
        return self._answer[1]

    def trailing_metadata(self) -> tuple[tuple[str, bytes], ...]:
        return self._metadata


def over_the_wire(error: CortexError) -> CortexError:
    status = rich_status(error)
    return error_from_rpc(FailedCall(status_of(error), status.message, status), "node at a:1")


def test_every_error_class_has_a_status_of_its_own() -> None:
    classes = {each for each in vars(errors).values() if isinstance(each, type) and issubclass(each, CortexError)}
    assert classes - {CortexError} == set(STATUS_OF)
    assert len(set(STATUS_OF.values())) == len(STATUS_OF)


@pytest.mark.parametrize("kind", sorted(STATUS_OF, key=lambda kind: kind.__name__))
def test_an_error_arrives_as_what_it_was(kind: type[CortexError]) -> None:
    arrived = over_the_wire(kind("no job 'x'; 3 jobs are known"))
    assert type(arrived) is kind
    assert arrived.message == "no job 'x'; 3 jobs are known"


def test_every_mistake_of_a_request_arrives() -> None:
    mistakes = (
        Violation("model.kind", "'mpl'; allowed are mlp"),
        Violation("training.rounds", "0; allowed is 1 or more"),
    )
    arrived = over_the_wire(InvalidArgumentError.of("job", mistakes))
    assert isinstance(arrived, InvalidArgumentError)
    assert arrived.violations == mistakes


def test_an_endless_list_of_mistakes_is_cut_and_says_so() -> None:
    mistakes = tuple(Violation(f"field.{i}", "ä" * 100) for i in range(1000))
    status = rich_status(InvalidArgumentError.of("job", mistakes))
    assert status.ByteSize() < 16 * 1024
    arrived = over_the_wire(InvalidArgumentError.of("job", mistakes))
    assert isinstance(arrived, InvalidArgumentError)
    *kept, last = arrived.violations
    assert tuple(kept) == mistakes[: len(kept)]
    assert last.message == f"and {1000 - len(kept)} more"


def test_a_subclass_takes_the_status_of_its_class() -> None:
    class ClosedRoundError(errors.PreconditionError):
        pass

    assert status_of(ClosedRoundError("closed")) is grpc.StatusCode.FAILED_PRECONDITION
    assert status_of(CortexError("?")) is grpc.StatusCode.INTERNAL


_ALL = "failed to connect to all addresses; last error: "
_V4 = _ALL + "UNKNOWN: ipv4:1.2.3.4:1: "
_SSL = _V4 + "Tls handshake failed (TSI_PROTOCOL_FAILURE): SSL_ERROR_SSL: error:1:SSL routines:OPENSSL_internal:"
_NAME = _V4 + "Custom verification check failed with error: UNAUTHENTICATED: Hostname Verification Check failed."


@pytest.mark.parametrize(
    ("details", "said"),
    [
        (_V4 + "Failed to connect to remote host: connect: Connection refused (111)", "Connection refused$"),
        (_ALL + "UNKNOWN: ipv6:%5B::1%5D:1: Failed to connect to remote host: Timed out", "Timed out$"),
        (_SSL + "CERTIFICATE_VERIFY_FAILED: certificate has expired", "TLS refused.*certificate has expired"),
        (_NAME, "TLS refused: a node of another role answers there"),
        (_SSL + "WRONG_VERSION_NUMBER", r"TLS refused \(WRONG_VERSION_NUMBER\)"),
        (_ALL + "UNAVAILABLE: ipv4:1.2.3.4:1: Socket closed", "does not accept this node's certificate"),
        ("errors resolving nowhere.invalid:1: [field:hostname lookup error:…]", "host name cannot be resolved"),
        ("", "no connection"),
    ],
)
def test_a_connection_problem_is_told_in_words(details: str, said: str) -> None:
    with (
        pytest.raises(UnavailableError, match=f"^coordinator at a:1 cannot be reached: .*{said}"),
        calling("coordinator at a:1"),
    ):
        raise FailedCall(grpc.StatusCode.UNAVAILABLE, details)


@pytest.mark.parametrize(
    ("code", "kind", "said"),
    [
        (grpc.StatusCode.DEADLINE_EXCEEDED, UnavailableError, "node at a:1 did not answer in time"),
        (grpc.StatusCode.CANCELLED, UnavailableError, "node at a:1: text"),
        (grpc.StatusCode.UNIMPLEMENTED, CortexError, "does not know this call"),
        (grpc.StatusCode.INTERNAL, CortexError, "node at a:1: text"),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, errors.OverloadedError, "node at a:1: text"),
    ],
)
def test_what_grpc_answers_itself_has_a_class(code: grpc.StatusCode, kind: type[CortexError], said: str) -> None:
    error = error_from_rpc(FailedCall(code, "text"), "node at a:1")
    assert type(error) is kind
    assert said in error.message


def test_details_that_are_no_status_do_not_hide_the_error() -> None:
    call = FailedCall(grpc.StatusCode.NOT_FOUND, "gone")
    call._metadata = ((DETAILS_KEY, b"\xff\xff\xff"),)
    assert type(error_from_rpc(call)) is errors.NotFoundError
