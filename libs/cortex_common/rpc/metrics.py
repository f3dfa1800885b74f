"""What is counted about every RPC a server answers."""

from __future__ import annotations

import grpc

from cortex_common.telemetry.metrics import counter, gauge, histogram

REQUESTS = counter("cortex_rpc_requests_total", "RPCs answered.", ("service", "method", "code"))
SECONDS = histogram("cortex_rpc_request_seconds", "Time to answer an RPC, streams to their end.", ("service", "method"))
THROTTLED = counter("cortex_rpc_throttled_total", "Calls refused because their caller takes too much.", ("what",))
REFUSALS = counter("cortex_rpc_refusals_total", "RPCs refused, by what was wrong with the caller.", ("kind",))
AUDIT_FAILURES = counter("cortex_rpc_audit_failures_total", "Records the audit log could not take.")
OPEN = gauge("cortex_rpc_open_requests", "RPCs being answered now.", ("service", "method"))


class MethodMetrics:
    """The metrics of one method; made once for it, so that counting costs no look-up."""

    def __init__(self, full_method: str) -> None:
        service, _, method = full_method.strip("/").partition("/")
        self._labels = (service, method)
        self._seconds = SECONDS.labels(service, method)
        self._open = OPEN.labels(service, method)

    def started(self) -> None:
        """An RPC has begun."""
        self._open.inc()

    def ended(self, code: grpc.StatusCode, seconds: float) -> None:
        """It has been answered with `code`."""
        self._open.dec()
        self._seconds.observe(seconds)
        REQUESTS.labels(*self._labels, code.name).inc()
