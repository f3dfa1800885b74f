"""YAML read strictly: keys that stand twice, wherever they stand."""

from __future__ import annotations

import pytest
import yaml

from cortex_common.yaml_text import load_yaml

FAST = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@pytest.mark.parametrize("loader", [yaml.SafeLoader, FAST])
def test_it_reads_what_yaml_reads(loader: type[yaml.SafeLoader]) -> None:
    for text in ("", "3", "[1, a, null]", "a: {b: 1}\nc: [{b: 1}, {b: 2}]", "x: &x {a: 1}\ny: *x", "1: a\n'1': b"):
        assert load_yaml(text, loader) == yaml.safe_load(text)


@pytest.mark.parametrize("loader", [yaml.SafeLoader, FAST])
@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a: 1\nb: 2\na: 3\n", "key 'a' stands twice, in line 1 and in line 3"),
        ("x:\n  - {b: 1}\n  - {b: 1,\n     b: 2}\n", "key 'b' stands twice, in line 3 and in line 4"),
        ('{"a": 1, "a": 1}', "key 'a' stands twice, in line 1 and in line 1"),
    ],
)
def test_a_key_that_stands_twice_is_a_mistake(loader: type[yaml.SafeLoader], text: str, reason: str) -> None:
    with pytest.raises(yaml.YAMLError, match=reason):
        load_yaml(text, loader)


def test_what_aliases_name_again_and_again_is_looked_at_once() -> None:
    lines = ["a0: &a0 {x: 1}", *(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}, *a{n - 1}]" for n in range(1, 60))]
    assert len(load_yaml("\n".join(lines))) == 60
