"""What Cortex costs: seconds, CPU-seconds, bytes and memory, measured on real processes."""
