"""Submissions by model and training configuration: what they mean, and mistakes told by the paths people wrote."""

from __future__ import annotations

import pytest

from cortex_common.errors import InvalidArgumentError
from cortex_common.identity import Role
from services.gateway.configs import job_of
from services.gateway.domain import DatasetInfo, Health, NodeInfo, ResourceInfo

MODEL = {"input_dim": 784, "hidden_dims": [512, 256], "output_dim": 10, "dropout_rate": 0.2}
TRAINING = {"batch_size": 64, "learning_rate": 0.01, "max_epochs": 7, "optimizer": "sgd"}


def worker(*datasets: tuple[str, int], health: Health = Health.LIVE) -> NodeInfo:
    return NodeInfo(
        name="w",
        role=Role.WORKER,
        region="eu",
        address="",
        health=health,
        activity="",
        version="",
        lease_left_s=1.0,
        last_seen_at=None,
        started_at=None,
        resources=ResourceInfo(),
        datasets=tuple(DatasetInfo(name=n, input_shape=(28, 28), classes=10, examples=e) for n, e in datasets),
    )


WORKERS = [worker(("mnist-5k", 4000)), worker(("fashion-mnist", 60000), ("fashion-mnist-test", 10000))]


def mistakes(document: dict, nodes=WORKERS) -> dict[str, str]:
    with pytest.raises(InvalidArgumentError) as caught:
        job_of(document, nodes)
    return {violation.path: violation.message for violation in caught.value.violations}


def test_each_key_stands_where_a_job_file_has_it():
    training = TRAINING | {"nodes": 3, "min_nodes": 2, "dataset": "mine", "test_dataset": "theirs"}
    job = job_of({"name": "x", "model_config": MODEL, "training_config": training}, [])
    assert (job.name, job.model.hidden_dims, job.model.dropout) == ("x", (512, 256), 0.2)
    assert (job.training.batch_size, job.training.learning_rate, job.training.optimizer) == (64, 0.01, "sgd")
    assert (job.training.rounds, job.training.epochs) == (7, 1.0)
    assert (job.placement.workers, job.placement.min_workers) == (3, 2)
    assert (job.data.train, job.data.test) == ("mine", "theirs")


def test_one_worker_is_enough_and_other_sections_may_stand_beside():
    job = job_of({"model_config": MODEL, "data": {"train": "mine"}, "aggregation": {"strategy": "diloco"}}, [])
    assert (job.placement.least, job.data.train, job.aggregation.strategy) == (1, "mine", "diloco")


def test_without_a_dataset_the_largest_that_fits_is_taken_with_its_test_set():
    job = job_of({"model_config": MODEL, "training_config": TRAINING}, WORKERS)
    assert (job.data.train, job.data.test) == ("fashion-mnist", "fashion-mnist-test")
    job = job_of({"model_config": MODEL}, WORKERS[:1])
    assert (job.data.train, job.data.test) == ("mnist-5k", None)


def test_where_no_dataset_fits_the_answer_says_which_there_are():
    found = mistakes({"model_config": MODEL | {"input_dim": 3}})
    assert found["training_config.dataset"].endswith("allowed: fashion-mnist, fashion-mnist-test, mnist-5k")
    gone = [worker(("fashion-mnist", 60000), health=Health.EXPIRED)]
    assert "no worker is there" in mistakes({"model_config": MODEL}, gone)["training_config.dataset"]


def test_mistakes_have_the_paths_people_wrote():
    training = {"max_epochs": 0, "lerning_rate": 1, "early_stopping": {"patience": 0}}
    found = mistakes({"model_config": MODEL | {"dropout_rate": 2, "input_dim": "x"}, "training_config": training})
    assert set(found) == {
        "model_config.dropout_rate",
        "model_config.input_dim",
        "training_config.max_epochs",
        "training_config.lerning_rate",
        "training_config.early_stopping.patience",
    }
    assert "did you mean 'learning_rate'" in found["training_config.lerning_rate"]


@pytest.mark.parametrize(
    ("document", "path"),
    [
        ({"model_config": MODEL, "model": {}}, "model"),
        ({"model_config": [1]}, "model_config"),
        ({"model_config": MODEL, "training_config": {"epochs": 1, "max_epochs": 2}}, "training_config.max_epochs"),
        ({"training_config": TRAINING}, "model_config.input_dim"),
    ],
)
def test_what_cannot_be_meant_is_refused(document, path):
    assert path in mistakes(document)
