"""Numbers and tables for people."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from rich.table import Table

from cortex_common.job.status import JobPhase, JobStatus, RoundReport

if TYPE_CHECKING:
    from cortex.views import NodeView

PHASE_STYLES: Mapping[str, str] = {"completed": "green", "failed": "red", "cancelled": "yellow", "paused": "yellow"}
HEALTH_STYLES: Mapping[str, str] = {
    "live": "green", "healthy": "green", "suspect": "yellow", "starting": "yellow", "expired": "red",
    "unhealthy": "red", "down": "red",
}  # fmt: skip


def table(*columns: str, right: Iterable[str] = ()) -> Table:
    """An empty table without frills."""
    made = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        made.add_column(column, justify="right" if column in set(right) else "left", no_wrap=True)
    return made


def size(count: float) -> str:
    """Bytes in a unit that keeps the number short."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def number(value: float | None, digits: int = 4) -> str:
    """A metric, or a dash."""
    return "-" if value is None else f"{value:.{digits}f}"


def styled(text: str, styles: Mapping[str, str]) -> str:
    """Rich markup for a word of a fixed vocabulary; anything else stays as it is."""
    style = styles.get(text)
    return f"[{style}]{text}[/{style}]" if style else text


_ROUND_COLUMNS = (
    *("round", "loss", "test", "accuracy", "seconds"),
    *("train", "sync", "up", "down", "ok"),
)


def rounds_table(history: Sequence[RoundReport]) -> Table:
    """What each round brought and cost: `test` is a loss, `train` and `sync` are seconds, `ok` the accepted updates."""
    made = table(*_ROUND_COLUMNS, right=_ROUND_COLUMNS)
    for report in history:
        metrics = report.metrics
        made.add_row(
            str(report.round),
            *(number(metrics.get(key)) for key in ("train_loss", "test_loss", "test_accuracy")),
            *(f"{value:.1f}" for value in (report.seconds, report.train_seconds, report.exchange_seconds)),
            size(report.bytes_up),
            size(report.bytes_down),
            f"{report.accepted}/{report.participants}",
        )
    return made


def jobs_table(jobs: Sequence[JobStatus]) -> Table:
    """One line a job."""
    made = table("job", "name", "status", "round", "loss", "accuracy", "submitted", right=("round", "loss", "accuracy"))
    for job in jobs:
        made.add_row(
            job.job_id,
            job.name,
            job.status.value,
            f"{job.round}/{job.rounds}",
            number(job.metrics.get("train_loss")),
            number(job.metrics.get("test_accuracy")),
            f"{job.submitted_at.astimezone():%Y-%m-%d %H:%M:%S}",
            style=PHASE_STYLES.get(job.status.value),
        )
    return made


def nodes_table(nodes: Sequence[NodeView]) -> Table:
    """One line a node, by region."""
    columns = ["region", "name", "role", "health", "doing", "cpu", "memory used", "address"]
    has_gpus = any(node.resources.gpus for node in nodes)
    made = table(*columns, *(["gpus"] if has_gpus else []), right=("cpu", "memory used"))
    for node in sorted(nodes, key=lambda node: (node.region, node.role, node.name)):
        owned = node.resources
        cells = [
            *(node.region, node.name, node.role, node.health, node.activity or "-"),
            f"{owned.cpu_utilisation * 100:.0f} %" if owned.cpu_cores else "-",
            f"{size(owned.memory_bytes - owned.memory_available_bytes)}" if owned.memory_bytes else "-",
            node.address or "-",
        ]
        if has_gpus:
            cells.append(", ".join(f"{gpu.name} {gpu.utilisation * 100:.0f} %" for gpu in owned.gpus) or "-")
        made.add_row(*cells, style=None if node.health == "live" else HEALTH_STYLES.get(node.health))
    return made


def facts(job: JobStatus) -> list[str]:
    """A job in lines: name and state first, then what it waits for or why it failed."""
    lines = [f"job      {job.job_id} ({job.name})", f"status   {job.status.value}, round {job.round} of {job.rounds}"]
    if job.waiting_for and not job.status.is_terminal:
        lines.append(f"waiting  for {job.waiting_for}")
    lines += [f"refused  by {each.worker}: {each.rule}: {each.message}" for each in job.refusals]
    if job.error:
        lines.append(f"error    {job.error}")
    if job.metrics:
        lines.append("metrics  " + ", ".join(f"{key} {value:.4f}" for key, value in sorted(job.metrics.items())))
    if job.model:
        lines.append(
            f"model    round {job.model.round}, {job.model.parameters:,} parameters, sha256 {job.model.sha256}"
        )
    if job.status is JobPhase.COMPLETED or job.goodput:
        lines.append(f"goodput  {job.goodput * 100:.1f} %")
    if job.tensorboard_dir:
        lines.append(f"scalars  tensorboard --logdir {job.tensorboard_dir}")
    return lines
