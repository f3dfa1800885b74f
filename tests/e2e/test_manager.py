"""Programs with CortexManager, as the README shows them, against a network of real processes."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cortex.integration.joining import job_of
from cortex.integration.settings import ManagerSettings, load_manager_settings
from cortex_common.job.spec import ModelSpec
from cortex_common.model import build_model
from cortex_common.security.node_tokens import NodeToken
from cortex_common.tensors import DEFAULT_CHUNK_ELEMENTS
from services.worker.trainer.examples import DataCache
from services.worker.trainer.loader import LoaderData, LoaderExamples
from tests.e2e.conftest import Shell
from tests.e2e.programs import (
    DATA,
    GATED,
    NOTEBOOK,
    RUN,
    SNIPPET,
    Program,
    event,
    levels,
    listening,
    scraped,
    websocket_address,
)
from tests.integration.stores.servers import free_port
from tests.links import CountedLink, over
from tests.recomputed import digests
from tests.waiting import eventually, until

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

EXAMPLES = 640
CHUNK_BYTES = 4 * DEFAULT_CHUNK_ELEMENTS
WIDE = "[1024, 1024]"
WIDE_BYTES = 4 * (785 * 1024 + 1025 * 1024 + 1025 * 10)


def test_the_readmes_program_with_the_readmes_file_trains_a_node(network: Shell):
    _, log = Program(network, "readme", SNIPPET + "\nasyncio.run(main())\n").end()
    (job,) = [job for job in network.json("jobs") if job["name"] == "own-784-512-256-10"]
    status = network.json("status", job["job_id"])
    assert (status["status"], [report["accepted"] for report in status["history"]]) == ("completed", [1, 1, 1])
    key = network.folder / "readme" / ".cortex-node" / "local_node_1" / "sealing.key"
    assert f"path={key}" in log.replace("'", "")
    assert key.stat().st_mode & 0o777 == 0o600


def test_a_plain_script_runs_and_keeps_the_model_and_its_history(network: Shell):
    out, _ = Program(network, "script", RUN).end()
    said = json.loads(out.splitlines()[-1])
    assert (said["model"], said["accepted"]) == ("CortexModel", [1, 1, 1])
    assert said["right"] > 600
    assert network.json("status", said["job"])["status"] == "completed"


def test_the_docstrings_example_works_in_a_notebooks_running_loop(network: Shell):
    out, _ = Program(network, "notebook", NOTEBOOK).end()
    assert int(out.splitlines()[-1]) == 6


def test_two_programs_and_two_workers_train_one_job_and_each_counts_once(network: Shell):
    shared = {
        "CORTEX_TRAINING__DATASET": "digits",
        "CORTEX_TRAINING__INPUT_DIM": 64,
        "CORTEX_TRAINING__HIDDEN_DIMS": "[16]",
        "CORTEX_TRAINING__NODES": 4,
        "CORTEX_TRAINING__MIN_NODES": 4,
        "OMP_NUM_THREADS": 1,
    }
    seeds = {"site-a": 1, "site-b": 2}
    programs = [
        Program(network, name, RUN, width=64, seed=seed, CORTEX_NETWORK__NODE_ID=name, **shared)
        for name, seed in seeds.items()
    ]
    said = [json.loads(program.end()[0].splitlines()[-1]) for program in programs]
    assert said[0]["job"] == said[1]["job"]
    status = network.json("status", said[0]["job"])
    assert [report["accepted"] for report in status["history"]] == [4, 4, 4]
    assert [report["participants"] for report in status["history"]] == [4, 4, 4]
    seats = seats_of(network, said[0]["job"])
    assert sorted(seats) == ["eu-1", "site-a", "site-b", "us-1"]
    given = {"CORTEX_NETWORK__NODE_ID": "any", "CORTEX_TRAINING__MAX_EPOCHS": 3, **shared}
    settings = load_manager_settings(
        programs[0].folder / "config.yaml", {key: str(value) for key, value in given.items()}
    )
    job = job_of(settings)
    own = {name: loader_of(64, seed, settings) for name, seed in seeds.items()}
    digits = DataCache(job, network.folder / "cache" / "cortex", None).training_part(0, 4, torch.device("cpu"))
    expected = digests(job, [own.get(name, digits) for name in seats])
    assert [report["model_sha256"] for report in status["history"]] == expected


def seats_of(network: Shell, job_id: str) -> list[str]:
    """Who held which seat, in every round."""
    lines = [json.loads(line) for line in network.run("logs", job_id, "--json").stdout.splitlines()]
    opened = [line["message"] for line in lines if line["name"] == "round_opened" and line["round"]]
    (names,) = {message.partition(" with ")[2].partition(" at ")[0] for message in opened}
    return names.split(", ")


def loader_of(width: int, seed: int, settings: ManagerSettings) -> LoaderExamples:
    """A program's data, as its trainer sees them."""
    made: dict[str, Any] = {}
    with torch.random.fork_rng():
        exec(DATA.format(width=width, seed=seed), made)
    return LoaderData(made["dataloader"], settings.training.model).training_part(0, 1, torch.device("cpu"))


