"""Every class of errors has its HTTP status, and tells no more than it should."""

from __future__ import annotations

import pytest

from cortex_common import errors
from cortex_common.errors import CortexError, InvalidArgumentError, Violation
from services.gateway.problems import KINDS, answer, kind_of, problem_of

STATUS_OF = {
    "InvalidArgumentError": 400,
    "UnauthenticatedError": 401,
    "ForbiddenError": 403,
    "NotFoundError": 404,
    "AlreadyExistsError": 409,
    "PreconditionError": 409,
    "ConflictError": 409,
    "OverloadedError": 429,
    "UnavailableError": 503,
    "CorruptError": 500,
    "CortexError": 500,
}
CLASSES = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, CortexError)]


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_every_class_has_its_status(kind):
    assert kind in KINDS
    assert kind_of(kind("reason")).status == STATUS_OF[kind.__name__]


def test_mistakes_in_a_request_are_422_each_with_its_path():
    problem = problem_of(InvalidArgumentError.of("job", [Violation("a.b", "bad"), Violation("c", "worse")]))
    assert (problem.status, problem.type) == (422, "urn:cortex:problem:invalid-argument")
    assert [(each.path, each.message) for each in problem.errors] == [("a.b", "bad"), ("c", "worse")]


def test_a_subclass_is_answered_as_its_base():
    class StaleFenceError(errors.ConflictError):
        pass

    assert problem_of(StaleFenceError("fence 3 given, 4 is held")).status == 409


def test_an_unclassed_error_tells_nothing():
    assert problem_of(CortexError("/secret/path: boom")).detail == "internal error"


def test_errors_that_pass_say_when_to_come_back():
    assert answer(errors.UnavailableError("away")).headers["Retry-After"] == "1"
    assert answer(errors.OverloadedError("full")).headers["Retry-After"] == "5"
    assert "Retry-After" not in answer(errors.NotFoundError("no")).headers
