"""Tests of discovery, gateway, messages, WebSocket, calls over mutual TLS: see tests/areas.py."""
