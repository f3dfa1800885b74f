"""A whole network as processes on this machine."""
