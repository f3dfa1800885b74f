"""config.yaml of a CortexManager: the contract's file, mistakes, the environment, and the documented table."""

from __future__ import annotations

from base64 import b64encode
from pathlib import Path

import pytest

from cortex.integration.joining import job_of
from cortex.integration.reference import table, with_table
from cortex.integration.settings import ManagerSettings, load_manager_settings
from cortex_common.errors import InvalidArgumentError, NotFoundError
from cortex_common.security.node_tokens import NodeToken
from tests.architecture.sources import ROOT

TOKEN = NodeToken.fresh().encode()
CONTRACT = """\
network:
  websocket_url: "ws://localhost:8765"
  node_id: "local_node_1"
  retry_attempts: 3
  connection_timeout: 30
training:
  input_dim: 784
  hidden_dims: [512, 256]
  output_dim: 10
  batch_size: 32
  learning_rate: 0.001
  max_epochs: 100
security:
  enable_encryption: true
  encryption_key: null  # Auto-generated if not provided
monitoring:
  log_level: "INFO"
  metrics_port: 9090
  enable_prometheus: true
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(CONTRACT)
    return path


def loaded(config: Path, **environment: str) -> ManagerSettings:
    return load_manager_settings(config, environment)


def test_the_contracts_file_is_understood_key_by_key(config: Path) -> None:
    settings = loaded(config)
    assert settings.network.websocket_url == "ws://localhost:8765"
    assert (settings.network.node_id, settings.network.retry_attempts) == ("local_node_1", 3)
    assert settings.network.connection_timeout == 30.0
    model = settings.training.model
    assert (model.kind, model.input_dim, model.hidden_dims, model.output_dim) == ("mlp", 784, (512, 256), 10)
    assert (settings.training.batch_size, settings.training.learning_rate) == (32, 0.001)
    assert settings.training.rounds == 100
    assert settings.security.enable_encryption
    assert settings.security.encryption_key is None
    assert (settings.monitoring.log_level, settings.monitoring.metrics_port) == ("INFO", 9090)
    assert settings.monitoring.enable_prometheus


def test_all_mistakes_are_told_at_once_with_path_value_and_what_is_allowed(config: Path) -> None:
    text = CONTRACT.replace("learning_rate: 0.001", "learning_rate: -1").replace("node_id:", "node_idd:")
    text = text.replace('"ws://localhost:8765"', '"http://localhost"').replace("log_level: ", "log_level: LOUD#")
    text = text.replace("[512, 256]", "[512, 0]").replace("encryption_key: null", "encryption_key: c2hvcnQ=")
    config.write_text(text)
    with pytest.raises(InvalidArgumentError) as caught:
        loaded(config)
    said = {violation.path: violation.message for violation in caught.value.violations}
    assert set(said) == {
        "network.websocket_url",
        "network.node_id",
        "network.node_idd",
        "training.learning_rate",
        "training.hidden_dims.1",
        "security.encryption_key",
        "monitoring.log_level",
    }
    assert said["training.learning_rate"] == "-1 given; allowed: greater than 0"
    assert said["network.websocket_url"] == "'http://localhost' given; allowed: ws://host:port or wss://host:port"
    assert "did you mean 'node_id'?" in said["network.node_idd"]
    assert "CORTEX_NETWORK__NODE_ID" in said["network.node_id"]
    assert "'DEBUG', 'INFO', 'WARNING' or 'ERROR'" in said["monitoring.log_level"]
    assert "32 bytes as base64" in said["security.encryption_key"]
    assert "c2hvcnQ" not in str(caught.value)


def test_the_environment_wins_over_the_file(config: Path) -> None:
    settings = loaded(
        config,
        CORTEX_NETWORK__NODE_ID="site-7",
        CORTEX_NETWORK__RETRY_ATTEMPTS="9",
        CORTEX_TRAINING__HIDDEN_DIMS="[8]",
        CORTEX_MONITORING__ENABLE_PROMETHEUS="false",
        CORTEX_SECURITY__ENCRYPTION_KEY=b64encode(bytes(32)).decode(),
        CORTEX_DIR="/elsewhere",
    )
    assert (settings.network.node_id, settings.network.retry_attempts) == ("site-7", 9)
    assert settings.network.websocket_url == "ws://localhost:8765"
    assert settings.training.hidden_dims == (8,)
    assert not settings.monitoring.enable_prometheus
    assert settings.security.encryption_key is not None


def test_a_misspelt_or_bad_variable_is_named(config: Path) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        loaded(config, CORTEX_NETWORK__NODEID="x", CORTEX_TRAINING__MAX_EPOCHS="many")
    said = {violation.path: violation.message for violation in caught.value.violations}
    assert "CORTEX_NETWORK__NODE_ID" in said["CORTEX_NETWORK__NODEID"]
    assert "'many' given" in said["training.max_epochs"]
    assert "CORTEX_TRAINING__MAX_EPOCHS" in said["training.max_epochs"]


@pytest.mark.parametrize(
    ("variable", "value", "says"),
    [
        (
            "NETWORK__WEBSOCKET_URL",
            "ws://localhost:99999",
            "network.websocket_url: 'ws://localhost:99999' given; allowed: ws",
        ),
        ("NETWORK__REGION", "a b", "network.region: 'a b' given; allowed: 1 to 63 of A-Z a-z 0-9"),
        ("NETWORK__TOKEN", "junk", "network.token: a secret (not shown) given; allowed: what `cortex node token"),
        ("TRAINING__MIN_NODES", "3", "training.min_nodes: '3' given; allowed: up to training.nodes, which is 1"),
        ("TRAINING__HIDDEN_DIMS", "5,6", "CORTEX_TRAINING__HIDDEN_DIMS: is not JSON"),
    ],
)
def test_each_mistake_is_told_beside_the_others(config: Path, variable: str, value: str, says: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        loaded(config, **{f"CORTEX_{variable}": value, "CORTEX_TRAINING__MAX_EPOCHS": "many"})
    assert says in str(caught.value)
    assert "training.max_epochs: 'many' given" in str(caught.value)
    assert "junk" not in str(caught.value)


def test_a_section_that_may_be_left_out_has_variables_too(config: Path) -> None:
    settings = loaded(config, CORTEX_TRAINING__EARLY_STOPPING__PATIENCE="7", CORTEX_TRAINING__NODES="3")
    assert settings.training.stopping is not None
    assert settings.training.stopping.patience == 7
    assert loaded(config, CORTEX_TRAINING__NODES="3", CORTEX_TRAINING__MIN_NODES="3").training.min_nodes == 3


@pytest.mark.parametrize("name", ["", "Has Space", "UPPER", "a/b", "-x"])
def test_a_node_id_must_survive_in_an_identity(config: Path, name: str) -> None:
    config.write_text(CONTRACT.replace("local_node_1", name))
    with pytest.raises(InvalidArgumentError, match=r"network\.node_id: .* given; allowed: 1 to 63 of a-z"):
        loaded(config)


def test_rounds_make_up_the_epochs(config: Path) -> None:
    assert loaded(config, CORTEX_TRAINING__EPOCHS_PER_ROUND="7").training.rounds == 15


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"nowhere\.yaml"):
        loaded(tmp_path / "nowhere.yaml")


def test_secrets_are_not_shown(config: Path) -> None:
    key = b64encode(bytes(range(32))).decode()
    settings = loaded(config, CORTEX_SECURITY__ENCRYPTION_KEY=key, CORTEX_NETWORK__TOKEN=TOKEN)
    assert key not in repr(settings)
    assert TOKEN.rpartition("_")[2] not in repr(settings.network)


def test_the_table_of_settings_is_current() -> None:
    document = (ROOT / "docs/manager.md").read_text()
    assert with_table(document) == document, "run `python -m cortex.integration.reference docs/manager.md`"
    assert all(f"`{key}`" in table() for key in ("network.node_id", "training.early_stopping.patience", "state_dir"))


@pytest.mark.parametrize("text", ["", "{}", "network:\ntraining:\n"])
def test_an_empty_file_is_told_every_key_it_lacks(config: Path, text: str) -> None:
    config.write_text(text)
    with pytest.raises(InvalidArgumentError) as caught:
        loaded(config)
    said = {violation.path for violation in caught.value.violations}
    assert said == {"network.node_id", "training.input_dim", "training.output_dim"}
    assert loaded(
        config,
        CORTEX_NETWORK__NODE_ID="a",
        CORTEX_TRAINING__INPUT_DIM="4",
        CORTEX_TRAINING__OUTPUT_DIM="2",
    )


def test_a_key_that_stands_twice_is_a_mistake(config: Path) -> None:
    config.write_text(CONTRACT.replace("  batch_size: 32\n", "  batch_size: 32\n  batch_size: 64\n"))
    with pytest.raises(InvalidArgumentError, match="key 'batch_size' stands twice, in line 10 and in line 11"):
        loaded(config)


def test_true_is_no_number(config: Path) -> None:
    config.write_text(CONTRACT.replace("batch_size: 32", "batch_size: true").replace("[512, 256]", "[512, true]"))
    with pytest.raises(InvalidArgumentError) as caught:
        loaded(config)
    said = {violation.path: violation.message for violation in caught.value.violations}
    assert said["training.batch_size"] == "True given; allowed: a whole number"
    assert set(said) == {"training.batch_size", "training.hidden_dims.1"}


def test_variables_of_others_are_passed_over_and_slips_are_not(config: Path) -> None:
    assert loaded(config, CORTEX_NAME="worker-1", CORTEX_GATEWAY_URL="ws://elsewhere:1")
    with pytest.raises(InvalidArgumentError) as caught:
        loaded(config, CORTEX_NAME="worker-1", CORTEX_NETWORK_NODE_ID="x", CORTEX_NET__NAME="y")
    said = {violation.path: violation.message for violation in caught.value.violations}
    assert set(said) == {"CORTEX_NETWORK_NODE_ID", "CORTEX_NET__NAME"}
    assert "did you mean CORTEX_NETWORK__NODE_ID" in said["CORTEX_NETWORK_NODE_ID"]
    assert len(said["CORTEX_NETWORK_NODE_ID"]) < 200


def test_files_below_ones_home_are_found_there(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    names = {"NETWORK__CA": "ca.pem", "NETWORK__TOKEN_FILE": "node.token", "TRAINING__INIT_FROM": "base.safetensors"}
    settings = loaded(config, **{f"CORTEX_{key}": f"~/{name}" for key, name in names.items()})
    given = settings.network.ca, settings.network.token_file, settings.training.init_from
    assert given == tuple(tmp_path / name for name in names.values())
    assert job_of(settings).model.init_from == str(tmp_path / "base.safetensors")
    with pytest.raises(InvalidArgumentError, match=r"network\.ca: .*nobody of that name has a home here"):
        loaded(config, CORTEX_NETWORK__CA="~nobody-of-this-name/ca.pem")
