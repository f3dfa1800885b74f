"""Integrity of data and models."""

from __future__ import annotations

from cortex_common.validation.manager import ValidationManager, l2_norm

__all__ = ["ValidationManager", "l2_norm"]
