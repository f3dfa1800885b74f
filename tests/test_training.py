"""Tests of data, models, workers, weights and their aggregation, CortexManager: see tests/areas.py."""
