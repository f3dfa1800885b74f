"""What is signed of a job: the whole job with every default filled in, for whom it is, and until when it holds."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime, timedelta
from pathlib import Path
from typing import Annotated

from pydantic import AwareDatetime, Field, StrictStr, ValidationError, model_validator

from cortex_common.envelope import Envelope, is_envelope
from cortex_common.errors import InvalidArgumentError
from cortex_common.job.parse import load_job_file, parse_job, violations_of
from cortex_common.job.spec import JobSpec, Section

JOB_TYPE = "application/vnd.cortex.job.v1+json"
Label = Annotated[StrictStr, Field(min_length=1, max_length=100)]


class JobStatement(Section):
    """A signed job's payload.

    Attributes:
        job: As the signer has seen it: a default that changes later does not change what was signed.
        organisation: On whose behalf.
        network: The only one it is for; None: any whose sites allow the signers.
        issued_at: When it was signed first.
        expires_at: Sites refuse it from then on.
    """

    job: JobSpec
    organisation: Label
    network: Label | None = None
    issued_at: AwareDatetime
    expires_at: AwareDatetime

    @model_validator(mode="after")
    def _ends_after_it_begins(self) -> JobStatement:
        if self.expires_at <= self.issued_at:
            raise ValueError(f"expires_at: {self.expires_at.isoformat()} given; allowed: after issued_at")
        return self

    @classmethod
    def of(
        cls, job: JobSpec, organisation: str, now: datetime, life: timedelta, network: str | None = None
    ) -> JobStatement:
        """A statement issued now.

        Raises:
            InvalidArgumentError: a value is not allowed.
        """
        try:
            return cls(job=job, organisation=organisation, network=network, issued_at=now, expires_at=now + life)
        except ValidationError as error:
            raise InvalidArgumentError.of("statement", violations_of(error, cls)) from None

    def to_envelope(self) -> Envelope:
        """The unsigned envelope; the same statement gives the same bytes."""
        document = self.model_dump(mode="json")
        text = json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        return Envelope(JOB_TYPE, text.encode())


def statement_of(envelope: Envelope) -> JobStatement:
    """The statement in an envelope, whoever signed it.

    Raises:
        InvalidArgumentError: another kind of payload, or lists every mistake in it.
    """
    if envelope.payload_type != JOB_TYPE:
        raise InvalidArgumentError(f"signed job: payloadType {envelope.payload_type[:80]!r}; allowed: {JOB_TYPE}")
    try:
        return JobStatement.model_validate(json.loads(envelope.payload))
    except ValidationError as error:
        raise InvalidArgumentError.of("signed job", violations_of(error, JobStatement)) from None
    except (ValueError, RecursionError) as error:
        raise InvalidArgumentError(f"signed job: the payload is not JSON: {error}") from None


def submission_of(job: JobSpec | Envelope | Mapping[str, object] | Path | str) -> JobSpec | Envelope:
    """What is asked for: a job, the same as a mapping, one that is signed, or the file of one.

    Raises:
        InvalidArgumentError: it can be read as none, or has mistakes.
    """
    if isinstance(job, JobSpec | Envelope):
        return job
    return load_submission(Path(job)) if isinstance(job, (str, Path)) else parse_job(job)


def load_submission(path: Path) -> JobSpec | Envelope:
    """What a file asks for: a job file's job, or the envelope of one that is signed. Its mistakes are told here.

    Raises:
        NotFoundError: no such file.
        InvalidArgumentError: it can be read as neither, or has mistakes.
    """
    try:
        document = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return load_job_file(path)
    if not is_envelope(document):
        return load_job_file(path)
    envelope = Envelope.from_document(document, str(path))
    statement_of(envelope)
    return envelope
