"""`python -m benchmarks.codecs`: how fast each codec runs on one thread, beside memcpy, in GB/s of float32.

Chunks of 512 Ki elements of a vector that no cache holds, from it and into memory as large: what is copied, encoded or
added up comes from memory and goes there. Time is the thread's CPU time, so that other work on the machine distorts it
little. Numpy first, then the compiled kernels, in the same run.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import numpy as np
import typer

from benchmarks.machine import cache_bytes, describe, load_average
from benchmarks.network import BenchmarkError, child_environment
from cortex_common.codec import WeightCompressor, warm_up
from cortex_common.codec.native import ready
from cortex_common.tensors import DEFAULT_CHUNK_ELEMENTS, ChunkRange, iter_chunks

RESULT = Path(__file__).resolve().parent / "results" / "codecs.json"
CASES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("none", {}),
    ("bf16", {}),
    ("int8", {}),
    ("int8", {"stochastic": True}),
    ("int4", {}),
    ("int4", {"stochastic": True}),
    ("topk", {}),
    ("topk", {"density": 0.1}),
)
_LEAST_BYTES = 256 * 2**20
_CACHES = 2
"""The vector is at least so many times the largest cache, and what it goes to is as large again."""
_ALIGNED = 16
"""Compiled loops take only numbers that lie at multiples of their size."""
_REPEAT = 5
Row = dict[str, Any]
Payload = bytes | memoryview
Step = Callable[[ChunkRange], object]


class Engine(StrEnum):
    """What a codec's loops run on."""

    NUMPY = "numpy"
    NUMBA = "numba"


def uncached_elements() -> int:
    """Length of a float32 vector that no cache of this machine holds."""
    return max(_LEAST_BYTES, _CACHES * cache_bytes()) // 4


class Bench:
    """Walks over the vector, chunk by chunk, and gives GB/s of float32.

    Args:
        elements: Of the vector, a multiple of a chunk's.
        repeat: How often each step goes over it, after a first time that does not count.
    """

    def __init__(self, elements: int, repeat: int) -> None:
        rng = np.random.default_rng(0)
        self.values_n = rng.standard_normal(elements, np.float32)
        self.values_n *= np.float32(1e-3)
        self.parts = tuple(iter_chunks(elements, 0, DEFAULT_CHUNK_ELEMENTS))
        self.out_n = np.zeros(elements, np.float32)
        self.sum_n = np.zeros(elements, np.float64)
        self._repeat = repeat

    def speed(self, step: Step) -> float:
        """Median over the repetitions."""
        seconds = []
        for _ in range(self._repeat + 1):
            started = time.thread_time_ns()
            for part in self.parts:
                step(part)
            seconds.append((time.thread_time_ns() - started) / 1e9)
        return float(self.values_n.nbytes / median(seconds[1:]) / 1e9)

    def of(self, part: ChunkRange) -> np.ndarray:
        """The values of a chunk."""
        return self.values_n[part.start : part.stop]

    def out(self, part: ChunkRange) -> np.ndarray:
        """Where a chunk goes."""
        return self.out_n[part.start : part.stop]

    def memcpy(self) -> float:
        """The yardstick."""
        return self.speed(lambda part: np.copyto(self.out(part), self.of(part)))


def measure(bench: Bench, engine: Engine) -> Iterator[Row]:
    """One row for each codec that runs on this engine.

    Raises:
        BenchmarkError: numpy is wanted, but this process has compiled kernels, which codecs use once they are there.
    """
    codecs = [WeightCompressor.create(name, options) for name, options in CASES]
    compiled = [ready(codec.quantiser.key) is not None for codec in codecs]
    if engine is Engine.NUMPY and any(compiled):
        names = dict.fromkeys(codec.codec for codec, is_compiled in zip(codecs, compiled, strict=True) if is_compiled)
        raise BenchmarkError(f"compiled kernels are ready for {', '.join(names)}; numpy needs a process without any")
    for (name, options), codec, is_compiled in zip(CASES, codecs, compiled, strict=True):
        if is_compiled == (engine is Engine.NUMBA):
            yield {"engine": engine.value, "codec": name, "options": options, **_row(bench, codec)}


def _row(bench: Bench, codec: WeightCompressor) -> Row:
    rooms = rooms_for(bench, codec)
    payloads = [codec.encode_into(bench.of(part), rooms[part.index], seed=part.index) for part in bench.parts]
    ratio = bench.values_n.nbytes / sum(map(len, payloads))
    speeds = {what: round(bench.speed(step), 2) for what, step in steps_of(bench, codec, rooms, payloads).items()}
    return {"ratio": ratio, **speeds}


