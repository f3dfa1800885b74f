"""Numbers of a job file: what is none is refused, whatever Python and YAML take it for, and schemas tell the bounds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest
import yaml

from cortex_common.errors import InvalidArgumentError
from cortex_common.job.parse import parse_job
from cortex_common.job.spec import JobSpec

NUMBERS = ("number", "integer")
LONGEST = 3155760000.0
BOUNDS: dict[str, dict[str, float]] = {
    "aggregation.deadline": {"exclusiveMinimum": 0, "maximum": LONGEST},
    "aggregation.grace": {"minimum": 0, "maximum": LONGEST},
    "aggregation.quorum": {"exclusiveMinimum": 0, "maximum": 1},
    "data.partition.alpha": {"exclusiveMinimum": 0},
    "model.dropout": {"minimum": 0, "exclusiveMaximum": 1},
    "placement.min_memory": {"minimum": 0, "maximum": (1 << 62) - 1},
    "privacy.differential_privacy.clip_norm": {"exclusiveMinimum": 0},
    "privacy.differential_privacy.delta": {"exclusiveMinimum": 0, "exclusiveMaximum": 1},
    "privacy.differential_privacy.epsilon_budget": {"exclusiveMinimum": 0},
    "privacy.differential_privacy.noise_multiplier": {"exclusiveMinimum": 0},
    "training.early_stopping.min_delta": {"minimum": 0},
    "training.early_stopping.target": {},
    "training.learning_rate": {"exclusiveMinimum": 0},
    "training.local_epochs": {"exclusiveMinimum": 0},
    "training.local_seconds": {"exclusiveMinimum": 0},
    "training.weight_decay": {"minimum": 0},
}
"""Those that may be written as text too."""
PLAIN = sorted(
    path for path in BOUNDS if not path.startswith(("aggregation.deadline", "aggregation.grace", "placement"))
)


def options_of(schema: dict[str, Any]) -> list[dict[str, Any]]:
    """A schema's alternatives, those of its alternatives too."""
    return [found for each in schema["anyOf"] for found in options_of(each)] if "anyOf" in schema else [schema]


def numbers(schema: dict[str, Any], section: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, list[Any]]]:
    """Every key that takes a number, and what it takes."""
    for key, value in section["properties"].items():
        options = options_of(value)
        for option in options:
            if "$ref" in option:
                yield from numbers(schema, schema["$defs"][option["$ref"].rpartition("/")[2]], f"{prefix}{key}.")
        if any(option.get("type") in NUMBERS for option in options):
            yield f"{prefix}{key}", options


SCHEMA = JobSpec.model_json_schema()
TAKEN = dict(numbers(SCHEMA, SCHEMA))


def job_with(path: str, value: object) -> dict[str, Any]:
    job: dict[str, Any] = {
        "model": {"input_dim": 4, "hidden_dims": [2], "output_dim": 2},
        "data": {"train": "digits", "test": "digits-test"},
    }
    *sections, key = path.split(".")
    section = job
    for name in sections:
        section = section.setdefault(name, {})
    section[key] = value
    if path == "data.partition.alpha":
        section["scheme"] = "dirichlet"
    return job


@pytest.mark.parametrize("value", [True, False])
@pytest.mark.parametrize("path", [*TAKEN, "model.hidden_dims.0"])
def test_yes_and_no_are_no_numbers(path: str, value: bool) -> None:
    job = job_with(path.removesuffix(".0"), [value] if path.endswith(".0") else value)
    with pytest.raises(InvalidArgumentError, match=rf"{path}: {value} given; allowed: "):
        parse_job(job)


@pytest.mark.parametrize("path", PLAIN)
def test_a_number_that_yaml_reads_as_text_is_one(path: str) -> None:
    text = yaml.safe_load("1e-3")
    assert isinstance(text, str)
    found: Any = parse_job(job_with(path, text))
    for name in path.split("."):
        found = getattr(found, name)
    assert found == 0.001


@pytest.mark.parametrize("text", ["", "a", "nan", "inf", "-Infinity", "1e999", "1_0", "0x1", "1e", "1,5", "١"])
@pytest.mark.parametrize("path", PLAIN)
def test_other_text_is_none(path: str, text: str) -> None:
    with pytest.raises(InvalidArgumentError, match=rf"{path}: ('{text}'|inf) given; allowed: "):
        parse_job(job_with(path, text))


def test_schemas_tell_the_bounds_of_every_number_and_that_some_may_be_text() -> None:
    told = {path: options for path, options in TAKEN.items() if any("pattern" in option for option in options)}
    assert told.keys() == BOUNDS.keys()
    for path, options in told.items():
        (number,) = (option for option in options if option["type"] in NUMBERS)
        assert {key: value for key, value in number.items() if key.endswith("imum")} == BOUNDS[path], path


@pytest.mark.parametrize(
    ("path", "value", "is_valid"),
    [
        ("model.dropout", "1e-3", True),
        ("model.dropout", "much", False),
        ("model.dropout", True, False),
        ("aggregation.deadline", "1h30m", True),
        ("aggregation.deadline", "soon", False),
        ("placement.min_memory", "2 GiB", True),
        ("placement.min_memory", "2 GiBs", False),
        ("privacy.differential_privacy.enabled", False, True),
        ("privacy.differential_privacy.enabled", 0, False),
        ("privacy.secure_aggregation.enabled", 0, False),
        ("privacy.secure_aggregation.enabled", "false", False),
        ("compression.lz4", True, True),
        ("compression.lz4", 1, False),
    ],
)
def test_what_the_schema_says_is_what_is_taken(path: str, value: object, is_valid: bool) -> None:
    job = job_with(path, value)
    assert jsonschema.Draft202012Validator(SCHEMA).is_valid(job) is is_valid
    if is_valid:
        parse_job(job)
        return
    with pytest.raises(InvalidArgumentError, match=f"{path}: {value!r} given; allowed: "):
        parse_job(job)
