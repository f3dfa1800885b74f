"""The job file: every key, its default, and what is allowed. The only place that knows defaults."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    StrictInt,
    StrictStr,
    ValidationError,
    ValidationInfo,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

from cortex_common.errors import Violation
from cortex_common.job.codec_options import CODEC_OPTIONS, CodecName, codec_violations
from cortex_common.job.quantities import DURATION, LONGEST_S, NUMBER, Seconds, SizeBytes
from cortex_common.job.strategies import StrategyName, option_violations

_WARM_UP_DENSITY = 0.25
Scalar = bool | int | float | str | None
Options = dict[str, Scalar | list[Scalar]]


def _lower(value: object) -> object:
    return value.lower() if isinstance(value, str) else value


def _truth(value: object) -> object:
    # Left alone, 0 would be false.
    if not isinstance(value, bool):
        raise ValueError("allowed: False")
    return value


def _switch(value: object) -> object:
    # YAML reads a bare on or off as true or false.
    return ("off", "on")[value] if isinstance(value, bool) else value


def _device(value: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", value):
        raise ValueError("allowed: auto, cpu, cuda or cuda:N")
    return value


def _file_to_start_from(value: str) -> str:
    if not value.endswith(".safetensors"):
        raise ValueError("allowed: a .safetensors file on the workers (starting from another job is not there yet)")
    return value


Count = Annotated[StrictInt, Field(ge=1, le=1_000_000_000)]
Seed = Annotated[StrictInt, Field(ge=0, lt=2**63)]
Dimension = Annotated[StrictInt, Field(ge=1, le=10_000_000)]
Finite = Annotated[float, Field(allow_inf_nan=False), NUMBER]
Dropout = Annotated[float, Field(ge=0, lt=1), NUMBER]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False), NUMBER]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False), NUMBER]
# torch.optim without the two that need a closure or sparse gradients; listed because validation runs without torch.
OptimizerName = Annotated[
    Literal[
        "adadelta", "adafactor", "adagrad", "adam", "adamax", "adamw",
        "asgd", "nadam", "radam", "rmsprop", "rprop", "sgd",
    ],
    BeforeValidator(_lower),
]  # fmt: skip


Disabled = Annotated[Literal[False], BeforeValidator(_truth)]
Switch = Literal["auto", "on", "off"]
DeviceName = Annotated[StrictStr, AfterValidator(_device)]


class Section(BaseModel):
    """Part of a job file: immutable, unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=False)


class ModelSpec(Section):
    """The network to train."""

    kind: Literal["mlp"] = "mlp"
    input_dim: Dimension
    hidden_dims: Annotated[tuple[Dimension, ...], Field(max_length=1000)] = ()
    output_dim: Dimension
    dropout: Dropout = 0.0
    init_from: Annotated[StrictStr, AfterValidator(_file_to_start_from)] | None = None
    freeze: tuple[StrictStr, ...] = ()

    @property
    def widths(self) -> tuple[int, ...]:
        """Of its layers, from the inputs to the outputs."""
        return (self.input_dim, *self.hidden_dims, self.output_dim)


class PartitionSpec(Section):
    """How training examples are dealt to the seats of the cohort."""

    scheme: Literal["iid", "dirichlet", "shards", "local"] = "iid"
    seed: Seed = 0
    alpha: Positive | None = None
    per_worker: Count | None = None

    @model_validator(mode="after")
    def _arguments_fit_the_scheme(self) -> Self:
        if self.alpha is not None and self.scheme != "dirichlet":
            raise ValueError(f"alpha: {self.alpha} given; allowed only with scheme: dirichlet")
        if self.per_worker is not None and self.scheme != "shards":
            raise ValueError(f"per_worker: {self.per_worker} given; allowed only with scheme: shards")
        return self


_SEALED = re.compile(r"sealed:[a-z0-9]([a-z0-9._-]{0,61}[a-z0-9])?@(?P<digest>[0-9a-f]{64})")


class DataSpec(Section):
    """What is trained on and evaluated with, by name in each node's catalogue.

    Training data may be sealed: then `train` is sealed:<name>@<digest of its manifest>, and its shards are dealt.
    """

    train: Annotated[StrictStr, Field(min_length=1)]
    test: StrictStr | None = None
    partition: PartitionSpec = PartitionSpec()

    @property
    def sealed_digest(self) -> str | None:
        """Digest of the manifest of the sealed data set to train on; None for one of the nodes' own."""
        found = _SEALED.fullmatch(self.train)
        return found["digest"] if found else None

    @model_validator(mode="after")
    def _sealed_fits(self) -> Self:
        if self.test is not None and self.test.startswith("sealed:"):
            raise ValueError(
                f"test: {self.test[:80]!r} given; allowed: a data set of the nodes; only train may be sealed"
            )
        if not self.train.startswith("sealed:"):
            return self
        if self.sealed_digest is None:
            raise ValueError(
                f"train: {self.train[:160]!r} given; allowed: sealed:<name>@<digest>, as `cortex data seal` says"
            )
        if self.partition != PartitionSpec():
            raise ValueError("partition: given; a sealed data set is dealt by its shards, allowed: nothing")
        return self


