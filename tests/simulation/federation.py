"""A job in one process: real training, and the very code that compresses, feeds back, folds and delivers.

What is left out is what does not touch a number: processes, connections, the spool. Legend: D parameters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cortex_common.codec import WeightCompressor
from cortex_common.ids import JobId, NodeName, RoundNumber, SeatIndex, Sha256Hex
from cortex_common.job.spec import CompressionSpec, JobSpec
from cortex_common.security.encryption import EncryptionManager, ObjectHeader, ObjectKind
from cortex_common.tensors import Arena, Manifest, TensorKind, chunk_count, chunk_ranges
from services.aggregator.batches import BatchProcessor, FoldPlan, FoldTargets
from services.aggregator.deltas import delta_header
from services.aggregator.states import StatePlan, state_header
from services.aggregator.strategies import create_strategy
from services.worker.residuals import Feedback, Kept, ResidualStore, kept_header
from services.worker.updates import DeltaEncoder

KEY = EncryptionManager.new_data_key()
CRYPT = EncryptionManager(KEY)
JOB = JobId("simulated")
CHUNK = 65_536


@dataclass(frozen=True)
class Data:
    """Images as rows of floats."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor


@dataclass(frozen=True)
class Plan:
    """What is trained, and how."""

    spec: JobSpec
    workers: int = 4
    batch: int = 32

    @staticmethod
    def of(compression: Mapping[str, Any], rounds: int, aggregation: Mapping[str, Any] | None = None) -> Plan:
        sections = {
            "model": {"input_dim": 784, "hidden_dims": [64], "output_dim": 10},
            "data": {"train": "fashion-mnist"},
            "training": {"rounds": rounds},
            "aggregation": aggregation or {},
        }
        return Plan(JobSpec.model_validate({**sections, "compression": dict(compression)}))

    @property
    def compression(self) -> CompressionSpec:
        return self.spec.compression


class Sealed:
    """Sealed chunks in memory; also takes what a fold writes."""

    def __init__(self, header: ObjectHeader) -> None:
        self.header = header
        self.chunks: list[bytes] = []

    def read(self, index: int) -> bytes:
        return self.chunks[index]

    def write(self, data: bytes | memoryview) -> None:
        self.chunks.append(bytes(data))

    @property
    def size(self) -> int:
        return sum(map(len, self.chunks))


@dataclass
class Outcome:
    """Test accuracy after each round, and the bytes one worker sent and was sent in it."""

    accuracy: list[float] = field(default_factory=list)
    bytes_up: list[int] = field(default_factory=list)
    bytes_down: list[int] = field(default_factory=list)

    def settled(self, last: int = 3) -> float:
        """Mean over the last rounds: one test of 10,000 images is good to a third of a point."""
        return float(np.mean(self.accuracy[-last:]))


