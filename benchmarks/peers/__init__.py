"""Other systems that get the same work: each in an environment of its own, its parts separate processes."""
