"""Compiled kernels, once a process: compiled or loaded from numba's cache by `warm_up`, never in the path of a call.

Numba is optional. Until a kernel is ready, and for ever where numba is absent, the numpy code does the same work; the
bytes are the same, so it doesn't matter when a process changes over.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Any, cast

from cortex_common.codec.kernels import Kernel, Kernels

_READY: dict[Hashable, Kernels] = {}


def ready(key: Hashable) -> Kernels | None:
    """Kernels of this key, if they are compiled."""
    return _READY.get(key)


def adopt(key: Hashable, kernels: Kernels) -> None:
    """Use these kernels from now on, in all threads."""
    _READY[key] = kernels


def compile_all(recipes: Mapping[str, Kernel]) -> Kernels:
    """Compile kernels, or load them from the cache beside this package (or the user's, where that isn't writable).

    Raises:
        ImportError: numba isn't installed, or doesn't fit the numpy or Python that is.
        Exception: whatever numba raises when it can't compile.
    """
    return {name: _compile(recipe) for name, recipe in recipes.items()}


def _compile(recipe: Kernel) -> Callable[..., Any]:
    import numba
    from numba import types

    numbers = {
        "b1": types.boolean, "i1": types.int8, "i8": types.int64, "u1": types.uint8, "u2": types.uint16,
        "u4": types.uint32, "f4": types.float32, "f8": types.float64,
    }  # fmt: skip

    def argument(text: str) -> Any:
        name, bracket, rest = text.partition("[")
        return types.Array(numbers[name], 1, "C", readonly=rest == "r]") if bracket else numbers[name]

    signatures = [tuple(argument(text) for text in variant) for variant in recipe.variants]
    try:
        compiled = numba.njit(signatures, nogil=True, cache=True)(recipe.function)
    except RuntimeError:  # No directory for the cache can be written.
        compiled = numba.njit(signatures, nogil=True)(recipe.function)
    compiled.disable_compile()
    return cast(Callable[..., Any], compiled)
