"""The program of the README with CortexManager, against a network of real processes."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.e2e.conftest import Shell

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

CONFIG = """
network:
  websocket_url: "{url}"
  node_id: "local_node_1"
  retry_attempts: 3
  connection_timeout: 30
training:
  input_dim: 784
  hidden_dims: [512, 256]
  output_dim: 10
  batch_size: 32
  learning_rate: 0.001
  max_epochs: 3
security:
  enable_encryption: true
  encryption_key: null  # Auto-generated if not provided
monitoring:
  log_level: "INFO"
  metrics_port: 0
  enable_prometheus: true
"""
PROGRAM = """
import asyncio
import json
import torch
from torch.utils.data import DataLoader, TensorDataset
from cortex.integration.manager import CortexManager

labels = torch.arange(640) % 10
inputs = torch.nn.functional.one_hot(labels, 10).float().repeat(1, 79)[:, :784] + 0.1 * torch.randn(640, 784)
dataloader = DataLoader(TensorDataset(inputs.view(-1, 28, 28), labels), batch_size=32, shuffle=True)


async def main():
    manager = CortexManager("config.yaml")
    await manager.initialize()
    await manager.start_training(dataloader)      # any torch DataLoader yielding (inputs, targets)
    return manager


manager = asyncio.run(main())
right = int((manager.model(inputs).argmax(1) == labels).sum())
print(json.dumps({"model": type(manager.model).__mro__[1].__name__, "right": right, "rounds": len(manager.history),
                  "accepted": [report.accepted for report in manager.history], "job": manager.status.job_id}))
"""


def websocket_url(network: Shell) -> str:
    members = json.loads(network.layout.network_file.read_text())["members"]
    port = next(member["ports"]["websocket"] for member in members if member["service"] == "gateway")
    return f"ws://localhost:{port}"


def start(network: Shell, program: str) -> subprocess.Popen[str]:
    path = network.folder / "program.py"
    path.write_text(program)
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [sys.executable, str(path)], cwd=network.folder, env=network.environment, stdout=pipe, stderr=pipe, text=True
    )


def test_the_contracts_program_trains_a_node_and_leaves_the_model(network: Shell):
    (network.folder / "config.yaml").write_text(CONFIG.format(url=websocket_url(network)))
    program = start(network, PROGRAM)
    out, err = program.communicate(timeout=200)

    assert program.returncode == 0, err
    said = json.loads(out.splitlines()[-1])
    assert (said["model"], said["rounds"], said["accepted"]) == ("CortexModel", 3, [1, 1, 1])
    assert said["right"] > 600
    status = network.json("status", said["job"])
    assert (status["status"], status["name"]) == ("completed", "own-784-512-256-10")
    key = network.folder / ".cortex-node" / "local_node_1" / "sealing.key"
    assert f"path={key}" in err.replace("'", "")
    assert key.stat().st_mode & 0o777 == 0o600
