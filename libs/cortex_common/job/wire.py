"""Jobs and their status on the wire: the only file of this package that knows protobuf."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Any

from google.protobuf import json_format
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.protobuf.struct_pb2 import Struct
from google.protobuf.timestamp_pb2 import Timestamp

from cortex_common.errors import CorruptError, InvalidArgumentError
from cortex_common.job.parse import parse_job
from cortex_common.job.spec import JobSpec
from cortex_common.job.status import (
    Dropped,
    EventInfo,
    JobPhase,
    JobStatus,
    ModelSummary,
    PrivacySummary,
    RoundReport,
    SiteRefusal,
    VersionInfo,
    WorkerActivity,
)
from cortex_common.pb.v1 import common_pb2, coordinator_pb2, job_pb2

# Fields of a job that are a word or a number, and text in its message; all other text stays what it is.
_WORD_OR_NUMBER = frozenset({"threshold", "ring_bits"})


def spec_to_proto(spec: JobSpec) -> job_pb2.JobSpec:
    """The message that means the same job.

    Raises:
        InvalidArgumentError: a value is too large for its field.
    """
    message = job_pb2.JobSpec()
    _fill(message, spec.model_dump(mode="json"))
    return message


def spec_bytes(spec: JobSpec) -> bytes:
    """The one form of a job that every party gets, whatever way it came: equal bytes are the same job."""
    return spec_to_proto(spec).SerializeToString(deterministic=True)


def spec_from_proto(message: job_pb2.JobSpec) -> JobSpec:
    """Validate the job in a message; unset fields take their defaults.

    Raises:
        InvalidArgumentError: lists every mistake.
    """
    return parse_job(document_from_proto(message))


def document_from_proto(message: Message) -> dict[str, object]:
    """The set fields of a message as a job document; unlike protobuf's JSON, 64-bit numbers stay numbers."""
    return {field.name: _native(field, value) for field, value in message.ListFields()}


def _native(field: FieldDescriptor, value: object) -> object:
    if isinstance(value, Struct):
        return _options(field.name, value)
    if isinstance(value, Duration):
        return value.ToTimedelta().total_seconds()
    if isinstance(value, Message):
        return document_from_proto(value)
    if field.is_repeated and isinstance(value, Iterable):
        return list(value)
    if isinstance(value, str) and field.name in _WORD_OR_NUMBER and value.isdecimal():
        return int(value)
    return value


def _options(name: str, value: Struct) -> dict[str, object]:
    try:
        return {key: _whole(item) for key, item in json_format.MessageToDict(value).items()}
    except (ValueError, RecursionError, json_format.Error):
        raise InvalidArgumentError(f"{name}: allowed: finite numbers, text and lists, not nested deeply") from None


