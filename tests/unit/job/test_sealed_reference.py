"""A job names sealed data by their digest."""

from __future__ import annotations

import pytest

from cortex_common.errors import InvalidArgumentError
from cortex_common.job.parse import parse_job

MODEL = {"input_dim": 64, "output_dim": 10}
REFERENCE = f"sealed:ward-7@{'ab' * 32}"


def test_a_reference_holds_the_digest() -> None:
    data = parse_job({"model": MODEL, "data": {"train": REFERENCE, "test": "digits-test"}}).data
    assert data.sealed_digest == "ab" * 32
    assert parse_job({"model": MODEL, "data": {"train": "digits"}}).data.sealed_digest is None


@pytest.mark.parametrize(
    ("data", "told"),
    [
        ({"train": "sealed:ward-7"}, "sealed:<name>@<digest>"),
        ({"train": REFERENCE[:-1]}, "sealed:<name>@<digest>"),
        ({"train": REFERENCE, "partition": {"scheme": "shards"}}, "dealt by its shards"),
        ({"train": "digits", "test": REFERENCE}, "only train may be sealed"),
    ],
)
def test_what_is_no_reference_or_out_of_place_is_a_mistake(data: dict[str, object], told: str) -> None:
    with pytest.raises(InvalidArgumentError, match=told):
        parse_job({"model": MODEL, "data": data})
