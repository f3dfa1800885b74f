"""What the supervisor says about its processes, and how healthy they are."""

from __future__ import annotations

import contextlib
import http.client
import json
from concurrent.futures import ThreadPoolExecutor
from enum import StrEnum
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from cortex.local.files import write_text
from cortex.local.layout import Layout
from cortex.local.members import HOST, Member
from cortex.local.processes import ProcessId

PROBE_TIMEOUT_S = 2.0


class Phase(StrEnum):
    """What a supervisor is about."""

    STARTING = "starting"
    RUNNING = "running"
    STOPPING = "stopping"


class Health(StrEnum):
    """What is known of a process now."""

    HEALTHY = "healthy"
    STARTING = "starting"
    UNHEALTHY = "unhealthy"
    DOWN = "down"


class ProcessReport(BaseModel):
    """One supervised process; `process` is None between two lives."""

    model_config = ConfigDict(frozen=True)

    name: str
    process: ProcessId | None = None
    restarts: int = 0
    last_exit: str | None = None


class SupervisorReport(BaseModel):
    """The supervisor and its processes."""

    model_config = ConfigDict(frozen=True)

    supervisor: ProcessId
    phase: Phase
    processes: tuple[ProcessReport, ...] = ()


def read_report(layout: Layout) -> SupervisorReport | None:
    """The last report, or None when there is none that can be read."""
    try:
        return SupervisorReport.model_validate_json(layout.supervisor_file.read_bytes())
    except (OSError, ValidationError):
        return None


def write_report(layout: Layout, report: SupervisorReport) -> None:
    """Write the report atomically."""
    write_text(layout.supervisor_file, report.model_dump_json())


def running_report(layout: Layout) -> SupervisorReport | None:
    """The report of a supervisor that runs now, or None."""
    report = read_report(layout)
    return report if report is not None and report.supervisor.is_alive() else None


def ready_facts(layout: Layout, name: str, pid: int) -> dict[str, Any] | None:
    """What a service wrote when it became ready; None unless this very process wrote it."""
    try:
        facts = json.loads(layout.ready(name).read_bytes())
    except (OSError, ValueError):
        return None
    return facts if isinstance(facts, dict) and facts.get("pid") == pid else None


def probe(port: int, path: str) -> tuple[bool, str]:
    """Ask an operations port: whether it answered 200, and the reason it gave if not."""
    connection = http.client.HTTPConnection(HOST, port, timeout=PROBE_TIMEOUT_S)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        text = response.read(4096).decode(errors="replace").strip()
    except (OSError, http.client.HTTPException) as error:
        return False, f"port {port} does not answer ({error})"
    finally:
        connection.close()
    return response.status == http.client.OK, _reason(text)


def _reason(text: str) -> str:
    """The reason in an answer of /readyz; other text as it is."""
    try:
        document = json.loads(text)
    except ValueError:
        return text
    return str(document.get("reason", "")) if isinstance(document, dict) else text


def health_of(layout: Layout, member: Member, report: ProcessReport, path: str = "/healthz") -> tuple[Health, str]:
    """How healthy a process is now, and why if it is not; with `path="/readyz"` whether it can do its work, too."""
    if report.process is None or not report.process.is_alive():
        return Health.DOWN, report.last_exit or "not started yet"
    facts = ready_facts(layout, member.name, report.process.pid)
    if facts is None:
        return Health.STARTING, "not ready yet"
    good, text = probe(int(facts.get("metrics_port") or member.ports["metrics"]), path)
    return (Health.HEALTHY, "") if good else (Health.UNHEALTHY, text)


def process_table(layout: Layout, members: tuple[Member, ...], report: SupervisorReport | None) -> list[dict[str, Any]]:
    """What `cortex ps` lists: a row a process, its health asked now."""
    known = {entry.name: entry for entry in report.processes} if report else {}
    entries = [known.get(member.name, ProcessReport(name=member.name)) for member in members]
    with ThreadPoolExecutor(max_workers=8) as pool:
        return list(pool.map(lambda pair: _row(layout, *pair), zip(members, entries, strict=True)))


def _row(layout: Layout, member: Member, entry: ProcessReport) -> dict[str, Any]:
    health, why = health_of(layout, member, entry)
    ready = health is Health.HEALTHY
    if ready:
        state, why = health_of(layout, member, entry, "/readyz")
        ready = state is Health.HEALTHY
    alive = health is not Health.DOWN and entry.process is not None
    return {
        "service": member.service.value,
        "name": member.name,
        "region": member.region,
        "pid": entry.process.pid if alive and entry.process else None,
        "health": health.value,
        "ready": ready,
        "reason": why or None,
        "address": member.address() or member.address("http"),
        "addresses": {use: member.address(use) for use in member.ports},
        "restarts": entry.restarts,
    }


def last_lines(layout: Layout, name: str, count: int = 15) -> str:
    """The end of a process's log."""
    with contextlib.suppress(OSError):
        return "\n".join(layout.log(name).read_text(errors="replace").splitlines()[-count:])
    return ""
