"""A site's own rules for jobs: the file they stand in, and which of them a job breaks. Its worker checks them.

Rules are told apart by their keys in the file; a refusal names the key, what the job has, and what is allowed.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, ClassVar, Self

from pydantic import ConfigDict, Field, StrictBool, StrictInt, StrictStr, ValidationError, model_validator

from cortex_common.errors import InvalidArgumentError, NotFoundError
from cortex_common.job.parse import violations_of
from cortex_common.job.quantities import SizeBytes
from cortex_common.job.spec import Count, JobSpec, Positive, Section

BUILT_IN_KINDS = frozenset({"mlp"})
_FLOAT_BYTES = 4
_OVERHEAD_SHARE = 1.05
_OVERHEAD_BYTES = 65_536
Text = Annotated[StrictStr, Field(min_length=1)]


@dataclass(frozen=True, slots=True)
class Refusal:
    """A rule that a job breaks: its key in the policy, and what is given against what is allowed."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")
    rule: Annotated[str, Field(min_length=1, max_length=100)]
    message: Annotated[str, Field(max_length=4096)]

    def __str__(self) -> str:
        return f"{self.rule}: {self.message}"


class Signer(Section):
    """Somebody whose jobs the site runs: the public key as `cortex sign --new-key` printed it."""

    name: Text
    key: Annotated[StrictStr, Field(pattern=r"^ed25519:[A-Za-z0-9+/]{43}=$")]
    orgs: tuple[Text, ...] = ()


class DataSigner(Section):
    """Somebody whose sealed data the site opens."""

    name: Text
    key: Annotated[StrictStr, Field(pattern=r"^ed25519:[A-Za-z0-9+/]{43}=$")]


class PrivacyLimit(Section):
    """The weakest differential privacy to accept."""

    max_epsilon: Positive
    max_delta: Annotated[float, Field(gt=0, lt=1)] = 1e-5


class SitePolicy(Section):
    """The rules of `site-policy.toml`. A rule that is not given does not limit, but for custom code.

    Attributes:
        allowed_signers: A job must be signed by `signatures` of them; none: it need not be signed.
        signatures: How many must have signed.
        allowed_orgs: Organisations a job may be signed for.
        allowed_datasets: Those that jobs may read; a sealed one by its whole reference.
        allowed_init_from: Files a job may start from, as it names them: they are read here and sent out.
        data_signers: Sealed data must be signed by one of them; none: by whoever it says.
        custom_code: Whether jobs may bring networks that are not built into Cortex.
        min_group: Fewest updates that a sum may be made of.
        max_rounds: Of a job.
        max_local_epochs, max_local_steps, max_local_seconds: Of training in a round; without one of the others given
            beside it, a job must say its amount in the unit that is limited.
        max_bytes_out: Of updates that leave the site for a job.
        require_secure_aggregation: Nobody else may see the site's update.
        require_differential_privacy: With at most this loss.
    """

    allowed_signers: tuple[Signer, ...] = ()
    signatures: Count = 1
    allowed_orgs: tuple[Text, ...] = ()
    allowed_datasets: tuple[Text, ...] | None = None
    allowed_init_from: tuple[Text, ...] | None = None
    data_signers: tuple[DataSigner, ...] = ()
    custom_code: StrictBool = False
    min_group: Count | None = None
    max_rounds: Count | None = None
    max_local_epochs: Positive | None = None
    max_local_steps: Annotated[StrictInt, Field(ge=0)] | None = None
    max_local_seconds: Positive | None = None
    max_bytes_out: SizeBytes | None = None
    require_secure_aggregation: StrictBool = False
    require_differential_privacy: PrivacyLimit | None = None

    @model_validator(mode="after")
    def _signers_fit(self) -> Self:
        keys = [signer.key for signer in self.allowed_signers]
        if len(set(keys)) < len(keys):
            raise ValueError("allowed_signers: a key is given twice; allowed: each once")
        if keys and self.signatures > len(keys):
            raise ValueError(f"signatures: {self.signatures} given; allowed: 1 to the number of signers ({len(keys)})")
        if self.allowed_orgs and not keys:
            raise ValueError("allowed_orgs: given without allowed_signers: a job that nobody has signed can name any")
        return self

    @staticmethod
    def text_of(path: Path) -> str:
        """The text of a policy file.

        Raises:
            NotFoundError: it cannot be read.
            InvalidArgumentError: it is empty, as while somebody writes it: that is not to mean that all is allowed.
        """
        try:
            text = path.read_bytes().decode()
        except (OSError, UnicodeDecodeError) as error:
            raise NotFoundError(f"site policy {path} cannot be read: {error}") from None
        if not text.strip():
            raise InvalidArgumentError(
                f"site policy {path} is empty; allowed: rules, or a comment that says there are none"
            )
        return text

    @classmethod
    def read(cls, path: Path) -> SitePolicy:
        """Read a policy file.

        Raises:
            NotFoundError: it cannot be read.
            InvalidArgumentError: it is not TOML, or lists every mistake in it.
        """
        return cls.parse(cls.text_of(path), f"site policy {path}")

    @classmethod
    def parse(cls, text: str, subject: str) -> SitePolicy:
        """Read the text of a policy file.

        Raises:
            InvalidArgumentError: it is not TOML, or lists every mistake in it.
        """
        try:
            return cls.model_validate(tomllib.loads(text))
        except tomllib.TOMLDecodeError as error:
            raise InvalidArgumentError(f"{subject} is not TOML: {error}") from None
        except ValidationError as error:
            raise InvalidArgumentError.of(subject, violations_of(error, cls)) from None


