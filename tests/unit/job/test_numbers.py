"""Numbers of a job file: what is none is refused, however much Python thinks of it as one."""

from __future__ import annotations

import pytest

from cortex_common.errors import InvalidArgumentError
from cortex_common.job.parse import parse_job


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [("model", "dropout", False), ("training", "learning_rate", True), ("aggregation", "quorum", True)],
)
def test_yes_and_no_are_no_numbers(section: str, key: str, value: bool) -> None:
    job = {
        "model": {"input_dim": 4, "hidden_dims": [2], "output_dim": 2},
        "data": {"train": "digits"},
    }
    job[section] = {**job.get(section, {}), key: value}
    with pytest.raises(InvalidArgumentError, match=rf"{section}\.{key}: {value} given; allowed: a number"):
        parse_job(job)
