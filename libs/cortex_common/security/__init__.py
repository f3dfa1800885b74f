"""Certificates, sealing and keys."""
