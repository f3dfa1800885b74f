"""What one job has on this worker: its trainer, and the two arenas both processes see."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cortex_common.job.spec import JobSpec
from cortex_common.network.work import Assignment
from cortex_common.tensors import Arena, Manifest, ManifestLimits
from services.worker.opened_shards import OpenedShards
from services.worker.settings import WorkerSettings
from services.worker.shared_arena import SharedArena
from services.worker.slots import TrainerSlot
from services.worker.trainer_line import Answer, OnProgress, Trainer


@dataclass(frozen=True, slots=True)
class Lesson:
    """What the result arena was trained from: the same again need not be trained again."""

    round: int
    seat: int
    base_sha256: str


@dataclass(frozen=True, slots=True)
class Prepared:
    """What a trainer has ready, and its answer: it need not be asked for the same again in every round."""

    trainer: Trainer
    spec: JobSpec
    seat: int
    seats: int
    with_data: bool
    manifest: Manifest

    def covers(self, trainer: Trainer, assignment: Assignment, *, with_data: bool) -> bool:
        """Whether that is what this assignment needs."""
        place = (self.trainer, self.seat, self.seats) == (trainer, assignment.seat, assignment.seats)
        return place and self.with_data >= with_data and self.spec == assignment.spec


class Workbench:
    """Memory and trainer of one job. One piece of work at a time.

    Attributes:
        held_sha256: Version in the base arena; empty while there is none, or only part of one.
        lesson: What is in the result arena, with the trainer's answer about it.
    """

    def __init__(self, slot: TrainerSlot, settings: WorkerSettings) -> None:
        self._slot = slot
        self._settings = settings
        self._base: SharedArena | None = None
        self._result: SharedArena | None = None
        self._attached: Trainer | None = None
        self._prepared: Prepared | None = None
        self.manifest: Manifest | None = None
        self.held_sha256 = ""
        self.lesson: tuple[Lesson, Answer] | None = None
        self._shards: OpenedShards | None = None
        self._pulled_bytes = 0
        self._pull_s = 0.0

    def count_pull(self, received: int, seconds: float) -> None:
        """Account a download; it belongs to the next update, also when it was made to evaluate."""
        self._pulled_bytes += received
        self._pull_s += seconds

    def take_pulls(self) -> tuple[int, float]:
        """Bytes and seconds of downloads since the last update."""
        taken = self._pulled_bytes, self._pull_s
        self._pulled_bytes, self._pull_s = 0, 0.0
        return taken

    @property
    def residuals(self) -> Path:
        """Where what quantisation left out is kept, a folder a job."""
        return self._settings.state_dir / "residuals"

    @property
    def updates(self) -> Path | None:
        """Where an update is kept until it is accepted, to go on with it after a restart; None: nowhere."""
        return self._settings.updates

    @property
    def max_data_bytes(self) -> int:
        """Most that opened shards may take."""
        return self._settings.max_data_bytes

    @property
    def shards(self) -> OpenedShards | None:
        """Opened shards of sealed data. Others take their place; they are erased when the job ends."""
        return self._shards

    @shards.setter
    def shards(self, opened: OpenedShards | None) -> None:
        if self._shards is not None:
            self._shards.erase()
        self._shards = opened
        self._prepared = None

    def has_shards(self, spec: JobSpec, shards: tuple[int, ...]) -> bool:
        """Whether the shards of a job's data are open here."""
        return self._shards is not None and self._shards.holds(spec.data.sealed_digest or "", shards)

    @property
    def base(self) -> Arena:
        """The version to start from."""
        assert self._base is not None  # noqa: S101  allocated before any use
        return self._base.arena

    @property
    def result(self) -> Arena:
        """The trained numbers."""
        assert self._result is not None  # noqa: S101  allocated before any use
        return self._result.arena

    @property
    def limits(self) -> ManifestLimits:
        """Largest model to accept."""
        return ManifestLimits(max_model_bytes=self._settings.max_model_bytes)

    async def prepare(self, assignment: Assignment, *, with_data: bool) -> Manifest:
        """Have the trainer build the network, and load this seat's data; at once when that is done already.

        Raises:
            WorkFailedError: the trainer cannot; says why.
            TrainerEndedError: it ended first.
        """
        trainer = await self._slot.trainer()
        if self._prepared is not None and self._prepared.covers(trainer, assignment, with_data=with_data):
            return self._prepared.manifest
        self._prepared = None
        body: Mapping[str, object] = {
            "spec": assignment.spec.model_dump(mode="json"),
            "seat": assignment.seat,
            "seats": assignment.seats,
            "cache_dir": str(self._settings.cache_dir),
            "catalogue": str(self._settings.catalogue) if self._settings.catalogue else None,
            "with_data": with_data,
        }
        descriptors: tuple[int, ...] = ()
        if with_data and self._shards is not None:
            body = {**body, "sealed": {"manifest": self._shards.manifest, "shards": self._shards.shards}}
            descriptors = (self._shards.descriptor,)
        answer = await trainer.ask("prepare", body, descriptors)
        manifest = Manifest.from_json(str(answer["manifest"]).encode(), self.limits)
        self._prepared = Prepared(trainer, assignment.spec, assignment.seat, assignment.seats, with_data, manifest)
        return manifest

    def allocate(self, manifest: Manifest) -> Arena:
        """Memory for this layout, the old one with its numbers when it fits; they are about to be changed."""
        self.held_sha256 = ""
        if self.manifest is None or self.manifest.sha256 != manifest.sha256:
            self._forget_memory()
            self._base, self._result = SharedArena.create(manifest), SharedArena.create(manifest)
            self.manifest = manifest
        return self.base

    async def ask(self, op: str, body: Mapping[str, object], on_progress: OnProgress | None = None) -> Answer:
        """Give the trainer a command that works on the arenas.

        Raises:
            WorkFailedError: it cannot be done; says why.
            TrainerEndedError: the trainer ended first.
        """
        trainer = await self._slot.trainer()
        await self._attach(trainer)
        return await trainer.ask(op, body, on_progress=on_progress)

    def close(self) -> None:
        """Give the memory back; data that were sealed are erased."""
        self.shards = None
        self._forget_memory()
        self.manifest = None

    async def _attach(self, trainer: Trainer) -> None:
        if trainer is self._attached or self.manifest is None or self._base is None or self._result is None:
            return
        descriptors = (self._base.descriptor, self._result.descriptor)
        await trainer.ask("arenas", {"manifest": self.manifest.to_json().decode()}, descriptors)
        self._attached = trainer

    def _forget_memory(self) -> None:
        for arena in (self._base, self._result):
            if arena is not None:
                arena.close()
        self._base = self._result = self._attached = None
        self.held_sha256 = ""
        self.lesson = None


async def both(first: asyncio.Task[Manifest], second: asyncio.Task[int]) -> tuple[Manifest, int]:
    """Wait for two tasks; when one fails or this is cancelled, end the other."""
    try:
        await asyncio.wait((first, second), return_when=asyncio.FIRST_EXCEPTION)
        for task in (first, second):
            if task.done():
                task.result()
        return first.result(), second.result()
    finally:
        for task in (first, second):
            if not task.done():
                task.cancel()
        await asyncio.wait((first, second))
