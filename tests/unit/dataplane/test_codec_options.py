"""Options of the codecs: one table for the job file and the wire."""

from __future__ import annotations

import pytest

from cortex_common.codec import WeightCompressor
from cortex_common.errors import InvalidArgumentError
from cortex_common.job.codec_options import CODEC_OPTIONS, CODECS, codec_violations, with_defaults
from cortex_common.job.parse import parse_job
from cortex_common.job.spec import CompressionSpec


def job(compression: dict) -> dict:
    return {
        "model": {"input_dim": 4, "output_dim": 2},
        "data": {"train": "digits"},
        "compression": compression,
    }


@pytest.mark.parametrize("codec", CODECS)
def test_defaults_are_allowed_and_are_what_the_codec_uses(codec: str) -> None:
    defaults = with_defaults(codec, {})
    assert not codec_violations(codec, defaults)
    assert WeightCompressor.create(codec).quantiser.options() == defaults
    assert WeightCompressor.create(codec, defaults).options_json == WeightCompressor.from_wire(codec, "").options_json


@pytest.mark.parametrize(
    ("codec", "options", "message"),
    [
        ("int4", {"block": 8}, "options.block: 8 given; allowed with codec int4: a power of two from 16 to 65536"),
        ("int8", {"stochastic": 1}, "options.stochastic: 1 given; allowed with codec int8: true or false"),
        ("topk", {"density": 0.9}, "options.density: 0.9 given; allowed with codec topk: a number from 0.0005 to 0.5"),
        ("topk", {"density": float("nan")}, "options.density: nan given"),
        ("topk", {"values": "int3"}, "options.values: 'int3' given; allowed with codec topk: int8 or fp32"),
        ("bf16", {"block": 256}, "options.block: unknown option of codec bf16; allowed: none"),
    ],
)
def test_a_job_with_a_wrong_option_is_told_what_is_allowed(codec: str, options: dict, message: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        parse_job(job({"codec": codec, "options": options}))
    assert f"compression.{message}" in caught.value.message
    with pytest.raises(InvalidArgumentError):
        WeightCompressor.create(codec, options)


def test_all_wrong_options_are_named_at_once() -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        parse_job(job({"codec": "topk", "options": {"density": 2, "block": 3}}))
    assert {violation.path for violation in caught.value.violations} == {
        "compression.options.density",
        "compression.options.block",
    }


def test_an_unknown_codec_is_one_mistake() -> None:
    with pytest.raises(InvalidArgumentError, match="'none', 'bf16', 'int8', 'int4' or 'topk'") as caught:
        parse_job(job({"codec": "zip", "options": {"level": 3}}))
    assert len(caught.value.violations) == 1


@pytest.mark.parametrize("codec", CODECS)
def test_every_option_is_told_in_the_job_file_reference(codec: str) -> None:
    text = CompressionSpec.__doc__ or ""
    assert codec in text
    for name, option in CODEC_OPTIONS[codec].items():
        assert f"{name} {str(option.default).lower()}" in text
