from __future__ import annotations

import json

import pytest

from cortex.cli.main import main

JOB = """
name: tiny
model: {kind: mlp, input_dim: 64, hidden_dims: [8], output_dim: 10}
data: {train: digits}
"""


@pytest.fixture
def outcome(capsys, tmp_path, monkeypatch):
    """Run a command in an empty folder: its exit code, what it printed, what it complained of."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[int, str, str]:
        code = main(arguments)
        output = capsys.readouterr()
        return code, output.out, output.err

    return run


COMMANDS = (
    *("up", "down", "ps", "demo", "submit", "jobs", "status", "logs", "cancel", "pause", "resume"),
    *("nodes", "resources", "serve", "model list", "model download", "data list", "data fetch"),
    *("token create", "token list", "token revoke"),
)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself_with_examples(outcome, command):
    code, out, _ = outcome(*command.split(), "--help")

    assert code == 0
    assert f"cortex {command}" in out.split("Examples:")[1]
    assert "--json" in out or command == "serve"


@pytest.mark.parametrize("arguments", [("bogus",), ("submit",), ("up", "--workers", "0"), ("jobs", "--limit", "many")])
def test_wrong_usage_is_exit_code_2(outcome, arguments):
    code, out, err = outcome(*arguments)

    assert (code, out) == (2, "")
    assert "Usage" in err


@pytest.mark.parametrize(
    "arguments",
    [("jobs",), ("status", "x"), ("nodes",), ("resources",), ("cancel", "x"), ("logs", "x"), ("model", "list", "x")],
)
def test_without_a_network_commands_say_how_to_start_one(outcome, arguments):
    code, out, err = outcome(*arguments, "--json")

    assert (code, out) == (1, "")
    assert "`cortex up`" in err


def test_a_missing_job_file_is_named(outcome):
    assert outcome("submit", "nowhere.yaml") == (1, "", "error: job file nowhere.yaml: no such file\n")


def test_a_job_file_that_is_not_yaml_is_told_before_any_network_is_needed(outcome, tmp_path):
    (tmp_path / "job.yaml").write_text("a: [1, 2")

    code, _, err = outcome("submit", "job.yaml")

    assert code == 1
    assert "job.yaml is not YAML" in err


def test_all_mistakes_of_a_job_file_are_told_at_once(outcome, tmp_path):
    (tmp_path / "job.yaml").write_text(JOB.replace("64", "-1") + "trainig: {}\ntraining: {rounds: 0}\n")

    code, _, err = outcome("submit", "job.yaml")

    assert code == 1
    assert all(path in err for path in ("model.input_dim", "trainig", "training.rounds"))


def test_an_unknown_service_and_a_missing_configuration_are_told(outcome):
    assert outcome("serve", "router")[2].startswith("error: service 'router' given; allowed: coordinator")
    assert outcome("serve", "worker", "--config", "no.yaml")[2] == "error: configuration no.yaml: no such file\n"


def test_down_and_ps_without_a_network_say_so(outcome):
    for command in ("down", "ps"):
        code, out, err = outcome(command)
        assert (code, out) == (1, "")
        assert "no Cortex network in" in err


def test_known_datasets_are_listed_as_json(outcome):
    code, out, _ = outcome("data", "list", "--json")

    digits = next(row for row in json.loads(out) if row["name"] == "digits")
    assert code == 0
    assert (digits["input_dim"], digits["classes"], digits["examples"]) == (64, 10, 1438)


def test_an_unknown_dataset_names_the_known_ones(outcome):
    code, _, err = outcome("data", "fetch", "imagenet")

    assert code == 1
    assert "'imagenet' given; allowed: digits" in err


@pytest.mark.parametrize("life", ["soon", "-1d", "3w", "9999999d", "99999999999999999999s"])
def test_a_bad_token_life_says_what_is_allowed(outcome, life):
    code, _, err = outcome("token", "create", "ci", f"--life={life}")

    assert code == 1
    assert "allowed: a number and s, m, h or d" in err