class EarlyStoppingSpec(Section):
    """Ends the job when the metric stops getting better, or has reached the target."""

    metric: Literal["test_accuracy", "test_loss", "train_loss", "train_accuracy"] = "test_accuracy"
    patience: Count = 3
    min_delta: NonNegative = 0.0
    target: Finite | None = None


class CheckpointSpec(Section):
    """Which model versions stay: every n-th, the newest `keep` of them."""

    every: Count = 1
    keep: Count = 3


class TrainingSpec(Section):
    """Local training of one round, and how many rounds."""

    optimizer: OptimizerName = "adam"
    learning_rate: Positive = 0.001
    weight_decay: NonNegative = 0.0
    optimizer_options: Options = {}
    batch_size: Count = 32
    local_epochs: Positive | None = None
    local_steps: Annotated[StrictInt, Field(ge=0)] | None = None
    local_seconds: Positive | None = None
    rounds: Count = 5
    early_stopping: EarlyStoppingSpec | None = None
    checkpoint: CheckpointSpec = CheckpointSpec()
    device: DeviceName = "auto"
    precision: Literal["fp32", "bf16"] = "fp32"
    seed: Seed = 0

    @model_validator(mode="after")
    def _one_amount_of_local_work(self) -> Self:
        given = [key for key in ("local_epochs", "local_steps", "local_seconds") if getattr(self, key) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} given; allowed: one of local_epochs, local_steps, local_seconds")
        return self

    @property
    def epochs(self) -> float | None:
        """Local epochs a round, None when the amount is given in steps or seconds; one when nothing is given."""
        if self.local_steps is None and self.local_seconds is None:
            return self.local_epochs or 1.0
        return None


def _options_of_the_strategy(options: Options, info: ValidationInfo) -> Options:
    strategy = info.data.get("strategy")
    return _without(option_violations(strategy, options) if strategy else [], options)


def _options_of_the_codec(options: Options, info: ValidationInfo) -> Options:
    codec = info.data.get("codec")
    return _without(codec_violations(codec, options) if codec else [], options)


def _without(violations: Sequence[Violation], options: Options) -> Options:
    """The options, if there are no violations; each becomes an error of its own."""
    if violations:
        raise ValidationError.from_exception_data(
            "options",
            [
                InitErrorDetails(
                    type=PydanticCustomError("value_error", "{message}", {"message": violation.message}),
                    loc=(violation.path,),
                    input=options[violation.path],
                )
                for violation in violations
            ],
        )
    return options


class AggregationSpec(Section):
    """How the updates of a round become the next version.

    `options` of each strategy, with their defaults; learning rates and tau are above 0, the others from 0 to below 1:
        fedavg: server_learning_rate 1.
        fedavgm: server_learning_rate 1, momentum 0.9.
        diloco: server_learning_rate 0.7, momentum 0.9 (Nesterov). These suit 100 local steps and more; below 30 lower
            the learning rate, about to 1 - momentum.
        fedadam, fedyogi: server_learning_rate 0.1, beta1 0.9, beta2 0.99, tau 0.001.
        fedadagrad: server_learning_rate 0.1, beta1 0.9, tau 0.001.
    """

    strategy: StrategyName = "fedavg"
    options: Annotated[Options, AfterValidator(_options_of_the_strategy)] = {}
    topology: Literal["flat", "regional"] = "flat"
    quorum: Annotated[float, Field(gt=0, le=1), NUMBER] = 1.0
    deadline: Annotated[float, Field(gt=0, le=LONGEST_S), DURATION] = 300.0
    grace: Seconds = 5.0


class DownloadSpec(Section):
    """How a new version travels to workers that hold the one before it.

    With a codec other than none it travels as a delta in this codec (`options` as for updates) and is what that delta
    gives; what the codec leaves out goes into the next one. Every `resync_every` rounds, and in the last, the version
    is exact instead, and travels whole.
    """

    codec: CodecName = "none"
    options: Annotated[Options, AfterValidator(_options_of_the_codec)] = {}
    resync_every: Count = 50


