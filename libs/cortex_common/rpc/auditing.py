"""What every server writes into its audit log: privileged calls, each before it is answered, and refusals."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from cortex_common.buckets import Allowance, Buckets
from cortex_common.clock import Clock
from cortex_common.errors import CortexError, ForbiddenError, UnauthenticatedError, UnavailableError
from cortex_common.identity import Role, TlsFiles
from cortex_common.logging import get_logger
from cortex_common.rpc.identity import ORG_KEY, PRINCIPAL_KEY
from cortex_common.rpc.metrics import AUDIT_FAILURES
from cortex_common.security.audit import AuditLog, Entry, Head
from cortex_common.security.certificates import certificate_of, read_certificate
from cortex_common.security.signed_heads import HEADS_FILE, SIGN_EVERY_S, add_head, sign_head

_log = get_logger(__name__)

# Fields of requests that name what is acted on; none of them is a secret.
_ABOUT = ("job_id", "request_id", "name", "role", "token_id", "round", "reason", "root")
_MAX_TEXT = 300
_MAX_KINDS = 4096
_MAX_WAITING = 1000
_OK = "OK"
# Of privileged calls that came to nothing, for each caller, and all without a certificate together; beyond them they
# are told like refusals. A log has room for some 100,000 records: nobody is to push those of the others out of it.
_FAILURES = Allowance(per_s=0.1, burst=100.0)


class Recordable(Protocol):
    """Something that was asked for."""

    def entry(self, decision: str, code: str, reason: str = "") -> Entry:
        """The record of it."""


class Call:
    """An RPC as the log sees it; read only when there is something to record."""

    def __init__(self, method: str, request: object, context: Any) -> None:
        self._method = method
        self._request = request
        self._context = context

    def entry(self, decision: str, code: str, reason: str = "") -> Entry:
        """The record of it."""
        who, serial, principal = self._caller()
        return Entry(
            who=who,
            what=self._method,
            decision=decision,
            code=code,
            serial=serial,
            on_behalf_of=principal,
            about=self._about(),
            reason=reason[:_MAX_TEXT],
            peer=str(self._context.peer())[:_MAX_TEXT],
        )

    def _caller(self) -> tuple[str, str, str]:
        pems = list(self._context.auth_context().get("x509_pem_cert", ()))
        if not pems:
            return "", "", ""
        try:
            certificate = read_certificate(pems[0])
        except UnauthenticatedError:
            return "", "", ""
        principal = ""
        if certificate.identity.role is Role.GATEWAY:
            pairs = dict(self._context.invocation_metadata() or ())
            principal = "/".join(str(pairs[key]) for key in (ORG_KEY, PRINCIPAL_KEY) if key in pairs)[:_MAX_TEXT]
        return certificate.identity.uri, f"{certificate.serial:x}", principal

    def _about(self) -> str:
        descriptor = getattr(self._request, "DESCRIPTOR", None)
        if descriptor is None:
            return ""
        names = [name for name in _ABOUT if name in descriptor.fields_by_name and getattr(self._request, name)]
        return " ".join(f"{name}={str(getattr(self._request, name))[:_MAX_TEXT]}" for name in names)[:_MAX_TEXT]


class Auditor:
    """The audit log of a server, written by a thread of its own.

    A refusal that repeats (same caller, method and reason) is recorded at once and then once a minute, with how often.
    """

    def __init__(self, directory: Path, tls: TlsFiles, clock: Clock) -> None:
        self._log = AuditLog(directory)
        self._tls = tls
        self._clock = clock
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="audit")
        self._repeats: OrderedDict[tuple[str, str, str, str], tuple[Entry, float, int]] = OrderedDict()
        self._failures = Buckets(_FAILURES)
        self._waiting = 0
        self._is_broken = False
        self._signed: Head | None = None

    async def require(self) -> None:
        """Return if the log can take a record.

        Raises:
            UnavailableError: it cannot; what must be recorded must not happen.
        """
        if self._is_broken:
            await self._write(Entry(who="", what="audit log", decision="allowed", code="OK", reason="writable again"))

    async def done(self, call: Recordable, code: str, reason: str = "") -> None:
        """Record a privileged call that was let in. It is on the disk when this returns, unless many came to nothing.

        Raises:
            UnavailableError: it is not.
        """
        entry = call.entry("allowed", code, reason)
        if not self._is_merged(entry):
            await self._write(entry)

    def broken_off(self, call: Call, code: str) -> None:
        """Record, soon, a privileged call that was let in and came to no answer."""
        entry = call.entry("allowed", code)
        if not self._is_merged(entry):
            self._soon(entry)

    def did(self, what: str, about: str, reason: str) -> None:
        """Record, soon, what this node did by itself."""
        who = certificate_of(self._tls).identity.uri
        self._soon(Entry(who=who, what=what, decision="allowed", code="OK", about=about, reason=reason[:_MAX_TEXT]))

    def refused(self, call: Recordable, error: UnauthenticatedError | ForbiddenError) -> None:
        """Record a refusal, soon."""
        entry = call.entry("refused", type(error).__name__.removesuffix("Error").upper(), error.message)
        self._often((entry.who, entry.what, error.kind, "" if entry.who else entry.peer.rpartition(":")[0]), entry)

    def _is_merged(self, entry: Entry) -> bool:
        """Whether a call came to nothing, as so many of its caller did that it is told together with those like it."""
        caller = f"{entry.who} {entry.on_behalf_of}"
        if entry.code == _OK or not self._failures.wait_s(caller, self._clock.monotonic_s()):
            return False
        self._often((caller, entry.what, entry.code, ""), entry)
        return True

    def _often(self, key: tuple[str, str, str, str], entry: Entry) -> None:
        """Record, soon, what may come again and again: at once, and then once a minute with how often."""
        now_s = self._clock.monotonic_s()
        known = self._repeats.get(key)
        if known is not None and now_s - known[1] < SIGN_EVERY_S:
            self._repeats[key] = (known[0], known[1], known[2] + 1)
            return
        self._repeats[key] = (entry, now_s, 0)
        self._soon(replace(entry, repeats=known[2] if known else 0))
        if len(self._repeats) > _MAX_KINDS:
            self._flush(self._repeats.popitem(last=False)[1])

    async def run(self) -> None:
        """Write out repeats and sign the head, that of an empty log too: at once, then once a minute, for ever."""
        while True:
            await self.settle()
            await self._clock.sleep(SIGN_EVERY_S)

    async def settle(self) -> None:
        """Everything known is on the disk, and the head is signed."""
        now_s = self._clock.monotonic_s()
        for key, known in list(self._repeats.items()):
            if now_s - known[1] >= SIGN_EVERY_S:
                del self._repeats[key]
                self._flush(known)
        await asyncio.get_running_loop().run_in_executor(self._thread, self._sign)

    async def close(self) -> None:
        """Write everything out, and stop."""
        for known in self._repeats.values():
            self._flush(known)
        self._repeats.clear()
        await asyncio.get_running_loop().run_in_executor(self._thread, self._sign)
        self._thread.shutdown()

    def _flush(self, known: tuple[Entry, float, int]) -> None:
        entry, _, repeats = known
        if repeats:
            self._soon(replace(entry, repeats=repeats))

    def _soon(self, entry: Entry) -> None:
        """Write without being waited for; what comes faster than the disk takes it is only counted."""
        if self._waiting >= _MAX_WAITING:
            AUDIT_FAILURES.inc()
            return
        self._waiting += 1
        done = asyncio.get_running_loop().run_in_executor(self._thread, self._append, entry)
        done.add_done_callback(self._written)

    def _written(self, done: asyncio.Future[None]) -> None:
        self._waiting -= 1
        if not done.cancelled() and (error := done.exception()) is not None:
            self._broke(error)

    async def _write(self, entry: Entry) -> None:
        try:
            await asyncio.get_running_loop().run_in_executor(self._thread, self._append, entry)
        except OSError as error:
            self._broke(error)
            raise UnavailableError(f"the audit log cannot be written: {error.strerror or error}") from error
        self._is_broken = False

    def _broke(self, error: BaseException) -> None:
        AUDIT_FAILURES.inc()
        if not self._is_broken:
            _log.error("audit_log_not_writable", reason=str(error), effect="privileged calls are refused")
        self._is_broken = True

    def _append(self, entry: Entry) -> None:
        before = self._log.head.number
        if self._log.append(entry, self._clock.wall_s()).number > before + 1:
            # Old records were removed: no check of the log is to find that before it is signed.
            self._sign()

    def _sign(self) -> None:
        head = self._log.head
        if head == self._signed:
            return
        try:
            statement = sign_head(head, self._tls, self._clock.wall_s())
            add_head(self._log.directory / HEADS_FILE, statement)
        except (OSError, CortexError) as error:
            _log.warning("audit_head_not_signed", reason=str(error))
            return
        self._signed = head
        # Whoever collects logs holds the head where this node cannot change it.
        _log.info("audit_head", **{name: said for name, said in statement.items() if name != "certificate"})


@asynccontextmanager
async def auditing(directory: Path, tls: TlsFiles, clock: Clock) -> AsyncIterator[Auditor]:
    """The audit log in a directory, for as long as the block lasts."""
    auditor = Auditor(directory, tls, clock)
    running = asyncio.create_task(auditor.run())
    try:
        yield auditor
    finally:
        running.cancel()
        await auditor.close()
