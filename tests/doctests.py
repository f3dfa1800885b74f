"""Runs the examples of a docstring; `await` is allowed, as in `python -m asyncio`."""

from __future__ import annotations

import ast
import doctest
import inspect
import io
from collections.abc import Mapping
from contextlib import redirect_stdout
from typing import Any

OPTIONS = doctest.ELLIPSIS


async def run_examples(subject: object, given: Mapping[str, Any]) -> int:
    """Run them one after another, in a namespace that holds what is given; how many there were."""
    namespace = dict(given)
    examples = doctest.DocTestParser().get_examples(inspect.getdoc(subject) or "")
    checker = doctest.OutputChecker()
    for example in examples:
        got, expected = await _output(example, namespace), example.exc_msg or example.want
        if not checker.check_output(expected, got, OPTIONS):
            raise AssertionError(f"{example.source}expected: {expected}\ngot:      {got}")
    return len(examples)


async def _output(example: doctest.Example, namespace: dict[str, Any]) -> str:
    """What an example prints, or the error it ends with if it should."""
    printed = io.StringIO()
    code = compile(example.source, "<docstring>", "single", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    try:
        with redirect_stdout(printed):
            waiting = eval(code, namespace)
            if inspect.isawaitable(waiting):
                await waiting
    except Exception as error:
        if example.exc_msg is None:
            raise
        kind = type(error)
        return f"{kind.__module__}.{kind.__qualname__}: {error}\n"
    return printed.getvalue()
