"""Submissions of the shape `{"model_config": …, "training_config": …}`, turned into job files. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from cortex_common.errors import InvalidArgumentError, Violation
from cortex_common.identity import Role
from cortex_common.job.parse import parse_job
from cortex_common.job.spec import JobSpec
from services.gateway.domain import DatasetInfo, Health, NodeInfo

SECTIONS = ("model_config", "training_config")
_REPLACED = MappingProxyType({"model_config": "model", "training_config": "training"})
_SYNONYMS: Mapping[str, str] = MappingProxyType(
    {
        "model_config.dropout_rate": "model.dropout",
        **{f"training_config.{key}": "training.rounds" for key in ("max_epochs", "epochs", "num_epochs")},
        **{f"training_config.{key}": "placement.workers" for key in ("nodes", "num_nodes", "workers")},
        **{f"training_config.{key}": "placement.min_workers" for key in ("min_nodes", "min_workers")},
        "training_config.dataset": "data.train",
        "training_config.test_dataset": "data.test",
    }
)
"""Keys of the two sections that stand elsewhere in a job file; all others have the names they have there."""
SCHEMA: dict[str, Any] = {
    "title": "JobConfigs",
    "description": "A job by the configuration of model and training; other sections of a job file may stand beside.",
    "type": "object",
    "required": ["model_config"],
    "properties": {
        "model_config": {
            "type": "object",
            "description": "The keys of `model` in a job file, or `dropout_rate`.",
        },
        "training_config": {
            "type": "object",
            "description": "The keys of `training` in a job file, or `max_epochs` (a round each), `nodes`, "
            "`min_nodes`, `dataset`, `test_dataset`.",
        },
    },
}
_TEST = "-test"


def has_configs(document: Mapping[str, object]) -> bool:
    """Whether a submission is of this shape."""
    return any(section in document for section in SECTIONS)


def job_of(document: Mapping[str, object], nodes: Iterable[NodeInfo]) -> JobSpec:
    """The job that such a submission means.

    A round starts with one worker unless `min_nodes` says otherwise. Without a dataset, it is the largest one known to
    a live worker that has inputs of `input_dim` values and at most `output_dim` classes.

    Args:
        document: `model_config`, `training_config`, and any other section of a job file beside them.
        nodes: Whose datasets may be chosen from.

    Raises:
        InvalidArgumentError: all mistakes, with the paths they have in the submission.
    """
    violations = [
        Violation(new, f"given beside {old}; allowed: one of the two")
        for old, new in _REPLACED.items()
        if new in document and old in document
    ]
    if violations:
        raise InvalidArgumentError.of("job", violations)
    job: dict[str, object] = {key: value for key, value in document.items() if key not in SECTIONS}
    paths = _spread(document, job)
    _default(job, "placement", "min_workers", 1)
    if "data" not in job:
        _choose_data(job, nodes)
    try:
        return parse_job(job)
    except InvalidArgumentError as error:
        told = [Violation(_told_path(violation.path, paths), violation.message) for violation in error.violations]
        raise InvalidArgumentError.of("job", told) from None


def _spread(document: Mapping[str, object], job: dict[str, object]) -> dict[str, str]:
    """Put every key of the sections where a job file has it; where each came from."""
    paths: dict[str, str] = {}
    for old, new in _REPLACED.items():
        values = document.get(old, {})
        if not isinstance(values, Mapping):
            raise InvalidArgumentError.of("job", [Violation(old, f"{values!r:.80} given; allowed: a mapping")])
        job[new] = job.get(new, {})
        for key, value in values.items():
            path = _SYNONYMS.get(f"{old}.{key}", f"{new}.{key}")
            section, _, name = path.partition(".")
            if path in paths:
                message = f"given beside {paths[path]}; allowed: one of the two"
                raise InvalidArgumentError.of("job", [Violation(f"{old}.{key}", message)])
            _default(job, section, name, value)
            paths[path] = f"{old}.{key}"
    return paths


def _default(job: dict[str, object], section: str, name: str, value: object) -> None:
    """Give a key its value, unless the job file's own section has one."""
    present = job.get(section, {})
    if isinstance(present, Mapping):
        job[section] = {name: value, **present}


def _told_path(path: str, paths: Mapping[str, str]) -> str:
    """The path as the person wrote it."""
    for inner, given in paths.items():
        if path == inner or path.startswith(f"{inner}."):
            return given + path.removeprefix(inner)
    section, separator, rest = path.partition(".")
    given_section = next((old for old, new in _REPLACED.items() if new == section), section)
    return f"{given_section}{separator}{rest}"


def _choose_data(job: dict[str, object], nodes: Iterable[NodeInfo]) -> None:
    """Take the largest dataset that fits the model, and its test set if there is one."""
    model = job["model"]
    inputs, classes = (model.get("input_dim"), model.get("output_dim")) if isinstance(model, Mapping) else (None, None)
    if not isinstance(inputs, int) or not isinstance(classes, int):
        job["data"] = {"train": "unknown"}  # the model's own mistakes are told first
        return
    known = {
        dataset.name: dataset
        for node in nodes
        if node.role is Role.WORKER and node.health is Health.LIVE
        for dataset in node.datasets
    }
    fitting = [each for each in known.values() if _fits(each, inputs, classes) and not each.name.endswith(_TEST)]
    if not fitting:
        message = f"missing, and no live worker has a dataset of {inputs} inputs and up to {classes} classes; "
        raise InvalidArgumentError.of("job", [Violation("training_config.dataset", message + _offer(known.values()))])
    chosen = max(fitting, key=lambda each: (each.examples, each.name)).name
    test = f"{chosen}{_TEST}"
    job["data"] = {"train": chosen, **({"test": test} if test in known else {})}


def _fits(dataset: DatasetInfo, inputs: int, classes: int) -> bool:
    return math.prod(dataset.input_shape) == inputs and dataset.classes <= classes


def _offer(known: Iterable[DatasetInfo]) -> str:
    offered: Sequence[str] = sorted(each.name for each in known)
    return f"allowed: {', '.join(offered)}" if offered else "no worker is there"
