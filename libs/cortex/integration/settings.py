"""The file `config.yaml` of a `CortexManager`: every key, its default, and what is allowed.

The table in docs/manager.md is made from these classes (`python -m cortex.integration.reference`).
"""

from __future__ import annotations

import binascii
import hashlib
import math
import re
from base64 import b64decode
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, ClassVar, Literal
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    StrictStr,
    ValidationInfo,
    field_validator,
)

from cortex_common.errors import InvalidArgumentError
from cortex_common.identity import REGION, Identity, Role
from cortex_common.ids import NodeName
from cortex_common.job.quantities import NUMBER
from cortex_common.job.spec import (
    DeviceName,
    Dropout,
    EarlyStoppingSpec,
    Finite,
    ModelSpec,
    NonNegative,
    OptimizerName,
    Options,
    Positive,
)
from cortex_common.security.node_tokens import NodeToken
from cortex_common.settings import FileSettings, load_settings

KEY_BYTES = 32
_LONGEST_NAME = 100
_NOT_A_KEY = "a secret (not shown) given; allowed: 32 bytes as base64, or null to have one generated"


def _no_boolean(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError("allowed: a whole number")
    return value


# Not the strict types of the job file: variables of the environment are text. Left alone, true would be 1.
WHOLE = BeforeValidator(_no_boolean)
Count = Annotated[int, Field(ge=1, le=1_000_000_000), WHOLE]
Dimension = Annotated[int, Field(ge=1, le=10_000_000), WHOLE]


def _websocket_url(value: str) -> str:
    scheme, separator, rest = value.partition("://")
    if scheme not in ("ws", "wss") or not separator or not rest.strip("/"):
        raise ValueError("allowed: ws://host:port or wss://host:port")
    try:
        urlsplit(value).port  # noqa: B018 - reading it checks it
    except ValueError:
        raise ValueError("allowed: ws://host:port or wss://host:port, the port a number up to 65535") from None
    return value


def _region(value: str) -> str:
    if REGION.fullmatch(value) is None:
        raise ValueError("allowed: 1 to 63 of A-Z a-z 0-9 . _ and -, a letter or digit first and last")
    return value


def _token(value: SecretStr) -> SecretStr:
    try:
        NodeToken.decode(value.get_secret_value())
    except InvalidArgumentError:
        raise ValueError("a secret (not shown) given; allowed: what `cortex node token --gateway` printed") from None
    return value


def _node_id(value: str) -> str:
    try:
        Identity("cortex", Role.WORKER, NodeName(value))
    except InvalidArgumentError as error:
        raise ValueError(f"allowed{error.message.partition(': allowed')[2].replace(' are', ':', 1)}") from None
    return value


def _key(value: SecretStr) -> SecretStr:
    try:
        size = len(b64decode(value.get_secret_value(), validate=True))
    except (binascii.Error, ValueError):
        raise ValueError(_NOT_A_KEY) from None
    if size != KEY_BYTES:
        raise ValueError(f"{_NOT_A_KEY}; these are {size} bytes")
    return value


def _from_home(value: Path) -> Path:
    try:
        return value.expanduser()
    except RuntimeError:
        raise ValueError("allowed: a path; nobody of that name has a home here") from None


OwnFile = Annotated[Path, AfterValidator(_from_home)]


class Section(BaseModel):
    """A section of the file: immutable, unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=False)


class NetworkSection(Section):
    """Which network to join, and as whom."""

    websocket_url: Annotated[StrictStr, AfterValidator(_websocket_url)] = Field(
        "ws://localhost:8765", description="Where the network's gateway takes WebSocket nodes."
    )
    node_id: Annotated[StrictStr, AfterValidator(_node_id)] = Field(description="Name of this node in the network.")
    region: Annotated[StrictStr, AfterValidator(_region)] = Field(
        "local", description="Region this node counts to: it exchanges weights with the aggregator there."
    )
    retry_attempts: Annotated[int, Field(ge=1, le=10_000), WHOLE] = Field(
        3, description="How often to try to connect before giving up; also after a connection was lost."
    )
    connection_timeout: Annotated[float, Field(gt=0, le=3600), NUMBER] = Field(
        30.0, description="Seconds each attempt may take until the network has welcomed this node."
    )
    token: Annotated[SecretStr, AfterValidator(_token)] | None = Field(
        None, description="Node token (`cortex node token --gateway`). If null: looked for, see above."
    )
    token_file: OwnFile | None = Field(None, description="File with the node token, instead of `token`.")
    ca: OwnFile | None = Field(
        None, description="PEM file of the authority behind a wss:// address; the system's ones if null."
    )


class EarlyStoppingSection(Section):
    """Ends the training when the metric stops getting better, or has reached the target."""

    metric: Literal["train_loss", "train_accuracy"] = Field("train_loss", description="What must get better.")
    patience: Count = Field(3, description="Rounds without improvement that are borne.")
    min_delta: NonNegative = Field(0.0, description="Smaller changes are no improvement.")
    target: Finite | None = Field(None, description="Ends the training as soon as the metric has reached it.")


class TrainingSection(Section):
    """The network to train, and how. A running job with the same layers is joined; else one is submitted."""

    input_dim: Dimension = Field(description="Values of one input; inputs are flattened.")
    hidden_dims: Annotated[tuple[Dimension, ...], Field(max_length=1000)] = Field(
        (), description="Widths of the hidden layers."
    )
    output_dim: Dimension = Field(description="Classes.")
    dropout_rate: Dropout = Field(0.0, description="Dropout between hidden layers.")
    batch_size: Count = Field(
        32,
        description="Of workers in the same job; this node takes the DataLoader's batches, and the log warns where "
        "they have another size.",
    )
    learning_rate: Positive = Field(0.001, description="Of the optimizer.")
    optimizer: OptimizerName = Field("adam", description="A torch.optim name.")
    optimizer_options: Options = Field({}, description="Further arguments of the optimizer, such as `momentum`.")
    weight_decay: NonNegative = Field(0.0, description="Of the optimizer, where it has one.")
    max_epochs: Annotated[int, Field(ge=1, le=1_000_000), WHOLE] = Field(
        100, description="Passes over the DataLoader, in rounds of `epochs_per_round`."
    )
    epochs_per_round: Annotated[int, Field(ge=1, le=1_000_000), WHOLE] = Field(
        1, description="Passes between two exchanges of weights."
    )
    early_stopping: EarlyStoppingSection | None = Field(None, description="Ends the training before `max_epochs`.")
    nodes: Count = Field(1, description="How many nodes a job submitted by this program has places for.")
    min_nodes: Count = Field(1, description="How many of them it needs to begin and go on.")
    dataset: Annotated[StrictStr, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")] | None = Field(
        None,
        description="Name under which this node's data is known: jobs over it train here. If null, it says what the "
        "model is, so that nodes with the same model meet: `own-784-512-256-10`.",
    )
    init_from: OwnFile | None = Field(
        None, description="A .safetensors file to start from (fine-tuning), when this program submits the job."
    )
    checkpoint_dir: Path | None = Field(
        None, description="Where the rounds' models are written (`<job>-<round>.safetensors`); nowhere if null."
    )
    checkpoint_keep: Count = Field(3, description="How many of these files stay, the newest.")
    device: DeviceName = Field("auto", description="auto, cpu, cuda or cuda:N.")
    precision: Literal["fp32", "bf16"] = Field("fp32", description="fp32 or bf16 (autocast).")
    seed: Annotated[int, Field(ge=0, lt=2**63), WHOLE] = Field(
        0, description="Of the initial weights, dropout and rounding."
    )

    @field_validator("min_nodes")
    @classmethod
    def _has_places(cls, value: int, info: ValidationInfo) -> int:
        places = info.data.get("nodes", value)
        if value > places:
            raise ValueError(f"allowed: up to training.nodes, which is {places}")
        return value

    @property
    def rounds(self) -> int:
        """Rounds that make `max_epochs`."""
        return math.ceil(self.max_epochs / self.epochs_per_round)

    @property
    def dataset_name(self) -> str:
        """Under which this node's data is known."""
        if self.dataset:
            return self.dataset
        name = "-".join(["own", *map(str, self.model.widths)])
        return name if len(name) <= _LONGEST_NAME else f"own-{hashlib.sha256(name.encode()).hexdigest()[:32]}"

    @property
    def model(self) -> ModelSpec:
        """The network."""
        return ModelSpec(
            input_dim=self.input_dim,
            hidden_dims=self.hidden_dims,
            output_dim=self.output_dim,
            dropout=self.dropout_rate,
        )

    @property
    def stopping(self) -> EarlyStoppingSpec | None:
        """When to end before the last round."""
        return None if self.early_stopping is None else EarlyStoppingSpec(**self.early_stopping.model_dump())


class SecuritySection(Section):
    """Encryption of everything that leaves this node, and what this site takes part in."""

    enable_encryption: bool = Field(
        True, description="False is refused: networks of this version take sealed updates only, see above."
    )
    encryption_key: Annotated[SecretStr, AfterValidator(_key)] | None = Field(
        None,
        description="This node's private sealing key (X25519, 32 bytes as base64). If null, one is generated at the "
        "first start, stored with mode 0600 in `<state_dir>/sealing.key`, and the log says where.",
    )
    site_policy: Path | None = Field(
        None,
        description="This site's rules for jobs, a site-policy.toml ([signed-jobs.md](signed-jobs.md)): what breaks "
        "them is neither submitted nor run, see above. Read again when it changes; no rules if null.",
    )


class MonitoringSection(Section):
    """What this program tells about its training."""

    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field("INFO", description="Of this program's log.")
    enable_prometheus: bool = Field(True, description="Serve metrics for Prometheus.")
    metrics_port: Annotated[int, Field(ge=0, le=65535), WHOLE] = Field(
        9090,
        description="Where, on 127.0.0.1; 0 takes any free port. If it is taken, a free one is, and the log says so.",
    )
    tensorboard_dir: Path | None = Field(
        None, description="Where TensorBoard scalars go, a folder a job; nowhere if null."
    )
    progress_bar: bool | None = Field(None, description="Show one; if null, only on a terminal or in a notebook.")


class ManagerSettings(FileSettings):
    """The whole file."""

    # A person's shell may hold those of a service or of the command: no section, no `__`.
    OTHERS_VARIABLES: ClassVar[re.Pattern[str]] = re.compile(r"CORTEX(_[A-Z0-9]+)+")

    network: NetworkSection
    training: TrainingSection
    security: SecuritySection = Field(SecuritySection())
    monitoring: MonitoringSection = Field(MonitoringSection())
    state_dir: Path = Field(
        Path(".cortex-node"),
        description="What this node keeps across starts (key, updates that were not acknowledged), a folder a node_id.",
    )

    @property
    def node_dir(self) -> Path:
        """This node's own folder."""
        return self.state_dir.expanduser().absolute() / self.network.node_id


def load_manager_settings(config: Path, environment: Mapping[str, str] | None = None) -> ManagerSettings:
    """Read a config.yaml; `CORTEX_<SECTION>__<KEY>` variables win over it.

    Raises:
        NotFoundError: the file cannot be read.
        InvalidArgumentError: every mistake of file and environment at once.
    """
    return load_settings(ManagerSettings, config, "CortexManager", environment)
