"""Folder: a frozen list of contributions becomes a durable version."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace

from cortex_common.clock import Clock
from cortex_common.codec import WeightCompressor
from cortex_common.errors import UnavailableError
from cortex_common.ids import NodeName, SeatIndex
from cortex_common.security.encryption import EncryptionManager, ObjectHeader, ObjectKind
from cortex_common.tensors import Manifest
from services.aggregator import metrics
from services.aggregator.batches import BatchProcessor, FoldPlan, FoldResult, FoldTargets, Written
from services.aggregator.deltas import delta_header
from services.aggregator.domain import Contribution, RoundTerms
from services.aggregator.rounds import LiveRound
from services.aggregator.states import StatePlan, check_state, state_header
from services.aggregator.strategies import OuterStrategy, create_strategy
from services.aggregator.uploads import in_thread
from services.aggregator.versions import SealedPart, Version, VersionStore


class Folder:
    """Makes versions out of spooled updates."""

    def __init__(
        self,
        name: NodeName,
        network: str,
        versions: VersionStore,
        processor: BatchProcessor,
        encryption: EncryptionManager,
        clock: Clock,
    ) -> None:
        self._name = name
        self._network = network
        self._versions = versions
        self._processor = processor
        self._encryption = encryption
        self._clock = clock

    async def fold(self, live: LiveRound, listed: Sequence[Contribution], sequence: int) -> Version:
        """Fold, and commit the version.

        Raises:
            CorruptError: an update or the base no longer opens.
            UnavailableError: the data key is not here.
        """
        started_s = self._clock.monotonic_s()
        version = await in_thread(lambda: self._fold(live, listed, sequence), self._processor.leads)
        metrics.FOLD_SECONDS.observe(self._clock.monotonic_s() - started_s)
        return version

    def _fold(self, live: LiveRound, listed: Sequence[Contribution], sequence: int) -> Version:
        with ExitStack() as files:
            plan = self._plan(live, listed, files)
            return self._written(plan, tuple(listed), sequence, tuple(sorted(live.terms.members)))

    def _plan(self, live: LiveRound, listed: Sequence[Contribution], files: ExitStack) -> FoldPlan:
        """Everything a fold reads, opened; closed again with `files`."""
        terms = live.terms
        spools = [live.spool(each.seat) for each in listed]
        strategy = create_strategy(terms.strategy, terms.strategy_options)
        base = self._base(live)
        manifest = base.manifest if base else Manifest.from_json(spools[0].header.manifest)
        header = self._header(live, spools[0].header, manifest)
        reader, state, delta = None, None, None
        if base is not None:
            check_base(base, terms, strategy)
            reader = self._versions.open(base)
            files.callback(reader.close)
            codec = WeightCompressor.from_wire(terms.download_codec, terms.download_options)
            delta = delta_header(header, base.sha256, codec)
            state = self._state(base, state_header(header, strategy, has_residual=delta is not None), files)
        return FoldPlan(manifest, reader, spools, [each.weight for each in listed], strategy, header, state, delta)

    def _state(self, base: Version, target: ObjectHeader | None, files: ExitStack) -> StatePlan | None:
        """The state to go on from and the one to write."""
        former = self._versions.open_state(base)
        if former is not None:
            files.callback(former.close)
        return StatePlan(target, former) if target is not None or former is not None else None

    def _written(
        self, plan: FoldPlan, listed: tuple[Contribution, ...], sequence: int, readers: tuple[NodeName, ...]
    ) -> Version:
        """Blobs first, facts last: a version exists once its facts do."""
        state = plan.state.header if plan.state else None
        with self._versions.draft(plan.header, state, plan.delta) as draft:
            targets = FoldTargets(draft.values, draft.state, draft.delta)
            result: FoldResult = self._processor.fold(plan, self._encryption, targets)
            version = Version(
                header=result.header,
                sizes=result.values.sizes,
                content_sha256=result.values.content_sha256,
                blob=draft.blob,
                file_bytes=plan.manifest.file_bytes,
                update_norm=result.update_norm,
                contributions=listed,
                sequence=sequence,
                created_s=self._clock.wall_s(),
                state=_part(state, result.state, draft.state_blob),
                delta=_part(_named(plan.delta, result.header.model_sha256), result.delta, draft.delta_blob),
                readers=readers,
            )
            draft.commit(version)
        return version

    def _header(self, live: LiveRound, update: ObjectHeader, manifest: Manifest) -> ObjectHeader:
        """The new version's header; its digest follows once it is known."""
        key = live.terms.key
        if not self._encryption.has(update.key_id):
            raise UnavailableError(f"{key}: its data key is not here; open the round again")
        return ObjectHeader(
            kind=ObjectKind.MODEL,
            network=self._network,
            job_id=key.job_id,
            round=key.round,
            attempt=key.attempt,
            fence=live.terms.fence,
            sender=self._name,
            seat=SeatIndex(0),
            key_id=update.key_id,
            codec="none",
            codec_options="{}",
            chunk_elements=live.terms.chunk_elements,
            elements=manifest.elements,
            counters=manifest.counters,
            chunks=update.chunks,
            manifest_sha256=manifest.sha256,
            manifest=manifest.to_json(),
        ).fresh()

    def _base(self, live: LiveRound) -> Version | None:
        if not live.terms.base_sha256:
            return None
        return self._versions.by_sha256(live.terms.key.job_id, live.terms.base_sha256)


def _part(header: ObjectHeader | None, written: Written, blob: str) -> SealedPart | None:
    return SealedPart(header, written.sizes, blob, written.content_sha256) if header is not None else None


def _named(delta: ObjectHeader | None, model_sha256: str) -> ObjectHeader | None:
    """A delta says which version it gives; that is known at its end."""
    return replace(delta, model_sha256=model_sha256) if delta is not None else None


def check_base(base: Version, terms: RoundTerms, strategy: OuterStrategy) -> None:
    """A round can go on from this version.

    Raises:
        PreconditionError: it was made with another strategy, other options or other chunks; says which.
        CorruptError: its outer state is not its own.
    """
    check_state(base.header, base.state.header if base.state else None, strategy, terms.chunk_elements)
