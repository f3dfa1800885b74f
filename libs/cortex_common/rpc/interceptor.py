"""The one interceptor of every server: who calls, may they, what went wrong, how long it took."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, ExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import grpc
import grpc.aio

from cortex_common.clock import Clock
from cortex_common.errors import CortexError, ForbiddenError, UnauthenticatedError, UnavailableError
from cortex_common.logging import get_logger
from cortex_common.rpc.auditing import Auditor, Call
from cortex_common.rpc.authorisation import ANYBODY, PATIENT, PRIVILEGED, authorise
from cortex_common.rpc.denial import DenyList
from cortex_common.rpc.errors import DETAILS_KEY, rich_status, status_of
from cortex_common.rpc.fairness import CALLER_LIMITS, CallerLimits, Callers, ThrottledError
from cortex_common.rpc.identity import acting_as, authenticate, expired
from cortex_common.rpc.metrics import REFUSALS, MethodMetrics
from cortex_common.rpc.passing import PassReader, acting_by
from cortex_common.security.certificates import Certificate
from cortex_common.security.passes import NodePass

_log = get_logger(__name__)

_Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
_Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
_Guard: TypeAlias = Callable[[object, "_Context"], AbstractAsyncContextManager[None]]
INTERNAL = "internal error"
# Kind of error of a call that was let in and lasted longer than its certificate: the caller begins it anew.
ENDED = "ended"


@dataclass(frozen=True, slots=True)
class CallLimits:
    """Limits of calls.

    Attributes:
        caller: What each caller may take.
        unary_s: How long a call with one request and one answer may take, whatever its own deadline is, and how long
            one with many requests and one answer may wait for the next request; None: as long as the caller says.
        write_s: How long a caller may take nothing of a stream that waits for it.
    """

    caller: CallerLimits = CALLER_LIMITS
    unary_s: float | None = 60.0
    write_s: float = 180.0


CALL_LIMITS = CallLimits()


class GuardingInterceptor(grpc.aio.ServerInterceptor):
    """Authenticates, authorises, maps errors and counts, once per RPC; messages of a stream pass untouched."""

    def __init__(
        self,
        network: str,
        clock: Clock,
        denied: DenyList,
        passes: PassReader,
        auditor: Auditor | None = None,
        limits: CallLimits = CALL_LIMITS,
    ) -> None:
        self._passes = passes
        self._limits = limits
        self._callers = Callers(limits.caller, clock)
        self._network = network
        self._clock = clock
        self._denied = denied
        self._auditor = auditor
        self._metrics: dict[str, MethodMetrics] = {}

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[_Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> _Handler | None:
        """Wrap the handler of a known method; an unknown one stays UNIMPLEMENTED."""
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        method = handler_call_details.method
        metrics = self._metrics.get(method)
        if metrics is None:
            metrics = self._metrics[method] = MethodMetrics(method)
        limits = replace(self._limits, unary_s=None) if method in PATIENT else self._limits
        return _wrapped(handler, limits, lambda request, context: self._guarded(method, metrics, request, context))

    @asynccontextmanager
    async def _guarded(
        self, method: str, metrics: MethodMetrics, request: object, context: _Context
    ) -> AsyncIterator[None]:
        """Everything around one RPC."""
        started_s = self._clock.monotonic_s()
        metrics.started()
        code = grpc.StatusCode.UNKNOWN
        try:
            async with self._audited(method, request, context), self._admitted(method, context):
                yield
            code = _code_of(context, grpc.StatusCode.OK)
        except grpc.aio.AbortError:
            code = _code_of(context, grpc.StatusCode.UNKNOWN)
            raise
        except asyncio.CancelledError:
            code = grpc.StatusCode.CANCELLED
            raise
        except CortexError as error:
            code = status_of(error)
            _report(method, context, error)
            status = rich_status(error)
            await context.abort(code, status.message, ((DETAILS_KEY, status.SerializeToString()),))
        except NotImplementedError:
            # A method of a standard service that its library does not serve: any node may ask, and it is no bug.
            code = grpc.StatusCode.UNIMPLEMENTED
            await context.abort(code, f"{method} is not served here")
        except Exception:  # noqa: BLE001 - the one place where our bugs become INTERNAL
            code = grpc.StatusCode.INTERNAL
            _log.exception("rpc_failed", method=method, peer=context.peer())
            await context.abort(code, INTERNAL)
        finally:
            metrics.ended(code, self._clock.monotonic_s() - started_s)

    @asynccontextmanager
    async def _audited(self, method: str, request: object, context: _Context) -> AsyncIterator[None]:
        """Record the call if it is privileged, and any refusal.

        Calls of whoever calls too often are only counted: they do nothing, and must not fill the disk.
        """
        if self._auditor is None:
            yield
            return
        is_privileged = method in PRIVILEGED
        if is_privileged:
            await self._auditor.require()
        call = Call(method, request, context)
        try:
            yield
        except (UnauthenticatedError, ForbiddenError) as error:
            if error.kind != ENDED:
                self._auditor.refused(call, error)
            raise
        except CortexError as error:
            if is_privileged and not isinstance(error, ThrottledError):
                await self._auditor.done(call, status_of(error).name, error.message)
            raise
        except BaseException as error:
            if is_privileged:
                self._auditor.broken_off(call, "CANCELLED" if isinstance(error, asyncio.CancelledError) else "INTERNAL")
            raise
        if is_privileged:
            await self._auditor.done(call, _code_of(context, grpc.StatusCode.OK).name)

    @asynccontextmanager
    async def _admitted(self, method: str, context: _Context) -> AsyncIterator[None]:
        """Run the block as the caller, if it may call; no longer than its certificate holds and it is not shut out.

        A gateway with a pass is, for this call, the node that the pass is for. Calls count before it is known whether
        they are allowed: a refusal costs no less than an answer.
        """
        if method in ANYBODY:
            self._callers.stranger(context.peer())
            yield
            return
        now_s = self._clock.wall_s()
        try:
            certificate, given = self._known(method, context, now_s)
        except (UnauthenticatedError, ForbiddenError):
            self._callers.outsider(context.peer())
            raise
        standings = [certificate] if given is None else [certificate, given.standing]
        caller = certificate.identity if given is None else given.node
        with self._callers.serving(caller, context.peer()), acting_as(caller), acting_by(given):
            authorise(caller, method)
            async with _while_allowed(standings, now_s, self._denied):
                yield

    def _known(self, method: str, context: _Context, now_s: float) -> tuple[Certificate, NodePass | None]:
        """The caller's certificate and, where a gateway calls for a node, the pass for it; all of it good.

        Raises:
            UnauthenticatedError, ForbiddenError: some of it is not.
        """
        certificate = authenticate(context.auth_context(), self._network, now_s)
        self._denied.check(certificate)
        given = self._passes.of_call(certificate, method, context.invocation_metadata(), now_s)
        if given is not None:
            self._denied.check(given.standing)
        return certificate, given


@asynccontextmanager
async def _while_allowed(standings: Sequence[Certificate], now_s: float, denied: DenyList) -> AsyncIterator[None]:
    """End the block when a standing does, or is shut out: a stream must not outlive its caller's right to it."""
    first = min(standings, key=lambda each: each.not_after)
    limit = asyncio.timeout(first.seconds_left(now_s))
    loop = asyncio.get_running_loop()
    try:
        async with limit:
            with ExitStack() as watched:
                for each in standings:
                    watched.enter_context(denied.cutting(each, lambda: limit.reschedule(loop.time())))
                yield
    except TimeoutError:
        if limit.expired():
            for each in standings:
                denied.check(each)
            raise UnauthenticatedError(expired(first), ENDED) from None
        raise