def rooms_for(bench: Bench, codec: WeightCompressor) -> list[memoryview]:
    """Memory of its own for each chunk's payload."""
    each = -(-codec.max_payload_bytes(bench.parts[0]) // _ALIGNED) * _ALIGNED
    room = np.zeros(each * len(bench.parts), np.uint8).data
    return [room[each * part.index : each * (part.index + 1)] for part in bench.parts]


def steps_of(
    bench: Bench, codec: WeightCompressor, rooms: Sequence[memoryview], payloads: Sequence[Payload]
) -> dict[str, Step]:
    """What both ends do with a chunk."""

    def encode(part: ChunkRange, residual_n: np.ndarray | None = None) -> None:
        codec.encode_into(bench.of(part), rooms[part.index], seed=part.index, residual_n=residual_n)

    return {
        "encode": encode,
        "encode_residual": lambda part: encode(part, bench.out(part)),
        "check": lambda part: codec.check(payloads[part.index], part),
        "decode": lambda part: codec.decode(payloads[part.index], part.elements, bench.out(part)),
        "decode_add": lambda part: codec.decode_add(payloads[part.index], bench.sum_n[part.start : part.stop], 1.5),
    }


def with_torch(bench: Bench) -> dict[str, float]:
    """The same work as one would write it in PyTorch; empty where it isn't installed."""
    try:
        import torch
    except ImportError:
        return {}
    torch.set_num_threads(1)
    halves_n = torch.zeros(bench.values_n.size, dtype=torch.bfloat16)
    levels_n = torch.zeros(bench.values_n.size, dtype=torch.int8)

    def int8(part: ChunkRange) -> None:
        blocks = torch.from_numpy(bench.of(part)).reshape(-1, 256)
        scales = blocks.abs().amax(1, keepdim=True) / 127
        levels_n[part.start : part.stop] = (blocks / scales).round().reshape(-1)

    def topk(part: ChunkRange) -> None:
        torch.from_numpy(bench.of(part)).reshape(-1, 4096).abs().topk(41, dim=1)

    def bf16(part: ChunkRange) -> None:
        halves_n[part.start : part.stop] = torch.from_numpy(bench.of(part))

    return {step.__name__: round(bench.speed(step), 2) for step in (bf16, int8, topk)}


def run_apart(out: Path, elements: int = 0, repeat: int = _REPEAT) -> None:
    """`main` in a process of its own, where nothing is compiled yet.

    Raises:
        BenchmarkError: it failed; why is on the standard error.
    """
    settings = ["--elements", str(elements), "--repeat", str(repeat), "--out", str(out)]
    if subprocess.run([sys.executable, "-m", "benchmarks.codecs", *settings], env=child_environment()).returncode:
        raise BenchmarkError("the codecs could not be measured")


def table(result: Mapping[str, Any]) -> str:
    """As Markdown."""
    kinds = ("encode", "encode_residual", "check", "decode", "decode_add")
    heads = ("engine", "codec", "times smaller", *(kind.replace("_", " + ") for kind in kinds))
    lines = [_yardsticks(result), "", "| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for row in result["codecs"]:
        options = ", ".join(f"{name} {value}".lower() for name, value in row["options"].items())
        name = f"{row['codec']} ({options})" if options else row["codec"]
        cells = (row["engine"], name, f"{row['ratio']:.1f}", *(f"{row[kind]:.1f}" for kind in kinds))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _yardsticks(result: Mapping[str, Any]) -> str:
    torch = "".join(f" {name} {speed:.1f}," for name, speed in result["torch"].items()).rstrip(",")
    return (
        f"GB/s of float32, one thread, a vector of {result['vector_bytes'] / 1e6:.0f} MB "
        f"(largest cache: {result['cache_bytes'] / 1e6:.0f} MB); memcpy {result['memcpy']:.1f}"
        + (f"; torch encode{torch}" if torch else "")
        + "."
    )


def main(
    elements: Annotated[
        int, typer.Option(min=0, help="Length of the vector in whole chunks; 0: more than the caches hold.")
    ] = 0,
    repeat: Annotated[int, typer.Option(min=1)] = _REPEAT,
    out: Annotated[Path, typer.Option(help="Where the JSON goes.")] = RESULT,
) -> None:
    """Measure, write the JSON, show the table."""
    machine = describe()
    elements = elements or uncached_elements()
    bench = Bench(max(elements // DEFAULT_CHUNK_ELEMENTS, 1) * DEFAULT_CHUNK_ELEMENTS, repeat)
    rows = list(measure(bench, Engine.NUMPY))
    started, cpu_started = time.perf_counter(), time.process_time()
    report = warm_up()
    warm = {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - cpu_started}
    rows += measure(bench, Engine.NUMBA)
    result = {
        "machine": machine,
        "vector_bytes": bench.values_n.nbytes,
        "cache_bytes": cache_bytes(),
        "memcpy": bench.memcpy(),
        "warm_up": warm | {"refused": report.refused},
        "torch": with_torch(bench),
        "codecs": rows,
        "load_average_after": load_average(),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=2) + "\n")
    typer.echo(table(result))


if __name__ == "__main__":
    try:
        typer.run(main)
    except BenchmarkError as error:
        sys.exit(f"error: {error}")
