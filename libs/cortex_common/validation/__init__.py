"""Integrity of data and models."""

from __future__ import annotations

from cortex_common.validation.manager import ValidationManager, l2_norm, sum_of_squares

__all__ = ["ValidationManager", "l2_norm", "sum_of_squares"]
