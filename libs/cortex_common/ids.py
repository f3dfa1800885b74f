"""Names and numbers that must not be mixed up."""

from __future__ import annotations

from typing import NewType

JobId = NewType("JobId", str)
NodeName = NewType("NodeName", str)
KeyId = NewType("KeyId", str)
Sha256Hex = NewType("Sha256Hex", str)
RoundNumber = NewType("RoundNumber", int)
SeatIndex = NewType("SeatIndex", int)

# Whose a job is that nobody says otherwise.
DEFAULT_ORG = "default"
