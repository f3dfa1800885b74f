"""From what a person wrote to a JobSpec, or to all their mistakes at once."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import yaml
from pydantic import BaseModel, ValidationError

from cortex_common.errors import InvalidArgumentError, NotFoundError, Violation
from cortex_common.job.spec import JobSpec
from cortex_common.yaml_text import load_yaml

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

MAX_JOB_BYTES = 1 << 20
_MAX_DEPTH = 32
_MAX_WHOLE = (1 << 62) - 1


def parse_job(document: Mapping[str, object], subject: str = "job") -> JobSpec:
    """Validate a job given as a mapping.

    Raises:
        InvalidArgumentError: lists every mistake with its path, the value given, and what is allowed.
    """
    try:
        spec = JobSpec.model_validate(document)
    except ValidationError as error:
        raise InvalidArgumentError.of(subject, violations_of(error, JobSpec)) from None
    except OverflowError:
        raise InvalidArgumentError.of(subject, list(_unfit(document, (), set()))) from None
    if unfit := list(_unfit(document, (), set())):
        raise InvalidArgumentError.of(subject, unfit)
    return spec


def parse_job_text(text: str, subject: str = "job") -> JobSpec:
    """Validate a job given as YAML or JSON text.

    Raises:
        InvalidArgumentError: not YAML, or the mistakes in it.
    """
    if len(text) > MAX_JOB_BYTES:
        raise InvalidArgumentError(f"{subject}: {len(text)} characters; allowed are {MAX_JOB_BYTES}")
    try:
        document = load_yaml(text)
    except yaml.YAMLError as error:
        raise InvalidArgumentError(f"{subject} is not YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise InvalidArgumentError(f"{subject} is nested too deeply; allowed: the keys of a job file") from None
    if not isinstance(document, Mapping):
        given = "nothing" if document is None else type(document).__name__
        raise InvalidArgumentError(
            f"{subject}: {given} given; allowed: a mapping with the keys {', '.join(JobSpec.model_fields)}"
        )
    return parse_job(document, subject)


def load_job_file(path: Path) -> JobSpec:
    """Read and validate a job file.

    Raises:
        NotFoundError: no such file.
        InvalidArgumentError: it cannot be read as text, is not YAML, or has mistakes.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise NotFoundError(f"job file {path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidArgumentError(f"job file {path} cannot be read: {error}") from None
    return parse_job_text(text, str(path))


def _unfit(value: object, place: tuple[str, ...], seen: set[int]) -> Iterator[Violation]:
    """What no job can hold, wherever it stands: it could be validated, but not sent."""
    if isinstance(value, Mapping | list | tuple):
        if id(value) in seen:
            return
        seen.add(id(value))
        if len(place) > _MAX_DEPTH:
            yield Violation(".".join(place[:4]), "nested too deeply for a job")
            return
        items = value.items() if isinstance(value, Mapping) else enumerate(value)
        for key, each in items:
            yield from _unfit_text(key, place)
            yield from _unfit(each, (*place, str(key)), seen)
    elif isinstance(value, float) and not math.isfinite(value):
        yield Violation(".".join(place), f"{value} given; allowed: finite numbers")
    elif isinstance(value, int) and not -_MAX_WHOLE <= value <= _MAX_WHOLE:
        yield Violation(".".join(place), "allowed: whole numbers of less than 63 bits")
    else:
        yield from _unfit_text(value, place)


def _unfit_text(value: object, place: tuple[str, ...]) -> Iterator[Violation]:
    if isinstance(value, str) and not value.isascii() and any("\ud800" <= each <= "\udfff" for each in value):
        yield Violation(".".join(place), f"{_shown(value)} given; allowed: text without lone surrogates")


def violations_of(error: ValidationError, root: type[BaseModel]) -> list[Violation]:
    """Pydantic's findings in the words of this project, one for each mistake."""
    return [_violation(detail, root) for detail in _without_union_noise(error.errors(include_url=False))]


def _without_union_noise(details: Sequence[ErrorDetails]) -> Iterator[ErrorDetails]:
    """One finding a place: a value that fits no member of a union is reported once for each member."""
    seen: set[tuple[int | str, ...]] = set()
    for detail in details:
        place = _place(detail["loc"])
        if detail["type"] == "value_error" or place not in seen:
            seen.add(place)
            yield detail


def _place(location: tuple[int | str, ...]) -> tuple[int | str, ...]:
    """The location without pydantic's names of union members."""
    return tuple(part for part in location if isinstance(part, int) or _is_key(part))


def _is_key(part: str) -> bool:
    return part.isidentifier() and part not in _UNION_PARTS


_UNION_PARTS = {"int", "str", "float", "bool", "none"}


def _violation(detail: ErrorDetails, root: type[BaseModel]) -> Violation:
    kind, given = detail["type"], detail["input"]
    place = _place(detail["loc"])
    if kind == "extra_forbidden":
        # The last part is a key that somebody wrote, whatever it looks like.
        place = (*_place(detail["loc"][:-1]), detail["loc"][-1])
    path = ".".join(str(part) for part in place)
    if kind == "extra_forbidden":
        return Violation(path, _unknown_key(place, root))
    if kind == "missing":
        return Violation(path, "missing; this key is required")
    if kind == "value_error":
        message = detail["msg"].removeprefix("Value error, ")
        if message.startswith("allowed"):
            return Violation(path, f"{_shown(given)} given; {message}")
        inner, separator, rest = message.partition(": ")
        if separator and all(part.isidentifier() for part in inner.split(".")):
            return Violation(".".join(filter(None, (path, inner))), rest)
        return Violation(path, message)
    return Violation(path, f"{_shown(given)} given; {_allowed(detail)}")


def _allowed(detail: ErrorDetails) -> str:
    if detail["type"] in ("model_type", "model_attributes_type", "dict_type"):
        return "allowed: a mapping"
    message = detail["msg"].replace("Input should be a valid integer", "Input should be a whole number")
    return message.replace("Input should be ", "allowed: ", 1)


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _unknown_key(place: tuple[int | str, ...], root: type[BaseModel]) -> str:
    allowed = _keys_at(place[:-1], root)
    close = difflib.get_close_matches(str(place[-1]), allowed, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return f"unknown key{hint} allowed: {', '.join(allowed)}" if hint else f"unknown key; allowed: {', '.join(allowed)}"


def _keys_at(place: tuple[int | str, ...], root: type[BaseModel]) -> list[str]:
    """Keys allowed in the section at `place`."""
    section = root
    for part in place:
        field = section.model_fields.get(str(part))
        if field is None:
            return []
        members = [field.annotation, *get_args(field.annotation)]
        section = next(member for member in members if isinstance(member, type) and issubclass(member, BaseModel))
    return list(section.model_fields)