def test_a_program_trains_in_a_job_that_others_evaluate(network: Shell):
    path = network.job(2, {"workers: 2, min_workers: 2": "workers: 3, min_workers: 3"})
    job_id = network.json("submit", path)["job_id"]
    until(lambda: network.json("status", job_id)["waiting_for"].startswith("workers: 2 of 3 ready"), 60)
    token = network.run("node", "token", "--gateway", "--name", "trains-only", "--region", "local").stdout.strip()
    given = {
        # No operator's connection: it cannot submit a job of its own.
        "CORTEX_DIR": network.folder / "nowhere",
        "CORTEX_NETWORK__TOKEN": token,
        "CORTEX_NETWORK__NODE_ID": "trains-only",
        "CORTEX_TRAINING__DATASET": "digits",
        "CORTEX_TRAINING__INPUT_DIM": 64,
        "CORTEX_TRAINING__HIDDEN_DIMS": "[32]",
    }
    # Over the same data, and about another network: it takes no part.
    elsewhere = network.run("node", "token", "--gateway", "--name", "other", "--region", "local").stdout.strip()
    other = given | {"CORTEX_NETWORK__TOKEN": elsewhere, "CORTEX_NETWORK__NODE_ID": "other"}
    refusing = Program(network, "other", RUN, width=64, **other | {"CORTEX_TRAINING__HIDDEN_DIMS": "[16]"})
    until(lambda: network.json("status", job_id)["refusals"], 60)
    [refusal] = network.json("status", job_id)["refusals"]
    assert (refusal["worker"], refusal["rule"]) == ("other", "model")
    assert refusal["message"] == "layers mlp 64-32-10 wanted; this program trains mlp 64-16-10"
    refusing.process.kill()
    refusing.process.communicate()
    out, log = Program(network, "trains-only", RUN, width=64, **given).end()
    said = json.loads(out.splitlines()[-1])
    assert (said["job"], said["accepted"]) == (job_id, [3, 3])
    assert "evaluating" not in log
    assert "work_failed" not in log
    history = network.json("status", job_id)["history"]
    assert sorted(seats_of(network, job_id)) == ["eu-1", "trains-only", "us-1"]
    assert all(report["test_accuracy"] > 0.2 for report in history)


def test_a_node_that_is_not_let_in_says_why(network: Shell):
    program = Program(network, "stranger", RUN, CORTEX_NETWORK__TOKEN=NodeToken.fresh().encode())
    _, err = program.process.communicate(timeout=60)
    assert program.process.returncode != 0
    assert "not known here" in err


async def test_a_program_killed_in_the_middle_of_an_upload_goes_on_and_counts_once(network: Shell):
    host, port = websocket_address(network).split(":")
    given = {"CORTEX_NETWORK__NODE_ID": "mortal", "CORTEX_TRAINING__SEED": 7, "CORTEX_TRAINING__HIDDEN_DIMS": WIDE}
    given |= {"CORTEX_TRAINING__MAX_EPOCHS": 3, "OMP_NUM_THREADS": 1}
    # Past the first version and the first chunk: the first round's update is on its way, and stands.
    first_link = CountedLink(bytes_per_s=6e6, hold_bytes=WIDE_BYTES + CHUNK_BYTES + 500_000)
    async with over(first_link, lambda: (host, int(port))) as address:
        first = Program(network, "mortal", RUN, CORTEX_NETWORK__WEBSOCKET_URL=f"ws://{address}", **given)
        await eventually(lambda: first_link.up_bytes > (first_link.hold_bytes or 0), 60)
        os.kill(first.process.pid, signal.SIGKILL)
        first.process.communicate()
    before = await asyncio.to_thread(network.json, "jobs")
    assert before[0]["status"] != "completed"
    link = CountedLink(bytes_per_s=6e6)
    async with over(link, lambda: (host, int(port))) as address:
        second = Program(network, "mortal", RUN, CORTEX_NETWORK__WEBSOCKET_URL=f"ws://{address}", **given)
        out, log = await asyncio.to_thread(second.end)
    said = json.loads(out.splitlines()[-1])
    assert (said["job"], said["accepted"]) == (before[0]["job_id"], [1, 1, 1])
    assert log.count("upload_resumed") == 1, log
    # Of the first round only what was missing went up, and then two rounds.
    history = (await asyncio.to_thread(network.json, "status", said["job"]))["history"]
    first_bytes, *others_bytes = [report["bytes_up"] for report in history]
    assert 0 < link.up_bytes - sum(others_bytes) < first_bytes - CHUNK_BYTES // 2
    settings = load_manager_settings(first.folder / "config.yaml", {key: str(value) for key, value in given.items()})
    assert [report["model_sha256"] for report in history] == digests(job_of(settings), [loader_of(784, 0, settings)])


