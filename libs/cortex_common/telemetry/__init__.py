"""Metrics, resource probes and the HTTP endpoints operators scrape."""
