"""Whether this site takes a job: its own policy, read from a file, against what the job says and who signed it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path

from cortex_common.clock import Clock
from cortex_common.data.sealed import described
from cortex_common.envelope import Envelope
from cortex_common.errors import CortexError, InvalidArgumentError, NotFoundError
from cortex_common.job.site_policy import (
    Refusal,
    SitePolicy,
    data_refusals,
    refusals,
    signature_refusals,
    update_bytes,
)
from cortex_common.job.spec import JobSpec, ModelSpec
from cortex_common.job.statement import JobStatement, statement_of
from cortex_common.job.wire import spec_bytes
from cortex_common.logging import get_logger
from cortex_common.network.work import Assignment, Initialise, Train
from cortex_common.security.signing import PublicKey
from services.worker.outgoing import Outgoing

_log = get_logger(__name__)

POLICY_UNUSABLE = "site_policy"
"""The rule by which every job is refused while the changed file is wrong."""
_LOOK_EVERY_S = 1.0
_MAX_ADMITTED = 1000


class Gate:
    """Asked about every assignment before anything of its job runs, and again whenever the policy has changed.

    Without a policy file every job may run; one that is signed must still be what was signed. A person's own program
    takes jobs about its own network only.
    """

    def __init__(
        self, path: Path | None, network: str, outgoing: Outgoing, clock: Clock, model: ModelSpec | None = None
    ) -> None:
        """Read the policy.

        Args:
            path: The policy file; None: there is none.
            network: Whose jobs these are.
            outgoing: Counts what has left the site.
            clock: Says when signatures end.
            model: The only network that is trained here; None: any.

        Raises:
            NotFoundError: there is no such file.
            InvalidArgumentError: lists every mistake in it.
        """
        self._path = path
        self._network = network
        self._outgoing = outgoing
        self._clock = clock
        self._model = model
        self._digest = b""
        self._broken: Refusal | None = None
        self._admitted: dict[str, None] = {}
        self._policy = SitePolicy() if path is None else self._read(path)

    def refusals(self, assignment: Assignment) -> tuple[Refusal, ...]:
        """The rules that keep this site from the work; none: it may be done."""
        if self._broken is not None:
            return (self._broken,)
        found = [*self._signed(assignment), *refusals(self._policy, assignment.spec, assignment.seats)]
        return (*found, *self._other_model(assignment.spec), *self._sealed(assignment), *self._too_much(assignment))

    def refusals_of_own(self, spec: JobSpec) -> tuple[Refusal, ...]:
        """The rules that would keep this site from a job that is submitted here, without a signature."""
        if self._broken is not None:
            return (self._broken,)
        unsigned = signature_refusals(self._policy, (), "", is_signed=False)
        too_much = self._above_limit(spent=0, due=update_bytes(spec))
        return (*unsigned, *refusals(self._policy, spec, spec.placement.workers), *too_much)

    async def watch(self, on_change: Callable[[], None]) -> None:
        """Read the file again whenever it has changed, for ever. While it is wrong, every job is refused."""
        while self._path is not None:
            await self._clock.sleep(_LOOK_EVERY_S)
            if self._is_changed(self._path):
                on_change()

    def _is_changed(self, path: Path) -> bool:
        """Take over what the file says now."""
        before = (self._digest, self._broken)
        try:
            self._policy, self._broken = self._read(path), None
        except CortexError as error:
            self._broken = Refusal(POLICY_UNUSABLE, error.message)
        if (self._digest, self._broken) == before:
            return False
        if self._broken is not None:
            _log.error("site_policy_not_usable", path=str(path), reason=self._broken.message)
        else:
            _log.info("site_policy_read", path=str(path))
        return True

    def _read(self, path: Path) -> SitePolicy:
        try:
            text = SitePolicy.text_of(path)
        except NotFoundError:
            self._digest = b""
            raise
        digest = hashlib.sha256(text.encode()).digest()
        if digest == self._digest and self._broken is None:
            return self._policy
        self._digest = digest
        return SitePolicy.parse(text, f"site policy {path}")

    def _other_model(self, spec: JobSpec) -> list[Refusal]:
        """Whether the job is about another network than the program that this worker is part of."""
        if self._model is None or (wanted := _layers(spec.model)) == (own := _layers(self._model)):
            return []
        return [Refusal("model", f"layers {wanted:.100} wanted; this program trains {own:.100}")]

    def _signed(self, assignment: Assignment) -> list[Refusal]:
        """What is wrong with the job's signatures, and with what they are for."""
        if not assignment.signed_job:
            return signature_refusals(self._policy, (), "", is_signed=False)
        try:
            envelope, statement, signed = _opened(assignment.signed_job)
        except InvalidArgumentError as error:
            return [Refusal("signed_job", error.message[:4096])]
        wrong = self._misused(statement, signed, assignment.spec)
        known = self._policy.allowed_signers
        signers = [signer for signer in known if PublicKey.parse(signer.key).has_signed(envelope)]
        return wrong + signature_refusals(self._policy, signers, statement.organisation, is_signed=True)

    def _misused(self, statement: JobStatement, signed: bytes, spec: JobSpec) -> list[Refusal]:
        """A signature is for one job, in one network if it says so, and ends."""
        wrong = []
        if signed != spec_bytes(spec):
            told = ", ".join(_differences(statement.job.model_dump(mode="json"), spec.model_dump(mode="json"))[:3])
            wrong.append(f"what is to be run is not what was signed: {told}")
        if statement.network not in (None, self._network):
            wrong.append(f"signed for network {statement.network}; allowed: {self._network}")
        if statement.expires_at.timestamp() <= self._clock.wall_s():
            wrong.append(f"expired at {statement.expires_at.isoformat()}; allowed: before that")
        return [Refusal("signed_job", message) for message in wrong]

    def _sealed(self, assignment: Assignment) -> list[Refusal]:
        """Whether its sealed data are somebody's who is known here; the signature is checked before they are opened."""
        if assignment.sealed is None:
            return []
        try:
            manifest = described(assignment.sealed.manifest).manifest
        except InvalidArgumentError as error:
            return [Refusal("data_signers", error.message[:4096])]
        return data_refusals(self._policy, manifest.name, manifest.signer)

    def _too_much(self, assignment: Assignment) -> list[Refusal]:
        """Whether the update that the work is for could bring the job above what may leave the site.

        Work that was let through once stays so: what it sends is counted before it is sent.
        """
        if self._policy.max_bytes_out is None or not isinstance(assignment.work, Train | Initialise):
            return []
        if assignment.assignment_id in self._admitted:
            return []
        if too_much := self._above_limit(self._outgoing.spent(assignment.job_id), update_bytes(assignment.spec)):
            return too_much
        self._admitted[assignment.assignment_id] = None
        while len(self._admitted) > _MAX_ADMITTED:
            del self._admitted[next(iter(self._admitted))]
        return []

    def _above_limit(self, spent: int, due: int) -> list[Refusal]:
        limit = self._policy.max_bytes_out
        if limit is None or spent + due <= limit:
            return []
        message = f"{spent} bytes have left for this job, its next update may take {due}; allowed: {limit} in all"
        return [Refusal("max_bytes_out", message)]


def _layers(model: ModelSpec) -> str:
    return f"{model.kind} {'-'.join(map(str, model.widths))}"


@lru_cache(maxsize=64)
def _opened(signed_job: str) -> tuple[Envelope, JobStatement, bytes]:
    """An envelope comes again with each assignment of its job: it is read once."""
    envelope = Envelope.from_json(signed_job, "signed_job")
    statement = statement_of(envelope)
    return envelope, statement, spec_bytes(statement.job)


def _differences(signed: Mapping[str, object], given: Mapping[str, object], path: str = "") -> list[str]:
    """Keys that differ, with both values."""
    found = []
    for key in sorted({*signed, *given}):
        one, other = signed.get(key), given.get(key)
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            found += _differences(one, other, f"{path}{key}.")
        elif one != other:
            found.append(f"{path}{key} is {other!r:.80}, signed {one!r:.80}")
    return found