class Federation:
    """A root and its workers, which all start each round from the same numbers."""

    def __init__(self, plan: Plan, data: Data, folder: Path) -> None:
        self._plan, self._data, self._folder = plan, data, folder
        torch.manual_seed(0)
        self._net = nn.Sequential(nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 10))
        entries = [(name, tuple(each.shape), TensorKind.TRAINABLE) for name, each in self._net.named_parameters()]
        self._manifest = Manifest.of(entries)
        self._base, self._result = Arena.zeros(self._manifest), Arena.zeros(self._manifest)
        self._read(self._base)
        self._version = self._sealed_version()
        self._state: Sealed | None = None
        self._processor = BatchProcessor(1)

    def run(self) -> Outcome:
        outcome = Outcome()
        try:
            for number in range(1, self._plan.spec.training.rounds + 1):
                updates = [self._update(number, seat) for seat in range(self._plan.workers)]
                outcome.bytes_up.append(updates[0].size)
                outcome.bytes_down.append(self._fold(number, updates))
                outcome.accuracy.append(self._accuracy())
        finally:
            self._processor.close()
        return outcome

    def _header(self, kind: ObjectKind, number: int, codec: WeightCompressor, seat: int = 0) -> ObjectHeader:
        manifest = self._manifest
        return ObjectHeader(
            kind=kind,
            network="cortex",
            job_id=JOB,
            round=RoundNumber(number),
            attempt=0,
            fence=1,
            sender=NodeName(f"w{seat}"),
            seat=SeatIndex(seat),
            key_id=KEY.key_id,
            codec=codec.codec,
            codec_options=codec.options_json,
            chunk_elements=CHUNK,
            elements=manifest.elements,
            counters=0,
            chunks=chunk_count(manifest.elements, 0, CHUNK),
            manifest_sha256=manifest.sha256,
            base_sha256=f"{number:064}",
        ).fresh()

    def _sealed_version(self) -> Sealed:
        codec = WeightCompressor.create("none", lz4="off")
        version = Sealed(self._header(ObjectKind.MODEL, 0, codec))
        sealer = CRYPT.sealer(version.header)
        for part in chunk_ranges(self._manifest.elements, 0, CHUNK):
            version.write(sealer.seal(part.index, codec.encode(self._base.values[part.start : part.stop])))
        return version

    def _update(self, number: int, seat: int) -> Sealed:
        """Train a seat's share, and send what a worker sends."""
        self._train(number, seat)
        codec = WeightCompressor.create(*self._plan.spec.upload_of(number))
        update = Sealed(self._header(ObjectKind.UPDATE, number, codec, seat))
        feedback, seed = None, (0, number, seat)
        if self._plan.compression.feeds_back:
            resting = kept_header(update.header)
            kept = Kept(number, codec.codec, codec.options_json, seed, resting, f"{number}.blob")
            store = ResidualStore(self._folder / str(seat), JOB)
            feedback = Feedback(store, kept, number - 1, frozenset(map(SeatIndex, range(4))), CRYPT)
        bench: Any = SimpleNamespace(base=self._base, result=self._result)
        encoder = DeltaEncoder(bench, codec, seed, is_first=False, feedback=feedback)
        sealer = CRYPT.sealer(update.header)
        for part in chunk_ranges(self._manifest.elements, 0, CHUNK):
            update.write(sealer.seal(part.index, encoder.encode(part)))
        if feedback is not None:
            feedback.close()
        return update

    def _fold(self, number: int, updates: list[Sealed]) -> int:
        """The next version into every worker's memory; the bytes one of them is sent for it."""
        aggregation, plain = self._plan.spec.aggregation, WeightCompressor.create("none", lz4="off")
        strategy = create_strategy(aggregation.strategy, _json(aggregation.options))
        codec = WeightCompressor.create(*self._plan.spec.download_of(number))
        header = replace(self._header(ObjectKind.MODEL, number, plain), base_sha256="")
        way = delta_header(header, Sha256Hex("b" * 64), codec)
        kept = state_header(header, strategy, has_residual=way is not None)
        plan = FoldPlan(
            self._manifest,
            self._version,
            updates,
            [1.0] * len(updates),
            strategy,
            header,
            StatePlan(kept, self._state) if kept or self._state else None,
            way,
        )
        version, state, delta = Sealed(header), Sealed(kept or header), Sealed(way or header)
        targets: Any = FoldTargets(version, state, delta)  # type: ignore[arg-type]
        self._processor.fold(plan, CRYPT, targets)
        self._version, self._state = version, state if kept else None
        sent = delta if way else version
        opener = CRYPT.opener(sent.header)
        for part in chunk_ranges(self._manifest.elements, 0, CHUNK):
            plaintext, target = (
                opener.open(part.index, sent.read(part.index)),
                self._base.values[part.start : part.stop],
            )
            if way:
                codec.decode_add(plaintext, target, 1.0)
            else:
                plain.decode(plaintext, part.elements, target)
        return sent.size

    def _train(self, number: int, seat: int) -> None:
        """One epoch over the seat's share, from the base; the result arena has what comes of it."""
        self._write(self._base)
        data, generator = self._data, torch.Generator().manual_seed(number * 1000 + seat)
        mine = torch.arange(seat, len(data.train_y), self._plan.workers)
        mine = mine[torch.randperm(len(mine), generator=generator)]
        optimiser = torch.optim.Adam(self._net.parameters(), lr=0.001)
        for rows in mine.split(self._plan.batch):
            optimiser.zero_grad()
            nn.functional.cross_entropy(self._net(data.train_x[rows]), data.train_y[rows]).backward()  # type: ignore[no-untyped-call]
            optimiser.step()
        self._read(self._result)

    @torch.no_grad()
    def _accuracy(self) -> float:
        self._write(self._base)
        right = self._net(self._data.test_x).argmax(1) == self._data.test_y
        return float(right.float().mean())

    @torch.no_grad()
    def _write(self, arena: Arena) -> None:
        for parameter, view in zip(self._net.parameters(), arena.views(self._manifest).values(), strict=True):
            parameter.copy_(torch.from_numpy(np.asarray(view)))

    @torch.no_grad()
    def _read(self, arena: Arena) -> None:
        for parameter, view in zip(self._net.parameters(), arena.views(self._manifest).values(), strict=True):
            view[...] = parameter.numpy()


def _json(options: Mapping[str, Any]) -> str:
    import json

    return json.dumps(options)
