"""Structured logs: one event name, facts as fields; never payloads, keys or tokens."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, MutableMapping
from typing import Any, TextIO

import structlog
import structlog.tracebacks

from cortex_common.errors import InvalidArgumentError

LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
_SECRET_WORDS = ("key", "token", "secret", "password", "authorization")
_HIDDEN = "[hidden]"
# Local variables may hold keys.
_TRACEBACKS = structlog.processors.ExceptionRenderer(structlog.tracebacks.ExceptionDictTransformer(show_locals=False))
_FACTS: list[structlog.types.Processor] = [
    structlog.contextvars.merge_contextvars,
    structlog.stdlib.add_log_level,
    structlog.stdlib.add_logger_name,
    structlog.processors.TimeStamper(fmt="iso", utc=True),
    structlog.processors.StackInfoRenderer(),
]
# Libraries that speak at INFO about every request, or at DEBUG show what they carry.
_CHATTY = ("uvicorn.access", "httpx", "httpcore", "asyncio", "alembic", "websockets")


class _StderrHandler(logging.StreamHandler[TextIO]):
    """Writes to what is `sys.stderr` by then: a progress bar takes its place, and keeps lines out of its own."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


def get_logger(name: str) -> structlog.stdlib.BoundLogger:
    """A logger: `log.info("round_closed", job_id=…, round=7, reason=…)`.

    Events go to the standard library's logging: a program that configures nothing sees warnings, on stderr.
    """
    logger: structlog.stdlib.BoundLogger = structlog.wrap_logger(
        logging.getLogger(name),
        processors=[
            structlog.stdlib.filter_by_level,
            *_FACTS,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        wrapper_class=structlog.stdlib.BoundLogger,
    )
    return logger


def configure_logging(service: str, level: str = "INFO", json: bool = True) -> None:
    """Send this process's logs, those of libraries included, to stderr.

    Args:
        service: Stands in every line.
        level: One of `LEVELS`.
        json: One JSON object a line; otherwise text for people.

    Raises:
        InvalidArgumentError: unknown level.
    """
    if level.upper() not in LEVELS:
        raise InvalidArgumentError(f"log_level {level!r}: allowed are {', '.join(LEVELS)}")
    handler = _StderrHandler()
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=_FACTS,
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                _with_service(service),
                hide_secrets,
                *_rendering(json),
            ],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    for name in _CHATTY:
        logging.getLogger(name).setLevel(max(logging.WARNING, root.level))


def hide_secrets(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Replace the value of every field whose name says that it is secret, however deep."""
    for name, value in event.items():
        event[name] = _hidden(name, value)
    return event


def _hidden(name: str, value: Any) -> Any:
    if _is_secret(name):
        return _HIDDEN
    if isinstance(value, Mapping):
        return {key: _hidden(str(key), inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_hidden("", inner) for inner in value]
    if isinstance(value, bytes | bytearray | memoryview):
        return f"{len(value)} bytes"
    return value


def _is_secret(name: str) -> bool:
    last = name.lower().replace("-", "_").rpartition("_")[2]
    return last in _SECRET_WORDS


def _with_service(service: str) -> structlog.types.Processor:
    def add(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        event.setdefault("service", service)
        return event

    return add


def _rendering(json: bool) -> list[structlog.types.Processor]:
    if json:
        return [_TRACEBACKS, structlog.processors.JSONRenderer(default=str)]
    plain = structlog.dev.plain_traceback
    return [structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), exception_formatter=plain)]
