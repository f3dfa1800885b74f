"""Folds with an outer state: read from beside the base, written beside the next version, never whole in memory."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from cortex_common.errors import CorruptError, OverloadedError, PreconditionError
from cortex_common.ids import Sha256Hex
from cortex_common.security.encryption import ObjectHeader, ObjectKind
from cortex_common.storage import BlobWriter, DirectoryBlobStore
from cortex_common.tensors import Arena, Manifest, TensorKind
from services.aggregator.batches import BatchProcessor, FoldPlan, FoldTargets
from services.aggregator.states import StatePlan, check_state, state_header
from services.aggregator.strategies import create_strategy
from services.aggregator.versions import SealedPart, Version, VersionStore
from tests.unit.dataplane.test_fold import CRYPT, Memory, version_of

STATEFUL = ["fedavgm", "diloco", "fedadam", "fedyogi", "fedadagrad"]
MANIFEST = Manifest.of([("w", (1500,), TensorKind.TRAINABLE), ("n", (2,), TensorKind.COUNTER)])


@dataclass
class Link:
    """One version of a chain and the state beside it."""

    version: Memory
    state: Memory | None = None


def sealed(header: ObjectHeader) -> Memory:
    memory = Memory(MANIFEST)
    memory.header = header
    return memory


def next_link(name: str, base: Link, updates: list[Memory], threads: int = 2) -> Link:
    strategy, target = create_strategy(name, "{}"), Memory(MANIFEST)
    header = state_header(target.header, strategy)
    assert header is not None
    state, processor = sealed(header), BatchProcessor(threads)
    plan = FoldPlan(MANIFEST, base.version, updates, [1.0, 3.0], strategy, target.header, StatePlan(header, base.state))
    try:
        result = processor.fold(plan, CRYPT, FoldTargets(target, state))  # type: ignore[arg-type]
    finally:
        processor.close()
    assert result.state.sizes == tuple(len(chunk) for chunk in state.chunks)
    assert len(state.chunks) == header.chunks == len(target.chunks) - 1
    return Link(target, state)


def arenas(seed: int) -> Iterator[Arena]:
    rng = np.random.default_rng(seed)
    while True:
        yield Arena(rng.standard_normal(1500).astype(np.float32), rng.integers(0, 9, 2))


@pytest.mark.parametrize("name", STATEFUL)
def test_a_chain_of_folds_is_a_chain_of_steps(name: str) -> None:
    random = arenas(0)
    first = next(random)
    link, values, strategy = Link(Memory(MANIFEST, first)), first.values.copy(), create_strategy(name, "{}")
    state = np.empty((strategy.slots, 1500), np.float32)
    strategy.begin(state)
    for number in range(4):
        deltas = [next(random), next(random)]
        link = next_link(name, link, [Memory(MANIFEST, delta) for delta in deltas], threads=1 + number)
        mean = (deltas[0].values.astype(np.float64) + 3.0 * deltas[1].values.astype(np.float64)) / 4
        strategy.step(values, mean, state, values)
        assert link.version.decoded(MANIFEST).values.tobytes() == values.tobytes()


def test_the_number_of_threads_changes_neither_version_nor_state() -> None:
    random = arenas(1)
    base, updates = Link(Memory(MANIFEST, next(random))), [Memory(MANIFEST, next(random)) for _ in range(2)]
    seen = set()
    for threads in (1, 2, 5):
        first = next_link("fedyogi", base, updates, threads)
        second = next_link("fedyogi", first, updates, threads)
        assert first.state
        assert second.state
        plain = [CRYPT.opener(second.state.header).open(i, chunk) for i, chunk in enumerate(second.state.chunks)]
        seen.add((second.version.decoded(MANIFEST).values.tobytes(), b"".join(plain)))
    assert len(seen) == 1


def test_a_state_that_is_not_finite_any_more_becomes_no_version() -> None:
    arena = Arena(np.full(1500, 1e22, np.float32), np.zeros(2, np.int64))
    updates = [Memory(MANIFEST, arena)] * 2
    with pytest.raises(PreconditionError, match=r"strategy fedadam: its state is no longer finite \(elements"):
        next_link("fedadam", Link(Memory(MANIFEST, arena)), updates)


def test_a_state_with_another_layout_does_not_open() -> None:
    random = arenas(2)
    updates = [Memory(MANIFEST, next(random)) for _ in range(2)]
    link = next_link("diloco", Link(Memory(MANIFEST, next(random))), updates)
    assert link.state
    link.state.header = replace(link.state.header, manifest=create_strategy("fedavgm", "{}").layout)
    with pytest.raises(CorruptError, match="chunk 0 of the state of job job-1 round 1"):
        next_link("diloco", link, updates)


class Counting:
    """Takes chunks and forgets them."""

    def write(self, data: bytes | memoryview) -> None:
        self.last = len(data)


class Repeated:
    """An object of many chunks that are all the same, without being stored."""

    def __init__(self, memory: Memory, header: ObjectHeader) -> None:
        self.header = header
        self._sealer = CRYPT.sealer(header)
        self._plain = CRYPT.opener(memory.header).open(0, memory.chunks[0])

    def read(self, index: int) -> bytes:
        return self._sealer.seal(index, self._plain)


@pytest.mark.parametrize("name", ["diloco", "fedadam"])
def test_memory_does_not_grow_with_the_model(name: str) -> None:
    small = Manifest.of([("w", (4096,), TensorKind.TRAINABLE)])
    strategy, peaks = create_strategy(name, "{}"), []
    for chunks in (16, 256):
        manifest = Manifest.of([("w", (4096 * chunks,), TensorKind.TRAINABLE)])
        piece = Memory(small, Arena.zeros(small))
        sizes = {"elements": manifest.elements, "chunks": chunks, "chunk_elements": 4096}
        whole = Repeated(Memory(small, Arena.zeros(small), chunk_elements=4096), replace(piece.header, **sizes))
        header = state_header(whole.header, strategy)
        assert header is not None
        plan = FoldPlan(
            manifest, whole, [whole] * 4, [1.0] * 4, strategy, whole.header.fresh(), StatePlan(header, None)
        )
        processor = BatchProcessor(2)
        tracemalloc.start()
        processor.fold(plan, CRYPT, FoldTargets(Counting(), Counting()))  # type: ignore[arg-type]
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        processor.close()
    assert peaks[1] - peaks[0] < 300_000


BASE = version_of(3, "job-1/3-0-aa.blob", "33" * 32).header


def test_a_round_goes_on_with_the_strategy_of_its_base() -> None:
    diloco, other = create_strategy("diloco", "{}"), create_strategy("diloco", '{"momentum":0.8}')
    fedavg, state = create_strategy("fedavg", "{}"), state_header(BASE, create_strategy("diloco", "{}"))
    first = replace(BASE, round=0)
    assert state_header(BASE, fedavg) is None
    assert state_header(replace(BASE, elements=0), diloco) is None
    check_state(BASE, state, diloco, 256)
    check_state(BASE, None, fedavg, 256)
    check_state(first, None, diloco, 256)
    with pytest.raises(PreconditionError, match=r'"momentum":0.9.*this round asks for .*"momentum":0.8.*a new job'):
        check_state(BASE, state, other, 256)
    with pytest.raises(PreconditionError, match="made with no outer state, this round asks for the outer state"):
        check_state(BASE, None, diloco, 256)
    with pytest.raises(PreconditionError, match=r'made with the outer state .*"strategy":"diloco".* no outer state'):
        check_state(BASE, state, fedavg, 256)
    with pytest.raises(PreconditionError, match="chunks of 256 elements, not 512"):
        check_state(BASE, state, diloco, 512)
    with pytest.raises(CorruptError, match="belongs to another version"):
        check_state(replace(BASE, round=4), state, diloco, 256)


class FullAt(DirectoryBlobStore):
    """Fails as a full disk does, at a blob whose name ends so."""

    end = "nothing"

    def create(self, name: str) -> BlobWriter:
        writer = super().create(name)
        if name.endswith(self.end):
            writer.commit = self._refuse  # type: ignore[method-assign]
        return writer

    def _refuse(self, *, sync: bool = True) -> None:
        raise OverloadedError("full")


def drafted(versions: VersionStore, number: int) -> Version:
    version = replace(version_of(number, "", f"{number}" * 64))
    header = version.header.fresh()
    state = state_header(header, create_strategy("diloco", "{}"))
    assert state is not None
    with versions.draft(header, state) as draft:
        draft.values.write(b"abc")
        assert draft.state is not None
        draft.state.write(b"wxyz")
        kept = SealedPart(state, (4,), draft.state_blob, Sha256Hex("5" * 64))
        version = replace(version, header=header, blob=draft.blob, state=kept)
        draft.commit(version)
    return version


def names(root: Path) -> list[str]:
    return sorted(path.name.split("-")[-1].split(".", 1)[-1] for path in root.rglob("*") if path.is_file())


def test_a_state_lives_and_goes_with_its_version(tmp_path: Path) -> None:
    versions = VersionStore(DirectoryBlobStore(tmp_path))
    version = drafted(versions, 2)
    again = VersionStore(DirectoryBlobStore(tmp_path))
    again.load()
    (loaded,) = again.of_job("job-1")
    assert loaded == version
    reader = again.open_state(loaded)
    assert reader is not None
    assert reader.header.kind is ObjectKind.STATE
    assert reader.read(0) == b"wxyz"
    reader.close()
    replaced = drafted(again, 2)
    assert replaced.blobs.isdisjoint(version.blobs)
    assert names(tmp_path) == ["blob", "json", "state.blob"]
    again.delete(replaced)
    assert names(tmp_path) == []


def test_a_state_that_is_gone_is_named(tmp_path: Path) -> None:
    blobs = DirectoryBlobStore(tmp_path)
    versions = VersionStore(blobs)
    version = drafted(versions, 2)
    assert version.state
    blobs.delete(version.state.blob)
    with pytest.raises(CorruptError, match="the outer state of version 222222222222 of round 2 of job job-1 is gone"):
        versions.open_state(version)
    assert versions.open_state(version_of(1, "x.blob", "11" * 32)) is None


@pytest.mark.parametrize("end", ["state.blob", ".blob"])
def test_a_full_disk_leaves_the_former_version_and_nothing_else(tmp_path: Path, end: str) -> None:
    blobs = FullAt(tmp_path)
    versions = VersionStore(blobs)
    former = drafted(versions, 2)
    before = json.dumps(sorted(path.name for path in tmp_path.rglob("*")))
    blobs.end = end
    with pytest.raises(OverloadedError):
        drafted(versions, 2)
    assert json.dumps(sorted(path.name for path in tmp_path.rglob("*"))) == before
    assert versions.of_round("job-1", former.header.round) == former
