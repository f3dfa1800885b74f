"""Aggregator: holds model versions, collects the updates of open rounds, turns them into the next version."""
