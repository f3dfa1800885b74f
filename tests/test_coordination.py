"""Tests of jobs, rounds, placement, the stores behind them: see tests/areas.py."""
