"""Tests of keys, authorisation, tampering, fuzzing, revocation, rotation: see tests/areas.py."""
