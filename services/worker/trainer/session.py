"""What the trainer child does for its worker: one command after another, an answer to each."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch

from cortex_common.clock import Clock
from cortex_common.errors import CortexError, InvalidArgumentError
from cortex_common.job.parse import parse_job
from cortex_common.job.spec import JobSpec
from cortex_common.model import copy_to_arena, load_tensors, manifest_of
from cortex_common.tensors import Arena, Float32s, Int64s, Manifest, read_safetensors
from services.worker.failures import WorkCancelledError, WorkFailedError
from services.worker.link import ChildLink, Message
from services.worker.shared_arena import SharedArena
from services.worker.trainer.device import choose_device
from services.worker.trainer.examples import DataCache, JobData
from services.worker.trainer.loop import ModelTrainer, Progress
from services.worker.trainer.sealed import ShardData

# What torch raises: a broken or full device looks like a mistake in the job, so another node is to try. Anything else
# ends the process, which the worker reports too.
_ERRORS = (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError, NotImplementedError)


OpenData = Callable[[JobSpec, Mapping[str, Any]], JobData]
"""Gives the data of a job, with what the worker's `prepare` said about places."""


def open_catalogue(spec: JobSpec, message: Mapping[str, Any]) -> JobData:
    """The datasets in this node's catalogue."""
    catalogue = Path(message["catalogue"]) if message["catalogue"] else None
    return DataCache(spec, Path(message["cache_dir"]), catalogue)


