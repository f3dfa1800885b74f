"""The worker: trains on this node's data when the coordinator says so. Only the trainer child imports torch."""
