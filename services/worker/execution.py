"""Doing one piece of work, from the pull of the base to the receipt of the update."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import grpc.aio

from cortex_common.clock import Clock
from cortex_common.errors import CortexError, InvalidArgumentError, OverloadedError
from cortex_common.ids import NodeName, Sha256Hex
from cortex_common.job.site_policy import update_bytes
from cortex_common.logging import get_logger
from cortex_common.network.work import (
    Assignment,
    Evaluate,
    Evaluated,
    Failed,
    Hold,
    Initialise,
    SliceScore,
    Trained,
)
from cortex_common.security.encryption import EncryptionManager, ObjectHeader
from cortex_common.security.sealing import SealingKey
from cortex_common.tensors import Manifest
from cortex_common.transfer import PushResult, pull_model, push_update
from cortex_common.transfer.pacing import Paces
from cortex_common.transfer.push import EncodeChunk
from cortex_common.transfer.retrying import on_thread
from cortex_common.transfer.warming import CodecWarmer
from services.worker import metrics
from services.worker.domain import Held, Outcome
from services.worker.failures import FeedbackLostError, TrainerEndedError, UpdateLostError, WorkFailedError
from services.worker.kept_update import Outbox
from services.worker.outgoing import Outgoing
from services.worker.shards import open_shards
from services.worker.trainer_line import Answer
from services.worker.updates import DeltaEncoder, codec_of, download_codec_of, feedback_of, header_of, seed_of
from services.worker.workbench import Lesson, Workbench, both

_log = get_logger(__name__)

Tell = Callable[[str, float, Mapping[str, float]], None]
"""Told what is being done, how far (0 to 1), and figures."""


class Channels(Protocol):
    """Finds the data-plane channel to an aggregator."""

    def to(self, address: str, aggregator: str) -> grpc.aio.Channel:
        """A channel; the same one for the same address and name."""


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What work needs besides its assignment. `on_sealed` is called before data that are sealed are opened."""

    network: str
    name: NodeName
    channels: Channels
    clock: Clock
    sealing: SealingKey
    outgoing: Outgoing | None = None
    paces: Paces = field(default_factory=Paces)
    warmer: CodecWarmer = field(default_factory=CodecWarmer)
    on_sealed: Callable[[], None] = lambda: None


