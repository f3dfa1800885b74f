"""The benchmark's tasks as a Flower app."""