def _code_of(context: _Context, default: grpc.StatusCode) -> grpc.StatusCode:
    """The status a servicer set itself; grpc keeps it as a number or as the enum."""
    code: Any = context.code()
    if isinstance(code, grpc.StatusCode):
        return code
    return next((each for each in grpc.StatusCode if each.value[0] == code and code), default)


def _report(method: str, context: _Context, error: CortexError) -> None:
    if isinstance(error, UnauthenticatedError) and error.kind == ENDED:
        _log.info("rpc_outlived_certificate", method=method, peer=context.peer(), reason=error.message)
    elif isinstance(error, ForbiddenError | UnauthenticatedError):
        REFUSALS.labels(error.kind).inc()
        _log.warning("rpc_refused", method=method, peer=context.peer(), reason=error.message)
    else:
        _log.debug("rpc_answered_with_error", method=method, error=type(error).__name__, reason=error.message)


def _wrapped(handler: _Handler, limits: CallLimits, guard: _Guard) -> _Handler:
    """The same handler behind the guard; response streams are written by the RPC's own task: no extra hop."""
    codecs = (handler.request_deserializer, handler.response_serializer)
    behaviour: Any
    make: Callable[..., _Handler]
    if handler.response_streaming:
        behaviour = _stream_behaviour(handler.stream_stream or handler.unary_stream, limits, guard)
        streams = (grpc.unary_stream_rpc_method_handler, grpc.stream_stream_rpc_method_handler)
        make = streams[handler.request_streaming]
    elif handler.request_streaming:
        behaviour = _upload_behaviour(handler.stream_unary, limits.unary_s, guard)
        make = grpc.stream_unary_rpc_method_handler
    else:
        behaviour = _unary_behaviour(handler.unary_unary, limits.unary_s, guard)
        make = grpc.unary_unary_rpc_method_handler
    return make(behaviour, *codecs)


def _unary_behaviour(inner: Any, within_s: float | None, guard: _Guard) -> Any:
    async def behaviour(request: Any, context: _Context) -> Any:
        async with guard(request, context), _within(within_s, "the call took"):
            return await inner(request, context)

    return behaviour


def _upload_behaviour(inner: Any, within_s: float | None, guard: _Guard) -> Any:
    """However much is sent, as long as something comes."""

    async def behaviour(requests: Any, context: _Context) -> Any:
        async with guard(requests, context):
            return await inner(_in_time(aiter(requests), within_s), context)

    return behaviour


async def _in_time(requests: AsyncIterator[Any], within_s: float | None) -> AsyncIterator[Any]:
    while True:
        async with _within(within_s, "the caller sent nothing for"):
            try:
                request = await anext(requests)
            except StopAsyncIteration:
                return
        yield request


def _stream_behaviour(inner: Any, limits: CallLimits, guard: _Guard) -> Any:
    if not inspect.isasyncgenfunction(inner):
        return _unary_behaviour(inner, None, guard)

    async def behaviour(request: Any, context: _Context) -> None:
        async with guard(request, context), aclosing(inner(request, context)) as messages:
            async for message in messages:
                try:
                    async with _within(limits.write_s, "the caller took nothing for"):
                        await context.write(message)
                except grpc.aio.InternalError:
                    # The caller has gone; nobody is left to be told.
                    raise asyncio.CancelledError from None

    return behaviour


@asynccontextmanager
async def _within(seconds: float | None, what: str) -> AsyncIterator[None]:
    """End the block after a time.

    Raises:
        UnavailableError: it was not done.
    """
    limit = asyncio.timeout(seconds)
    try:
        async with limit:
            yield
    except TimeoutError:
        if limit.expired():
            raise UnavailableError(f"{what} more than {seconds:g} s") from None
        raise
