"""`python -m benchmarks.codecs`: how fast each codec runs on one thread, beside memcpy, in GB/s of float32.

Chunks of 512 Ki elements of a vector that doesn't fit the cache, as in a round. Time is the thread's CPU time, so that
other work on the machine distorts it little. Numpy first, then the compiled kernels, in the same run.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import numpy as np
import typer

from benchmarks.machine import describe
from cortex_common.codec import WeightCompressor, warm_up
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
Row = dict[str, Any]
Step = Callable[[ChunkRange], object]


class Bench:
    """Walks over the vector, chunk by chunk, and gives GB/s of float32."""

    def __init__(self, elements: int, repeat: int) -> None:
        rng = np.random.default_rng(0)
        self.values_n = rng.standard_normal(elements).astype(np.float32) * np.float32(1e-3)
        self.parts = tuple(iter_chunks(elements, 0, DEFAULT_CHUNK_ELEMENTS))
        self.chunk_n = np.empty(DEFAULT_CHUNK_ELEMENTS, np.float32)
        self.sum_n = np.zeros(DEFAULT_CHUNK_ELEMENTS, np.float64)
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

    def memcpy(self) -> float:
        """The yardstick."""
        return self.speed(lambda part: np.copyto(self.chunk_n[: part.elements], self.of(part)))


def measure(bench: Bench, engine: str) -> Iterator[Row]:
    """One row a codec."""
    for name, options in CASES:
        codec = WeightCompressor.create(name, options)
        payloads = [codec.encode(bench.of(part), seed=part.index) for part in bench.parts]
        ratio = bench.values_n.nbytes / sum(map(len, payloads))
        speeds = {what: round(bench.speed(step), 2) for what, step in steps_of(bench, codec, payloads).items()}
        yield {"engine": engine, "codec": name, "options": options, "ratio": ratio, **speeds}


def steps_of(bench: Bench, codec: WeightCompressor, payloads: Sequence[bytes | bytearray]) -> dict[str, Step]:
    """What both ends do with a chunk."""
    room = bytearray(codec.max_payload_bytes(bench.parts[0]))

    def out(part: ChunkRange) -> np.ndarray:
        return bench.chunk_n[: part.elements]

    return {
        "encode": lambda part: codec.encode_into(bench.of(part), room, seed=part.index),
        "encode_residual": lambda part: codec.encode_into(bench.of(part), room, seed=part.index, residual_n=out(part)),
        "check": lambda part: codec.check(payloads[part.index], part),
        "decode": lambda part: codec.decode(payloads[part.index], part.elements, out(part)),
        "decode_add": lambda part: codec.decode_add(payloads[part.index], bench.sum_n[: part.elements], 1.5),
    }


def with_torch(bench: Bench) -> dict[str, float]:
    """The same work as one would write it in PyTorch; empty where it isn't installed."""
    try:
        import torch
    except ImportError:
        return {}
    torch.set_num_threads(1)

    def int8(part: ChunkRange) -> None:
        blocks = torch.from_numpy(bench.of(part)).reshape(-1, 256)
        scales = blocks.abs().amax(1, keepdim=True) / 127
        (blocks / scales).round().to(torch.int8)

    def topk(part: ChunkRange) -> None:
        torch.from_numpy(bench.of(part)).reshape(-1, 4096).abs().topk(41, dim=1)

    def bf16(part: ChunkRange) -> None:
        torch.from_numpy(bench.of(part)).to(torch.bfloat16)

    return {step.__name__: round(bench.speed(step), 2) for step in (bf16, int8, topk)}


def table(rows: list[Row], memcpy: float, torch: dict[str, float]) -> str:
    """As Markdown."""
    kinds = ("encode", "encode_residual", "check", "decode", "decode_add")
    heads = ("engine", "codec", "times smaller", *(kind.replace("_", " + ") for kind in kinds))
    lines = [
        f"GB/s of float32, one thread; memcpy {memcpy:.1f}; torch encode "
        + ", ".join(f"{name} {speed:.1f}" for name, speed in torch.items())
        + ".",
        "",
    ]
    lines += ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for row in rows:
        options = ", ".join(f"{name} {value}".lower() for name, value in row["options"].items())
        name = f"{row['codec']} ({options})" if options else row["codec"]
        cells = (row["engine"], name, f"{row['ratio']:.1f}", *(f"{row[kind]:.1f}" for kind in kinds))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(
    elements: Annotated[int, typer.Option(min=DEFAULT_CHUNK_ELEMENTS, help="Length of the vector.")] = 1 << 22,
    repeat: Annotated[int, typer.Option(min=1)] = 5,
    out: Annotated[Path, typer.Option(help="Where the JSON goes.")] = RESULT,
) -> None:
    """Measure, write the JSON, show the table."""
    bench = Bench(elements - elements % DEFAULT_CHUNK_ELEMENTS, repeat)
    memcpy = bench.memcpy()
    rows = list(measure(bench, "numpy"))
    started, cpu_started = time.perf_counter(), time.process_time()
    report = warm_up()
    warm = {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - cpu_started}
    if report.compiled:
        rows += measure(bench, "numba")
    torch = with_torch(bench)
    result = {
        "machine": describe(),
        "memcpy": memcpy,
        "warm_up": warm | {"refused": report.refused},
        "torch": torch,
        "codecs": rows,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=2) + "\n")
    typer.echo(table(rows, memcpy, torch))


if __name__ == "__main__":
    typer.run(main)
