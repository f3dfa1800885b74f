"""Files and folders of a config.yaml, looked at before anything begins."""

from __future__ import annotations

from pathlib import Path

import pytest

from cortex.integration.paths import check_paths
from cortex.integration.settings import ManagerSettings, load_manager_settings
from cortex_common.errors import InvalidArgumentError
from tests.unit.manager.test_manager_settings import CONTRACT


def settings_of(folder: Path, **variables: Path) -> ManagerSettings:
    (folder / "config.yaml").write_text(CONTRACT)
    environment = {"CORTEX_STATE_DIR": str(folder / "state")}
    environment |= {f"CORTEX_{name}": str(path) for name, path in variables.items()}
    return load_manager_settings(folder / "config.yaml", environment)


def test_folders_are_made(tmp_path: Path) -> None:
    check_paths(settings_of(tmp_path, TRAINING__CHECKPOINT_DIR=tmp_path / "a" / "b"))
    assert (tmp_path / "a" / "b").is_dir()
    assert (tmp_path / "state" / "local_node_1").stat().st_mode & 0o777 == 0o700


def test_everything_that_cannot_be_used_is_told_at_once(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    wrong = {
        "STATE_DIR": file / "x",
        "TRAINING__CHECKPOINT_DIR": file,
        "MONITORING__TENSORBOARD_DIR": Path("/proc/nowhere"),
        "TRAINING__INIT_FROM": tmp_path / "none.safetensors",
        "NETWORK__CA": tmp_path / "none.pem",
    }
    with pytest.raises(InvalidArgumentError) as raised:
        check_paths(settings_of(tmp_path, **wrong))
    assert [violation.path for violation in raised.value.violations] == [
        "state_dir",
        "training.checkpoint_dir",
        "monitoring.tensorboard_dir",
        "training.init_from",
        "network.ca",
    ]
    assert f"{file} cannot be written to: File exists" in str(raised.value)
