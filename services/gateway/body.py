"""Job files in request bodies: JSON or YAML, read with limits."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping, Sequence

import yaml
from fastapi import Request

from cortex_common.envelope import Envelope, is_envelope
from cortex_common.errors import InvalidArgumentError
from cortex_common.job.parse import parse_job
from cortex_common.job.spec import JobSpec
from cortex_common.yaml_text import load_yaml
from services.gateway.configs import has_configs, job_of
from services.gateway.domain import NodeInfo
from services.gateway.problems import MediaTypeError

_YAML = frozenset({"application/yaml", "application/x-yaml", "text/yaml", "text/x-yaml"})
_MAX_DEPTH = 32
_Loader: type[yaml.SafeLoader] = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


async def read_job(request: Request, nodes: Callable[[], Awaitable[Sequence[NodeInfo]]]) -> JobSpec | Envelope:
    """The job in a request's body: a job file, its model and training configurations, or the envelope of a signed job.

    Args:
        request: With the body.
        nodes: Asked for the datasets there are when a configuration names none.

    Raises:
        MediaTypeError: neither JSON nor YAML by its content type.
        InvalidArgumentError: it cannot be read, or the job has mistakes (then all of them).
    """
    media_type = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if media_type not in _YAML and media_type != "application/json" and not media_type.endswith("+json"):
        raise MediaTypeError(f"content type {media_type!r} given; allowed: application/json, application/yaml")
    try:
        text = (await request.body()).decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidArgumentError(f"the body is not UTF-8: {error.reason} at byte {error.start}") from None
    if not text.strip():
        raise InvalidArgumentError("the body is empty; allowed: a job file as JSON or YAML")
    parse = parse_yaml if media_type in _YAML else parse_json
    document = await asyncio.to_thread(_mapping, parse, text)
    if is_envelope(document):
        return Envelope.from_document(document, "signed job")
    if has_configs(document):
        return await asyncio.to_thread(job_of, document, await nodes())
    return await asyncio.to_thread(parse_job, document)


def _mapping(parse: Callable[[str], object], text: str) -> Mapping[str, object]:
    document = parse(text)
    if not isinstance(document, Mapping):
        given = "nothing" if document is None else f"a {type(document).__name__}"
        raise InvalidArgumentError(f"job: {given} given; allowed: a mapping with {', '.join(JobSpec.model_fields)}")
    return {str(key): value for key, value in document.items()}


def parse_json(text: str) -> object:
    """A JSON document; stricter than Python: a key may stand once, numbers are finite.

    Raises:
        InvalidArgumentError: says where it is malformed.
    """
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        raise InvalidArgumentError(
            f"the body is not JSON: {error.msg} at line {error.lineno}, column {error.colno}"
        ) from None
    except ValueError as error:
        raise InvalidArgumentError(f"the body is not JSON: {error}") from None
    except RecursionError:
        raise InvalidArgumentError("the body is nested too deeply for a job file") from None


def _unique(pairs: Sequence[tuple[str, object]]) -> dict[str, object]:
    found: dict[str, object] = {}
    for key, value in pairs:
        if key in found:
            raise InvalidArgumentError(f"the body is ambiguous: key {key!r} is given twice in one object")
        found[key] = value
    return found


def _no_constant(name: str) -> float:
    raise InvalidArgumentError(f"the body is not JSON: {name} given; allowed: finite numbers")


def parse_yaml(text: str) -> object:
    """A YAML document without anchors and aliases, which could grow a short text without bound.

    Raises:
        InvalidArgumentError: says where it is malformed.
    """
    try:
        _check_yaml(text)
        return load_yaml(text, _Loader)
    except yaml.YAMLError as error:
        raise InvalidArgumentError(f"the body is not YAML: {' '.join(str(error).split())}") from None
    except ValueError as error:
        raise InvalidArgumentError(f"the body is not YAML: {error}") from None


def _check_yaml(text: str) -> None:
    depth = 0
    for event in yaml.parse(text, _Loader):
        if isinstance(event, yaml.AliasEvent):
            raise InvalidArgumentError(f"{_line(event)}: aliases are not allowed in a job file")
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > _MAX_DEPTH:
            raise InvalidArgumentError(f"{_line(event)}: nested too deeply for a job file")


def _line(event: yaml.Event) -> str:
    return f"line {event.start_mark.line + 1}" if event.start_mark else "the body"