def refusals(policy: SitePolicy, spec: JobSpec, seats: int) -> list[Refusal]:
    """Every rule that the job breaks, but those about signatures and about what was sent before.

    Args:
        policy: The site's.
        spec: The job.
        seats: As many as the job has by what this site is told; a sum has no more parts.
    """
    found = [*_size_refusals(policy, spec, seats), *_training_refusals(policy, spec), *_privacy_refusals(policy, spec)]
    if not policy.custom_code and str(spec.model.kind) not in BUILT_IN_KINDS:
        allowed = ", ".join(sorted(BUILT_IN_KINDS))
        found.append(Refusal("custom_code", f"model.kind {spec.model.kind!r} is code of its own; allowed: {allowed}"))
    if policy.allowed_datasets is not None:
        names = [name for name in (spec.data.train, spec.data.test) if name and name not in policy.allowed_datasets]
        if names:
            allowed = ", ".join(policy.allowed_datasets) or "none"
            found.append(Refusal("allowed_datasets", f"{' and '.join(names)} wanted; allowed: {allowed}"))
    source, files = spec.model.init_from, policy.allowed_init_from
    if files is not None and source is not None and source not in files:
        allowed = ", ".join(files) or "none"
        found.append(Refusal("allowed_init_from", f"model.init_from {source} wanted; allowed: {allowed}"))
    return found


def signature_refusals(
    policy: SitePolicy, signers: Sequence[Signer], organisation: str, *, is_signed: bool
) -> list[Refusal]:
    """What is missing of the signatures a job needs here.

    Args:
        policy: The site's.
        signers: Those of the policy's that have signed the job.
        organisation: That it is signed for.
        is_signed: Whether it came in an envelope at all.
    """
    if not policy.allowed_signers:
        return []
    found = []
    known = ", ".join(signer.name for signer in policy.allowed_signers)
    if not is_signed:
        return [Refusal("allowed_signers", f"the job is not signed; allowed: signed by {policy.signatures} of {known}")]
    entitled = [signer.name for signer in signers if not signer.orgs or organisation in signer.orgs]
    if len(entitled) < policy.signatures:
        who = ", ".join(entitled) or "nobody known here"
        found.append(
            Refusal(
                "allowed_signers",
                f"signed for {organisation} by {who}; allowed: {policy.signatures} of {known}, each for its orgs",
            )
        )
    if policy.allowed_orgs and organisation not in policy.allowed_orgs:
        allowed = ", ".join(policy.allowed_orgs)
        found.append(Refusal("allowed_orgs", f"signed for {organisation}; allowed: {allowed}"))
    return found


