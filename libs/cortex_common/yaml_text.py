"""YAML as people write it, read strictly: a key that stands twice in a mapping is a mistake, not a choice."""

from __future__ import annotations

import yaml


def load_yaml(text: str, loader: type[yaml.SafeLoader] = yaml.SafeLoader) -> object:
    """The document in `text`: mappings, lists, numbers, texts; None if there is nothing in it.

    Args:
        text: One YAML (or JSON) document.
        loader: Which safe loader reads it.

    Raises:
        yaml.YAMLError: it is malformed, or a mapping has a key twice; says where.
        RecursionError: it is nested too deeply.
    """
    reader = loader(text)
    try:
        root = reader.get_single_node()
        if root is None:
            return None
        _check_keys(root)
        return reader.construct_document(root)
    finally:
        reader.dispose()


def _check_keys(root: yaml.Node) -> None:
    """Look at every mapping once, however often aliases name it."""
    left, seen = [root], set()
    while left:
        node = left.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            left += node.value
        elif isinstance(node, yaml.MappingNode):
            _check_unique(node)
            left += [each for pair in node.value for each in pair]


def _check_unique(mapping: yaml.MappingNode) -> None:
    lines: dict[tuple[str, str], int] = {}
    for key, _ in mapping.value:
        if not isinstance(key, yaml.ScalarNode):
            continue
        line, name = key.start_mark.line + 1, (key.tag, key.value)
        if name in lines:
            reason = f"key {key.value!r} stands twice, in line {lines[name]} and in line {line}"
            raise yaml.constructor.ConstructorError(problem=reason)
        lines[name] = line
