"""The answer to a whole, verified and durable update."""

from __future__ import annotations

from dataclasses import dataclass

from cortex_common.ids import JobId, NodeName, RoundNumber, SeatIndex, Sha256Hex


@dataclass(frozen=True, slots=True)
class Receipt:
    """Proof that an update counts. `sequence` is the order of acceptance at its aggregator."""

    job_id: JobId
    round: RoundNumber
    attempt: int
    seat: SeatIndex
    worker: NodeName
    content_sha256: Sha256Hex
    weight: float
    size_bytes: int
    sequence: int
    newly_accepted: bool = True


@dataclass(frozen=True, slots=True)
class PushResult:
    """What an upload came to: the receipt, and the sealed bytes sent for it over all attempts."""

    receipt: Receipt
    bytes_up: int