class CompressionSpec(Section):
    """How updates travel, and with `download` how versions do.

    In the first `warm_up_rounds` the density of topk falls from a quarter to its own, by the same factor each round.

    `options` of each codec, with their defaults:
        none, bf16: no options.
        int8: block 256, stochastic false.
        int4: block 128, stochastic false.
        topk: density 0.01, values int8, stochastic false.
    """

    codec: CodecName = "none"
    options: Annotated[Options, AfterValidator(_options_of_the_codec)] = {}
    error_feedback: StrictBool | None = None
    lz4: Annotated[Switch, BeforeValidator(_switch, json_schema_input_type=Switch | bool)] = "auto"
    warm_up_rounds: Annotated[StrictInt, Field(ge=0, le=1000)] = 0
    download: DownloadSpec = DownloadSpec()

    @model_validator(mode="after")
    def _only_topk_warms_up(self) -> Self:
        if self.warm_up_rounds and self.codec != "topk":
            raise ValueError(f"warm_up_rounds: {self.warm_up_rounds} given; allowed only with codec: topk")
        return self

    def warm_up_density(self, share: float) -> float:
        """Of top-k, from a quarter down to the codec's own: the same factor from each round to the next.

        Source: Deep Gradient Compression, Lin et al., arXiv 1712.01887, section 3.3.
        """
        density = float(str(self.options.get("density", CODEC_OPTIONS["topk"]["density"].default)))
        first = max(density, _WARM_UP_DENSITY)
        return float(f"{first * (density / first) ** share:.4g}")

    @property
    def feeds_back(self) -> bool:
        """Whether workers carry on what quantisation leaves out; always with a lossy codec unless switched off."""
        return self.codec != "none" and self.error_feedback is not False


class SecureAggregationSpec(Section):
    """Sums without anybody seeing a single update."""

    enabled: Disabled = False
    threshold: Literal["auto"] | Count = "auto"
    ring_bits: Literal["auto", 8, 16, 32] = "auto"
    mode: Literal["active", "semi-honest"] = "active"


class DifferentialPrivacySpec(Section):
    """Noise with an accounted budget."""

    enabled: Disabled = False
    unit: Literal["client", "example"] = "client"
    clip_norm: Positive = 1.0
    noise_multiplier: Positive = 1.0
    delta: Annotated[float, Field(gt=0, lt=1), NUMBER] = 1.0e-5
    epsilon_budget: Positive | None = None


class PrivacySpec(Section):
    """What may be learnt from the updates."""

    secure_aggregation: SecureAggregationSpec = SecureAggregationSpec()
    differential_privacy: DifferentialPrivacySpec = DifferentialPrivacySpec()


class PlacementSpec(Section):
    """Which and how many workers."""

    workers: Annotated[StrictInt, Field(ge=1, le=10_000)] = 4
    min_workers: Annotated[StrictInt, Field(ge=1, le=10_000)] | None = None
    regions: tuple[StrictStr, ...] = ()
    require_gpu: StrictBool = False
    min_memory: SizeBytes = 0

    @model_validator(mode="after")
    def _minimum_within_number(self) -> Self:
        if self.min_workers is not None and self.min_workers > self.workers:
            raise ValueError(f"min_workers: {self.min_workers} given; allowed: at most workers ({self.workers})")
        return self

    @property
    def least(self) -> int:
        """Fewest workers a round may start with; all of them unless said otherwise."""
        return self.min_workers if self.min_workers is not None else self.workers


class JobSpec(Section):
    """A whole job file."""

    name: Annotated[StrictStr, Field(min_length=1, max_length=100)] = "job"
    model: ModelSpec
    data: DataSpec
    training: TrainingSpec = TrainingSpec()
    aggregation: AggregationSpec = AggregationSpec()
    compression: CompressionSpec = CompressionSpec()
    privacy: PrivacySpec = PrivacySpec()
    placement: PlacementSpec = PlacementSpec()

    def upload_of(self, round_number: int) -> tuple[CodecName, Options]:
        """Codec and options in which the updates of a round travel; round 0's is the first version as it is."""
        compression = self.compression
        if round_number == 0:
            return "none", {}
        if compression.codec == "topk" and round_number <= compression.warm_up_rounds:
            share = (round_number - 1) / compression.warm_up_rounds
            return "topk", {**compression.options, "density": compression.warm_up_density(share)}
        return compression.codec, compression.options

    def download_of(self, round_number: int) -> tuple[CodecName, Options]:
        """Codec and options of the delta as which the version of a round travels; none: it is exact, and goes whole."""
        download = self.compression.download
        is_exact = round_number % download.resync_every == 0 or round_number >= self.training.rounds
        return ("none", {}) if is_exact else (download.codec, download.options)

    @model_validator(mode="after")
    def _stopping_metric_is_measured(self) -> Self:
        stopping = self.training.early_stopping
        if stopping and stopping.metric.startswith("test_") and self.data.test is None:
            raise ValueError(
                f"training.early_stopping.metric: {stopping.metric!r} given; without data.test allowed: "
                "'train_loss' or 'train_accuracy'"
            )
        return self