def _whole(value: object) -> object:
    """Struct knows only floating-point numbers: a whole one is given back as an integer."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, list):
        return [_whole(item) for item in value]
    return value


def _fill(message: Message, document: Mapping[str, object]) -> None:
    for key, value in document.items():
        field = message.DESCRIPTOR.fields_by_name[key]
        target = getattr(message, key)
        if value is None:
            continue
        try:
            _set(message, field, target, value)
        except (ValueError, OverflowError, json_format.Error):
            raise InvalidArgumentError(f"{key}: {str(value)[:80]} given; it is too large to be sent") from None


def _set(message: Message, field: Any, target: Any, value: Any) -> None:
    """Give a field, whose present value is `target`, another one."""
    if isinstance(target, Struct) and isinstance(value, Mapping):
        json_format.ParseDict(dict(value), target)
    elif isinstance(target, Duration):
        target.FromNanoseconds(round(float(str(value)) * 1e9))
    elif isinstance(value, Mapping):
        target.SetInParent()
        _fill(target, value)
    elif field.is_repeated:
        getattr(message, field.name).extend(value)
    else:
        setattr(message, field.name, str(value) if field.type == FieldDescriptor.TYPE_STRING else value)


def timestamp(moment: datetime | None) -> Timestamp | None:
    """A protobuf timestamp, or None."""
    if moment is None:
        return None
    stamp = Timestamp()
    stamp.FromDatetime(moment.astimezone(UTC))
    return stamp


def moment(message: Message, field: str) -> datetime | None:
    """The time in a timestamp field; None if unset, or before year 1 or after 9999."""
    try:
        return getattr(message, field).ToDatetime(tzinfo=UTC) if message.HasField(field) else None
    except ValueError:
        return None


def status_to_proto(status: JobStatus) -> job_pb2.JobStatus:
    """The message that says the same."""
    return job_pb2.JobStatus(
        job_id=status.job_id,
        name=status.name,
        status=status.status.value,
        round=status.round,
        rounds=status.rounds,
        waiting_for=status.waiting_for or "",
        metrics=dict(status.metrics),
        history=[_round_to_proto(report) for report in status.history],
        model=job_pb2.ModelSummary(**status.model.model_dump()) if status.model else None,
        goodput=status.goodput,
        privacy=job_pb2.PrivacySummary(epsilon=status.privacy.epsilon),
        error=status.error,
        submitted_at=timestamp(status.submitted_at),
        started_at=timestamp(status.started_at),
        finished_at=timestamp(status.finished_at),
        owner=status.owner,
        workers=[job_pb2.WorkerActivity(**worker.model_dump()) for worker in status.workers],
        tensorboard_dir=status.tensorboard_dir or "",
        refusals=[job_pb2.SiteRefusal(**refusal.model_dump()) for refusal in status.refusals],
    )


def _round_to_proto(report: RoundReport) -> job_pb2.RoundReport:
    return job_pb2.RoundReport(
        round=report.round,
        attempt=report.attempt,
        seconds=report.seconds,
        train_seconds=report.train_seconds,
        exchange_seconds=report.exchange_seconds,
        bytes_up=report.bytes_up,
        bytes_down=report.bytes_down,
        bytes_between_regions=report.bytes_between_regions,
        participants=report.participants,
        accepted=report.accepted,
        dropped=[job_pb2.Dropped(**dropped.model_dump()) for dropped in report.dropped],
        metrics=dict(report.metrics),
        model_sha256=report.model_sha256,
    )


def status_from_proto(message: job_pb2.JobStatus) -> JobStatus:
    """Read a status.

    Raises:
        CorruptError: its phase is one that this version does not know.
    """
    model = message.model
    return JobStatus(
        job_id=message.job_id,
        name=message.name,
        status=_phase_of(message.status),
        round=message.round,
        rounds=message.rounds,
        waiting_for=message.waiting_for or None,
        metrics=dict(message.metrics),
        history=tuple(_round_from_proto(report) for report in message.history),
        model=ModelSummary(round=model.round, sha256=model.sha256, parameters=model.parameters)
        if model.sha256
        else None,
        goodput=message.goodput,
        privacy=PrivacySummary(epsilon=message.privacy.epsilon if message.privacy.HasField("epsilon") else None),
        error=message.error if message.HasField("error") else None,
        submitted_at=moment(message, "submitted_at") or datetime.fromtimestamp(0, UTC),
        started_at=moment(message, "started_at"),
        finished_at=moment(message, "finished_at"),
        owner=message.owner,
        workers=tuple(
            WorkerActivity(seat=w.seat, worker=w.worker, region=w.region, activity=w.activity, since_s=w.since_s)
            for w in message.workers
        ),
        tensorboard_dir=message.tensorboard_dir or None,
        refusals=tuple(SiteRefusal(worker=r.worker, rule=r.rule, message=r.message) for r in message.refusals),
    )


def _phase_of(text: str) -> JobPhase:
    try:
        return JobPhase(text)
    except ValueError:
        known = ", ".join(JobPhase)
        raise CorruptError(
            f"a job's status is {text[:40]!r}; this version knows {known}: is the coordinator a newer one?"
        ) from None


def _round_from_proto(message: job_pb2.RoundReport) -> RoundReport:
    return RoundReport(
        round=message.round,
        attempt=message.attempt,
        seconds=message.seconds,
        train_seconds=message.train_seconds,
        exchange_seconds=message.exchange_seconds,
        bytes_up=message.bytes_up,
        bytes_down=message.bytes_down,
        bytes_between_regions=message.bytes_between_regions,
        participants=message.participants,
        accepted=message.accepted,
        dropped=tuple(Dropped(worker=dropped.worker, reason=dropped.reason) for dropped in message.dropped),
        metrics=dict(message.metrics),
        model_sha256=message.model_sha256,
    )


def version_to_proto(version: VersionInfo) -> common_pb2.ModelVersion:
    """The message that says the same."""
    return common_pb2.ModelVersion(
        job_id=version.job_id,
        round=version.round,
        sha256=version.sha256,
        manifest_sha256=version.manifest_sha256,
        parameters=version.parameters,
        size_bytes=version.size_bytes,
        metrics=dict(version.metrics),
        created_at=timestamp(version.created_at),
    )


def version_from_proto(message: common_pb2.ModelVersion) -> VersionInfo:
    """Read a version."""
    return VersionInfo(
        job_id=message.job_id,
        round=message.round,
        sha256=message.sha256,
        manifest_sha256=message.manifest_sha256,
        parameters=message.parameters,
        size_bytes=message.size_bytes,
        metrics=dict(message.metrics),
        created_at=moment(message, "created_at") or datetime.fromtimestamp(0, UTC),
    )


def event_to_proto(event: EventInfo) -> coordinator_pb2.JobEvent:
    """The message that says the same."""
    return coordinator_pb2.JobEvent(
        sequence=event.sequence, at=timestamp(event.at), name=event.name, round=event.round, message=event.message
    )


def event_from_proto(message: coordinator_pb2.JobEvent) -> EventInfo:
    """Read an event."""
    at = moment(message, "at") or datetime.fromtimestamp(0, UTC)
    return EventInfo(sequence=message.sequence, at=at, name=message.name, round=message.round, message=message.message)
