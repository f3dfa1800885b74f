"""Shared by every process of Cortex; knows no service."""
