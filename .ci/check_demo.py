"""Asserts that the demo completed, accurate enough, and that the file it left is the model it reports."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

LEAST_ACCURACY = {"demo-fashion-mnist": 0.865, "demo-digits": 0.93}
MOST_ROUNDS = {"demo-fashion-mnist": 8, "demo-digits": 15}


def mistakes(status: dict, model: Path) -> list[str]:
    """What is wrong with the final status and the model file; empty when all is well."""
    name, history = status["name"], status["history"]
    best = max((report.get("test_accuracy", 0.0) for report in history), default=0.0)
    digest = hashlib.sha256(model.read_bytes()).hexdigest()
    sys.stdout.write(f"{name}: {status['status']}, {len(history)} rounds, best test accuracy {best:.4f}\n")
    if name == "demo-digits":
        sys.stdout.write("ATTENTION: Fashion-MNIST could not be had on this machine; the demo ran on digits instead\n")
    found = []
    if status["status"] != "completed":
        found.append(f"status {status['status']}, error {status['error']}")
    if best < LEAST_ACCURACY[name]:
        found.append(f"best test accuracy {best:.4f}; at least {LEAST_ACCURACY[name]} expected")
    if len(history) > MOST_ROUNDS[name]:
        found.append(f"{len(history)} rounds; at most {MOST_ROUNDS[name]} expected")
    if digest != status["model"]["sha256"]:
        found.append(f"the model file has sha256 {digest}, the status says {status['model']['sha256']}")
    return found


def main() -> int:
    """Check the output named first against the model named second."""
    output, model = map(Path, sys.argv[1:])
    found = mistakes(json.loads(output.read_text().splitlines()[-1]), model)
    for mistake in found:
        sys.stdout.write(f"FAILED: {mistake}\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