class Session:
    """State of the child: the job, its network, its data, the two arenas."""

    def __init__(
        self,
        link: ChildLink,
        device: str,
        clock: Clock,
        open_data: OpenData = open_catalogue,
        on_gone: Callable[[], None] = lambda: os._exit(0),
        on_sealed: Callable[[], None] = lambda: None,
    ) -> None:
        """Wait for commands.

        Args:
            link: To the worker.
            device: What `auto` means here.
            clock: Measures and limits the training.
            open_data: Gives the data of a job.
            on_gone: Called when the worker goes in the middle of work; ends the process.
            on_sealed: Called before data that were sealed are taken out of the worker's memory.
        """
        self._link = link
        self._open_data = open_data
        self._on_gone = on_gone
        self._on_sealed = on_sealed
        self._device_rule = device
        self._clock = clock
        self._work_id: object = None
        self._spec: JobSpec | None = None
        self._trainer: ModelTrainer | None = None
        self._data: JobData | None = None
        self._device = torch.device("cpu")
        self._arenas: tuple[Arena, Arena] | None = None
        self._commands: Mapping[str, Callable[[Mapping[str, Any]], Message]] = {
            "initialise": self._initialise,
            "train": self._train,
            "evaluate": self._evaluate,
        }

    def serve(self) -> None:
        """Answer commands until the worker is gone."""
        while (received := self._link.receive()) is not None:
            message, descriptors = received
            if message.get("op") == "cancel":
                continue
            self._work_id = message.get("id")
            self._link.send({"id": self._work_id, **self._answer(message, descriptors)})

    def _answer(self, message: Message, descriptors: Sequence[int]) -> Message:
        try:
            if message["op"] == "arenas":
                return {"done": self._attach(str(message["manifest"]), descriptors)}
            if message["op"] == "prepare":
                return {"done": self._prepare(message, descriptors)}
            return {"done": self._commands[str(message["op"])](message)}
        except WorkCancelledError:
            return {"cancelled": True}
        except WorkFailedError as error:
            return _failure(error.message, error.is_permanent)
        except CortexError as error:
            return _failure(error.message, isinstance(error, InvalidArgumentError))
        except (torch.OutOfMemoryError, MemoryError) as error:
            return {**_failure(f"out of memory: {error}", False), "tainted": True}
        except _ERRORS as error:
            return {**_failure(f"{type(error).__name__}: {error}", False), "tainted": True}

    def _prepare(self, message: Mapping[str, Any], descriptors: Sequence[int]) -> Message:
        """Build the network and load this seat's data, unless that is done; answers with the layout.

        Data that were sealed come opened, in memory behind a descriptor.
        """
        spec = parse_job(cast("Mapping[str, object]", message["spec"]))
        if spec != self._spec or self._trainer is None or self._data is None:
            self._device = choose_device(spec.training.device, self._device_rule)
            self._trainer = ModelTrainer(spec, self._device, self._clock)
            self._data = self._open_data(spec, message)
            self._spec = spec
        if descriptors:
            self._on_sealed()
            self._data = ShardData.of(spec, message["sealed"], descriptors[0], self._data)
        if message["with_data"]:
            self._data.training_part(message["seat"], message["seats"], self._device)
        return {"manifest": manifest_of(self._trainer.model).to_json().decode(), "device": str(self._device)}

    def _attach(self, manifest_json: str, descriptors: Sequence[int]) -> Message:
        """Take over the shared memory of base and result."""
        trainer, _, _ = self._job()
        manifest = Manifest.from_json(manifest_json.encode())
        shared = [SharedArena(descriptor, manifest) for descriptor in descriptors]
        for each in shared:
            each.close()
        if manifest.sha256 != manifest_of(trainer.model).sha256:
            raise InvalidArgumentError("the arenas have another layout than the job's model")
        self._arenas = (shared[0].arena, shared[1].arena)
        return {}

    def _initialise(self, _message: Mapping[str, Any]) -> Message:
        """Write the initial weights into the result arena."""
        trainer, _, spec = self._job()
        fresh = ModelTrainer(spec, torch.device("cpu"), self._clock)
        source = spec.model.init_from
        if source is not None:
            load_tensors(fresh.model, _weights(source), source)
        copy_to_arena(fresh.model, self._memory()[1])
        return {"parameters": trainer.model.parameter_count}

    def _train(self, message: Mapping[str, Any]) -> Message:
        trainer, data, _ = self._job()
        base, result = self._memory()
        examples = data.training_part(message["seat"], message["seats"], self._device)
        outcome = trainer.train(
            base,
            result,
            examples,
            round_number=message["round"],
            seat=message["seat"],
            check=self._check,
            tell=self._tell,
        )
        return {**asdict(outcome), "partition_examples": len(examples)}

    def _evaluate(self, message: Mapping[str, Any]) -> Message:
        trainer, data, _ = self._job()
        version = self._memory()[0]
        parts = (data.test_slice(index, message["of"], self._device) for index in message["slices"])
        scores = trainer.evaluate(version, parts, self._check)
        slices = zip(message["slices"], scores, strict=True)
        return {"slices": [{"slice": index, **asdict(score)} for index, score in slices]}

    def _check(self) -> None:
        """Stop the work in hand when the worker says so, or is gone."""
        while self._link.has_message():
            received = self._link.receive()
            if received is None:
                self._on_gone()
                raise WorkCancelledError("the worker is gone")
            if received[0].get("op") == "cancel" and received[0].get("id") == self._work_id:
                raise WorkCancelledError("cancelled")

    def _tell(self, progress: Progress) -> None:
        self._link.send({"id": self._work_id, "progress": asdict(progress)})

    def _job(self) -> tuple[ModelTrainer, JobData, JobSpec]:
        if self._trainer is None or self._data is None or self._spec is None:
            raise WorkFailedError("the trainer has no job yet", is_permanent=False)
        return self._trainer, self._data, self._spec

    def _memory(self) -> tuple[Arena, Arena]:
        if self._arenas is None:
            raise WorkFailedError("the trainer has no arenas yet", is_permanent=False)
        return self._arenas


def _weights(source: str) -> Mapping[str, Float32s | Int64s]:
    if not source.endswith(".safetensors"):
        raise InvalidArgumentError(
            f"model.init_from: {source!r} given; allowed here: a .safetensors file on the workers"
        )
    try:
        return read_safetensors(Path(source))
    except InvalidArgumentError as error:
        # Another node may have the file, or have it whole.
        raise WorkFailedError(error.message, is_permanent=False) from error


def _failure(reason: str, is_permanent: bool) -> Message:
    return {"failed": reason, "permanent": is_permanent}
