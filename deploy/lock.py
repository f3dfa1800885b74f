#!/usr/bin/env python3
"""Write deploy/requirements/<service>.txt: every package an image installs, with its version and digest.

Run inside the base image, which decides which files fit (`make lock` does). PyTorch is left out: its builds differ.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
EXTRAS = {
    "coordinator": ["coordinator", "postgres"],
    "discovery": ["discovery", "postgres"],
    "aggregator": ["fast", "s3"],
    "gateway": ["gateway"],
    "worker": ["worker", "fast"],
}
TOOLS = {"build": ["hatchling>=1.25"], "sbom": ["cyclonedx-bom>=7"]}
LEFT_OUT = ("torch", "triton", "nvidia-", "cortex-training", "cuda-")


def resolve(*wanted: str) -> str:
    """Lines of a requirements file."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed", "--report", "-"]
    report = subprocess.run([*command, "--only-binary", ":all:", *wanted], check=True, stdout=subprocess.PIPE).stdout
    lines = []
    for each in json.loads(report)["install"]:
        name, version = each["metadata"]["name"].lower().replace("_", "-"), each["metadata"]["version"]
        if not name.startswith(LEFT_OUT) or name == "nvidia-ml-py":
            digest = each["download_info"]["archive_info"]["hashes"]["sha256"]
            lines.append(f"{name}=={version} --hash=sha256:{digest}\n")
    return "".join(sorted(lines))


def main() -> None:
    """Resolve everything anew."""
    for name, wanted in TOOLS.items():
        (HERE / "requirements" / f"{name}.txt").write_text(resolve(*wanted))
    for service, extras in EXTRAS.items():
        text = resolve(f"{HERE.parent}[{','.join(extras)}]")
        (HERE / "requirements" / f"{service}.txt").write_text(text)
        print(f"{service}: {text.count(chr(10))} packages")


if __name__ == "__main__":
    main()
