"""Getting the compiled kernels ready, and proving that they do what the numpy code does before anything uses them."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cortex_common.codec.compressor import WeightCompressor
from cortex_common.codec.kernels import Kernels
from cortex_common.codec.native import adopt, compile_all, ready
from cortex_common.codec.quantisers import Accumulator, Quantiser
from cortex_common.codec.rounding import Rounding
from cortex_common.job.codec_options import CODECS
from cortex_common.tensors import Float32s


@dataclass(frozen=True, slots=True)
class WarmUp:
    """Which codecs run compiled, and why the others don't."""

    compiled: tuple[str, ...]
    refused: dict[str, str]


def warm_up(*codecs: WeightCompressor) -> WarmUp:
    """Compile the hot loops of these codecs, or of all with their default options; blocks, so give it a thread.

    Costs seconds the first time on a machine and a fraction of one afterwards, from the cache beside the package. Until
    it's done, and where it can't be done, the numpy code runs and gives the same bytes. Never raises.
    """
    wanted = codecs or tuple(WeightCompressor.create(name) for name in CODECS)
    compiled, refused = [], {}
    # A future holds whatever the compiler raises: its kinds of failure are no business of ours.
    with ThreadPoolExecutor(1, "cortex-codec-warm-up") as pool:
        for codec in wanted:
            failure = pool.submit(_prepare, codec.quantiser).exception()
            if failure is None:
                compiled.append(codec.codec)
            else:
                refused[codec.codec] = f"{type(failure).__name__}: {failure}"
    return WarmUp(tuple(compiled), refused)


class _DiffersError(Exception):
    """A kernel gives other bytes than numpy."""


def _prepare(quantiser: Quantiser) -> None:
    if ready(quantiser.key) is not None:
        return
    kernels = compile_all(quantiser.recipes())
    results = zip(_tried(quantiser, None), _tried(quantiser, kernels), strict=True)
    if any(mine.tobytes() != theirs.tobytes() for mine, theirs in results):
        raise _DiffersError("the compiled code gives other bytes than numpy on this machine")
    adopt(quantiser.key, kernels)


def _tried(quantiser: Quantiser, kernels: Kernels | None) -> Iterator[NDArray[Any]]:
    """Everything a quantiser does, with numbers from the smallest to the largest."""
    values_n = _sample()
    body = memoryview(bytearray(quantiser.body_bytes(values_n.size)))
    for is_stochastic in (False, quantiser.stochastic):
        left_n = np.empty_like(values_n)
        quantiser.encode(values_n, body, Rounding.of(7, is_stochastic=is_stochastic), left_n, kernels)
        yield np.frombuffer(body, np.uint8)
        yield left_n
    quantiser.check(body, values_n.size, kernels)
    out_n = np.empty_like(values_n)
    quantiser.decode(body, out_n, kernels)
    yield out_n
    totals_n: tuple[Accumulator, ...] = (
        np.linspace(-1, 1, values_n.size),
        np.linspace(-1, 1, values_n.size, dtype=np.float32),
    )
    for total_n in totals_n:
        quantiser.add(body, total_n, 1.7, kernels)
        yield total_n


def _sample() -> Float32s:
    exponents = np.linspace(-45, 38, 16 * 1024 + 77)
    values_n: Float32s = (np.sin(np.arange(exponents.size) * 0.7) * 10.0**exponents).astype(np.float32)
    values_n[::97] = 0
    return values_n