class Execution:
    """One assignment being carried out. `current` is it as last heard: fence, key and address may change meanwhile."""

    def __init__(
        self, current: Callable[[], Assignment], bench: Workbench, surroundings: Surroundings, tell: Tell
    ) -> None:
        self._current = current
        self._bench = bench
        self._around = surroundings
        self._tell = tell
        self._exchange_s = 0.0

    async def run(self) -> Outcome:
        """Do the work; whatever goes wrong is an outcome too. Cancelling this cancels the work."""
        assignment = self._current()
        try:
            match assignment.work:
                case Initialise():
                    return await self._initialise()
                case Evaluate():
                    return await self._evaluate(assignment.work)
                case Hold():
                    await self._prepare(with_data=True)
                    return Held()
                case _:
                    return await self._train()
        except WorkFailedError as error:
            return Failed(error.message, error.is_permanent)
        except TrainerEndedError as error:
            return Failed(error.message, False)
        except CortexError as error:
            return Failed(f"{self._doing}: {error.message}", False)
        except (MemoryError, OSError) as error:
            return Failed(f"{self._doing}: {type(error).__name__}: {error}", False)

    _doing = "starting"

    async def _initialise(self) -> Outcome:
        if (sent := await self._resume()) is not None:
            return sent
        with self._phase("building the model", "initialise"):
            manifest = await self._prepare(with_data=False)
            self._bench.allocate(manifest)
            self._bench.lesson = None
            await self._bench.ask("initialise", {})
        answer = {"steps": 0, "examples": 0, "seconds": 0.0, "metrics": {}}
        return self._trained(await self._push(manifest, answer, weight=1.0), answer)

    async def _train(self) -> Outcome:
        assignment = self._current()
        lesson = Lesson(assignment.round, assignment.seat, assignment.base_sha256)
        known = self._bench.lesson
        if known is not None and known[0] == lesson:
            # The round is tried again: the same work would give the same numbers.
            await self._pull()
            answer = known[1]
        elif (sent := await self._resume()) is not None:
            return sent
        else:
            answer = await self._learn(lesson)
        assert self._bench.manifest is not None  # noqa: S101  set by the pull
        pushed = await self._push(self._bench.manifest, answer, weight=float(answer["partition_examples"]))
        return self._trained(pushed, answer)

    async def _learn(self, lesson: Lesson) -> Answer:
        """Train, and remember what the result arena holds from then on."""
        assignment = self._current()
        self._bench.lesson = None
        await self._ready(with_data=True)
        self._tell("training", 0.0, {})
        with self._phase("training", "train"):
            body = {"round": assignment.round, "seat": assignment.seat, "seats": assignment.seats}
            answer = await self._bench.ask("train", body, self._on_training)
        metrics.STEPS.inc(answer["steps"])
        metrics.EXAMPLES.inc(answer["examples"])
        self._bench.lesson = (lesson, answer)
        return answer

    async def _evaluate(self, work: Evaluate) -> Outcome:
        await self._ready(with_data=False)
        with self._phase("evaluating", "evaluate"):
            answer = await self._bench.ask("evaluate", {"slices": list(work.slices), "of": work.of})
        return Evaluated(
            tuple(
                SliceScore(int(each["slice"]), int(each["examples"]), float(each["loss_sum"]), int(each["correct"]))
                for each in answer["slices"]
            )
        )

    async def _ready(self, *, with_data: bool) -> None:
        """Network and data in the trainer, the base version in the arena: both at the same time."""
        self._around.warmer.want(codec_of(self._current()))
        self._around.warmer.want(download_codec_of(self._current()))
        prepare = asyncio.create_task(self._prepare(with_data=with_data))
        pull = asyncio.create_task(self._pull())
        self._tell("loading data" if with_data else "pulling", 0.0, {})
        own, _ = await both(prepare, pull)
        held = self._bench.manifest
        if held is None or held.sha256 != own.sha256:
            raise WorkFailedError(
                f"the version to start from has another layout ({held.elements if held else 0} numbers) than the job's "
                f"model ({own.elements})",
                is_permanent=True,
            )

    async def _prepare(self, *, with_data: bool) -> Manifest:
        """Network and, if wanted, data in the trainer; shards that are sealed are opened first, unless they are."""
        assignment = self._current()
        part = assignment.sealed
        if with_data and part is not None and not self._bench.has_shards(assignment.spec, part.shards):
            self._around.on_sealed()
            try:
                self._bench.shards = await open_shards(
                    assignment,
                    part,
                    self._around.sealing,
                    self._channel,
                    self._bench.max_data_bytes,
                    lambda share: self._tell("fetching data", share, {}),
                    clock=self._around.clock,
                    pace=self._around.paces.down,
                )
            except CortexError as error:
                raise WorkFailedError(f"data.train: {error.message}", is_permanent=False) from error
        return await self._bench.prepare(assignment, with_data=with_data)

    async def _pull(self) -> int:
        """Fetch the base version, unless it is held: whole, or what makes it of the one held. Bytes received."""
        assignment = self._current()
        wanted = assignment.base_sha256
        if not wanted:
            raise InvalidArgumentError(f"round {assignment.round} has no version to start from")
        if self._bench.held_sha256 == wanted:
            return 0
        with self._phase("pulling", "pull"):
            started_s = self._around.clock.monotonic_s()
            result = await pull_model(
                self._channel,
                assignment.job_id,
                Sha256Hex(wanted),
                self._bench.held_sha256,
                self._encryption(assignment),
                self._bench.allocate,
                assignment.round,
                lambda done, total: self._tell("pulling", done / total, {}),
                limits=self._bench.limits,
                clock=self._around.clock,
                pace=self._around.paces.down,
            )
            self._bench.count_pull(result.bytes_down, self._around.clock.monotonic_s() - started_s)
        self._bench.held_sha256 = wanted
        metrics.BYTES_DOWN.inc(result.bytes_down)
        return result.bytes_down

    async def _resume(self) -> Trained | None:
        """Go on with the upload in which this node was killed; None if there is none, and the work has to be done."""
        assignment = self._current()
        if self._bench.updates is None:
            return None
        box = Outbox(self._bench.updates, assignment.job_id)
        kept, codec = await on_thread(box.load), codec_of(assignment)
        header = kept.header_for(assignment, (codec.codec, codec.options_json)) if kept is not None else None
        if kept is None or header is None:
            return None
        _log.info("upload_resumed", job_id=assignment.job_id, round=assignment.round, seat=assignment.seat)
        encryption = self._encryption(assignment)
        try:
            payload = kept.encoder(encryption)
            if header != kept.header:
                kept = await on_thread(partial(box.keep, header, kept.answer, payload, encryption))
                payload = kept.encoder(encryption)
            await self._reserve(assignment)
            return self._trained(await self._upload(header, payload, encryption), kept.answer)
        except (UpdateLostError, OSError) as error:
            _log.warning("kept_update_not_readable", job_id=assignment.job_id, reason=str(error))
            await on_thread(box.forget)
            return None
        except CortexError:
            # Refused; asked for again, the work is done again.
            await on_thread(box.forget)
            raise

    async def _push(self, manifest: Manifest, answer: Answer, *, weight: float) -> PushResult:
        """Send the update. A worker whose disk is full or damaged sends it without error feedback, and goes on."""
        assignment = self._current()
        if assignment.base_sha256 and assignment.spec.compression.feeds_back:
            # Once more for an earlier update that cannot be read: without it this one can still be kept.
            for _ in range(2):
                try:
                    return await self._send(manifest, answer, weight, feeds_back=True)
                except FeedbackLostError as error:
                    facts = {"job_id": assignment.job_id, "round": assignment.round, "seat": assignment.seat}
                    _log.warning("error_feedback_lost", reason=error.message, **facts)
        return await self._send(manifest, answer, weight, feeds_back=False)

    async def _send(self, manifest: Manifest, answer: Answer, weight: float, *, feeds_back: bool) -> PushResult:
        """Send the update as an object of its own, to where its aggregator is at each attempt."""
        assignment = self._current()
        codec = codec_of(assignment)
        header = header_of(assignment, manifest, codec, self._around.network, self._around.name, weight)
        encryption = self._encryption(assignment)
        feedback = None
        if feeds_back:
            feedback = await asyncio.to_thread(feedback_of, self._bench, assignment, header, codec, encryption)
        is_first = not assignment.base_sha256
        encoder = DeltaEncoder(self._bench, codec, seed_of(assignment), is_first=is_first, feedback=feedback)
        await self._reserve(assignment)
        try:
            payload = await self._kept(header, answer, encoder.encode, encryption)
            return await self._upload(header, payload, encryption)
        finally:
            if feedback is not None:
                feedback.close()

    async def _kept(
        self, header: ObjectHeader, answer: Answer, encode: EncodeChunk, encryption: EncryptionManager
    ) -> EncodeChunk:
        """Keep the update before its first byte is sent, where that is done; gives its payloads."""
        if self._bench.updates is None:
            return encode
        box = Outbox(self._bench.updates, self._current().job_id)
        try:
            kept = await on_thread(partial(box.keep, header, answer, encode, encryption))
        except (OverloadedError, OSError) as error:
            _log.warning("update_not_kept", job_id=header.job_id, round=header.round, reason=str(error))
            return encode
        return kept.encoder(encryption)

    async def _upload(self, header: ObjectHeader, encode: EncodeChunk, encryption: EncryptionManager) -> PushResult:
        """Send an object until it is accepted."""
        assignment = self._current()
        with self._phase("uploading", "push"):
            started_s = self._around.clock.monotonic_s()
            pushed = await push_update(
                self._channel,
                header,
                encode,
                encryption,
                lambda done, total: self._tell("uploading", done / total, {}),
                clock=self._around.clock,
                pace=self._around.paces.up,
            )
            self._exchange_s += self._around.clock.monotonic_s() - started_s
        metrics.BYTES_UP.inc(pushed.bytes_up)
        if self._around.outgoing is not None:
            count = self._around.outgoing.settle
            await asyncio.to_thread(count, assignment.job_id, update_bytes(assignment.spec), pushed.bytes_up)
        if self._bench.updates is not None:
            await on_thread(Outbox(self._bench.updates, assignment.job_id).forget)
        return pushed

    def _encryption(self, assignment: Assignment) -> EncryptionManager:
        """Seals and opens with the keys that came with the assignment."""
        keys = (assignment.data_key, *assignment.older_keys)
        return EncryptionManager(*(self._around.sealing.unwrap(assignment.job_id, key) for key in keys))

    async def _reserve(self, assignment: Assignment) -> None:
        """Count the update as sent before its first byte: a site may limit what leaves it."""
        if self._around.outgoing is not None:
            count = self._around.outgoing.reserve
            await asyncio.to_thread(count, assignment.job_id, update_bytes(assignment.spec))

    def _channel(self) -> grpc.aio.Channel:
        """To the aggregator, wherever it is by now; looked up for each attempt of a transfer."""
        assignment = self._current()
        return self._around.channels.to(assignment.aggregator_address, assignment.aggregator)

    def _trained(self, pushed: PushResult, answer: Answer) -> Trained:
        bytes_down, pull_s = self._bench.take_pulls()
        return Trained(
            receipt=pushed.receipt,
            train_seconds=float(answer["seconds"]),
            exchange_seconds=self._exchange_s + pull_s,
            examples=int(answer["examples"]),
            steps=int(answer["steps"]),
            metrics=dict(answer["metrics"]),
            bytes_up=pushed.bytes_up,
            bytes_down=bytes_down,
        )

    def _on_training(self, progress: Answer) -> None:
        figures = {"train_loss": float(progress["loss"]), "steps_per_s": float(progress["steps_per_s"])}
        self._tell("training", float(progress["share"]), figures)

    @contextmanager
    def _phase(self, doing: str, name: str) -> Iterator[None]:
        self._doing = doing
        self._tell(doing, 0.0, {})
        with metrics.PHASE_SECONDS.labels(name).time():
            yield