REPORTING: Mapping[str, Mapping[str, Any]] = {
    "tells-all": {
        "CORTEX_MONITORING__LOG_LEVEL": "DEBUG",
        "CORTEX_MONITORING__PROGRESS_BAR": "true",
        "CORTEX_MONITORING__TENSORBOARD_DIR": "scalars",
        "CORTEX_TRAINING__CHECKPOINT_DIR": "checkpoints",
        "CORTEX_TRAINING__CHECKPOINT_KEEP": 2,
    },
    "tells-little": {"CORTEX_MONITORING__LOG_LEVEL": "WARNING", "CORTEX_TRAINING__HIDDEN_DIMS": "[16]"},
    "serves-nothing": {"CORTEX_MONITORING__ENABLE_PROMETHEUS": "false", "CORTEX_TRAINING__HIDDEN_DIMS": "[24]"},
}
EARLY = 6
"""Rounds of a job that bears five without improvement, where none is one."""


def test_what_programs_tell_is_served_written_and_shown_as_their_files_say(network: Shell):
    port = free_port()
    shared = {"CORTEX_MONITORING__METRICS_PORT": port, "CORTEX_TRAINING__MAX_EPOCHS": 50, "OMP_NUM_THREADS": 1}
    shared["CORTEX_TRAINING__EARLY_STOPPING"] = '{"patience": 5, "min_delta": 10}'
    programs: dict[str, Program] = {}
    try:
        for name, own in REPORTING.items():
            given = shared | own | {"CORTEX_NETWORK__NODE_ID": name}
            programs[name] = Program(network, name, GATED + RUN, **given)
            until((programs[name].folder / "waits").exists, 100)
        ports = {name: listening(program.process.pid) for name, program in programs.items()}
        (served,), (elsewhere,), nowhere = ports.values()
        assert (served, nowhere) == (port, [])
        for each in (served, elsewhere):
            until(lambda at=each: scraped(at)["cortex_worker_training_examples_total"] == 2 * EXAMPLES, 60)
            assert (scraped(each)["cortex_worker_attended"], scraped(each)["cortex_worker_jobs"]) == (1, 1)
    finally:
        for program in programs.values():
            (program.folder / "go").touch()
    ended = [program.end() for program in programs.values()]
    said = [json.loads(out.splitlines()[-1]) for out, _ in ended]
    assert [each["accepted"] for each in said] == [[1] * EARLY] * 3
    all_of_it, little, unserved = [log for _, log in ended]
    check_told(all_of_it, little, unserved, served, elsewhere)
    check_written(network, programs["tells-all"].folder, said[0])


def check_told(all_of_it: str, little: str, unserved: str, served: int, elsewhere: int) -> None:
    """What is in the logs of the three programs."""
    assert levels(all_of_it) == {"debug", "info", "warning"}
    assert "message_received" in all_of_it
    assert "[websockets" not in all_of_it, "frames of the library show what they carry"
    assert (levels(little), levels(unserved)) == ({"warning"}, {"info", "warning"})
    assert all(log.count("batch_size_not_used") == 1 for log in (all_of_it, little, unserved))
    assert f"http://127.0.0.1:{served}/metrics" in event(all_of_it, "metrics_served")
    assert f"http://127.0.0.1:{elsewhere}/metrics" in event(little, "metrics_elsewhere")
    assert f"port {served} is taken" in event(little, "metrics_elsewhere")
    assert "metrics_" not in unserved
    assert [f"round {EARLY}/50" in log for log in (all_of_it, little, unserved)] == [True, False, False]


def check_written(network: Shell, folder: Path, said: Mapping[str, Any]) -> None:
    """The files of a program that was told to write some."""
    job_id = said["job"]
    kept = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert kept == [f"{job_id}-{number}.safetensors" for number in (EARLY - 1, EARLY)]
    model = build_model(ModelSpec(input_dim=784, hidden_dims=(512, 256), output_dim=10), seed=1)
    model.load_state_dict(load_file(folder / "checkpoints" / kept[-1]))
    made: dict[str, Any] = {}
    with torch.random.fork_rng():
        exec(DATA.format(width=784, seed=0), made)
    assert int((model.eval()(made["inputs"]).argmax(1) == made["labels"]).sum()) == said["right"] > 600
    history = network.json("status", job_id)["history"]
    run = EventAccumulator(str(folder / "scalars" / job_id)).Reload()
    for name in ("train_loss", "train_accuracy", "seconds"):
        told = [(each.step, each.value) for each in run.Scalars(name)]
        assert told == [(report["round"], pytest.approx(report[name])) for report in history]
