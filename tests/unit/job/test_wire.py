"""Jobs as messages: what was written is what arrives."""

from __future__ import annotations

from cortex_common.job.parse import parse_job
from cortex_common.job.wire import spec_from_proto, spec_to_proto

MODEL = {"input_dim": 64, "output_dim": 10}


def test_text_of_digits_stays_text() -> None:
    spec = parse_job({"name": "2024", "model": MODEL, "data": {"train": "7", "test": "8"}})
    assert spec_from_proto(spec_to_proto(spec)) == spec


def test_a_number_where_a_word_may_stand_stays_a_number() -> None:
    secure = {"threshold": 3, "ring_bits": 16}
    spec = parse_job({"model": MODEL, "data": {"train": "digits"}, "privacy": {"secure_aggregation": secure}})
    assert spec_from_proto(spec_to_proto(spec)) == spec
