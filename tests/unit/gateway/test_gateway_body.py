"""Bodies are read strictly: what is ambiguous, endless or malformed is refused with its place."""

from __future__ import annotations

import pytest

from cortex_common.errors import InvalidArgumentError
from services.gateway.body import parse_json, parse_yaml


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("{", "line 1, column 2"),
        ('{"a": 1,}', "not JSON"),
        ('{"a": 1, "a": 2}', "'a' is given twice"),
        ('{"a": NaN}', "NaN given; allowed: finite"),
        ('{"a": -Infinity}', "finite"),
        ("[" * 100_000, "nested too deeply"),
        ("9" * 5000, "not JSON"),
        ("{'a': 1}", "not JSON"),
    ],
)
def test_malformed_json_is_refused(text, complaint):
    with pytest.raises(InvalidArgumentError, match=complaint):
        parse_json(text)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("a: [1", "not YAML"),
        ("a: b: c", "line 1"),
        ("a: &x 1\nb: *x", "line 2: aliases"),
        ("[" * 500 + "]" * 500, "nested too deeply"),
        ("a: 2024-99-99", "not YAML"),
        ("? [a]\n: 1", "not YAML"),
        ("!!python/object/apply:os.system ['true']", "not YAML"),
        ("a: 1\n---\nb: 2", "not YAML"),
        ("\ta: 1", "not YAML"),
    ],
)
def test_malformed_yaml_is_refused(text, complaint):
    with pytest.raises(InvalidArgumentError, match=complaint):
        parse_yaml(text)


def test_both_read_the_same_document():
    expected = {"name": "x", "model": {"hidden_dims": [1, 2]}, "training": {"learning_rate": 0.001}}
    assert (
        parse_json('{"name": "x", "model": {"hidden_dims": [1, 2]}, "training": {"learning_rate": 1e-3}}') == expected
    )
    assert parse_yaml("name: x\nmodel: {hidden_dims: [1, 2]}\ntraining: {learning_rate: 0.001}\n") == expected