def data_refusals(policy: SitePolicy, name: str, signer: str) -> list[Refusal]:
    """Whether the sealed data of this name may be opened here; `signer` is the public key of who has signed them."""
    known = policy.data_signers
    if not known or any(each.key == signer for each in known):
        return []
    allowed = ", ".join(each.name for each in known)
    return [Refusal("data_signers", f"data set {name} is signed by {signer}; allowed: signed by {allowed}")]


def update_bytes(spec: JobSpec) -> int:
    """No update of the job is larger, whatever its codec."""
    parameters = sum(inputs * outputs + outputs for inputs, outputs in pairwise(spec.model.widths))
    return int(parameters * _FLOAT_BYTES * _OVERHEAD_SHARE) + _OVERHEAD_BYTES


def _size_refusals(policy: SitePolicy, spec: JobSpec, seats: int) -> Iterator[Refusal]:
    if policy.min_group is not None:
        least = min(spec.placement.least, seats)
        parts = max(1, math.ceil(spec.aggregation.quorum * least - 1e-9))
        if parts < policy.min_group:
            yield Refusal(
                "min_group",
                f"a round may be made of {parts} updates (placement.min_workers {spec.placement.least}, "
                f"aggregation.quorum {spec.aggregation.quorum:g}, {seats} seats); allowed: {policy.min_group} or more",
            )
    if policy.max_rounds is not None and spec.training.rounds > policy.max_rounds:
        yield Refusal(
            "max_rounds", f"training.rounds {spec.training.rounds} wanted; allowed: up to {policy.max_rounds}"
        )


def _training_refusals(policy: SitePolicy, spec: JobSpec) -> Iterator[Refusal]:
    """The one amount that a job gives must be within the limit of its unit; a limit on other units only forbids it."""
    training = spec.training
    amounts = {
        "local_epochs": (training.epochs, policy.max_local_epochs),
        "local_steps": (training.local_steps, policy.max_local_steps),
        "local_seconds": (training.local_seconds, policy.max_local_seconds),
    }
    limits = {unit: limit for unit, (_, limit) in amounts.items() if limit is not None}
    if not limits:
        return
    unit, given = next((unit, amount) for unit, (amount, _) in amounts.items() if amount is not None)
    limit = limits.get(unit)
    if limit is not None and given is not None and given <= limit:
        return
    allowed = " or ".join(f"training.{unit} up to {limit:g}" for unit, limit in limits.items())
    yield Refusal(
        f"max_{unit if unit in limits else next(iter(limits))}", f"{unit} {given:g} wanted; allowed: {allowed}"
    )


def _privacy_refusals(policy: SitePolicy, spec: JobSpec) -> Iterator[Refusal]:
    if policy.require_secure_aggregation and not spec.privacy.secure_aggregation.enabled:
        yield Refusal(
            "require_secure_aggregation",
            "the job has none; allowed: jobs with privacy.secure_aggregation",
        )
    limit, given = policy.require_differential_privacy, spec.privacy.differential_privacy
    if limit is None:
        return
    allowed = f"epsilon up to {limit.max_epsilon:g} at delta up to {limit.max_delta:g}"
    if not given.enabled:
        yield Refusal("require_differential_privacy", f"the job has none; allowed: {allowed}")
    elif given.epsilon_budget is None or given.epsilon_budget > limit.max_epsilon or given.delta > limit.max_delta:
        budget = "no limit" if given.epsilon_budget is None else f"{given.epsilon_budget:g}"
        yield Refusal("require_differential_privacy", f"epsilon {budget} at delta {given.delta:g}; allowed: {allowed}")
