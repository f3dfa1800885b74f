"""Runs pip-audit over the packages installed here, and says loudly when nobody could be asked about them."""

from __future__ import annotations

import json
import os
import subprocess
import sys

TIMEOUT_S = 25
# Advisories that were read and do not concern this project: id, and why.
ACCEPTED: dict[str, str] = {}


def main() -> int:
    """1 if a package has an advisory that was not accepted; 0 if none has, or nobody could be asked."""
    command = [sys.executable, "-m", "pip_audit", "--format", "json", "--progress-spinner", "off", "--timeout", "5"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
        packages = json.loads(done.stdout)["dependencies"]
    except (subprocess.TimeoutExpired, json.JSONDecodeError, KeyError) as error:
        return _not_audited(f"no advisory source answered ({type(error).__name__})")
    audited = [package for package in packages if "vulns" in package]
    if not audited:
        return _not_audited("the package index here knows no advisories")
    found = [
        f"{package['name']} {package['version']}: {flaw['id']}, fix: {', '.join(flaw['fix_versions']) or 'none yet'}"
        for package in audited
        for flaw in package["vulns"]
        if not {flaw["id"], *flaw.get("aliases", ())} & set(ACCEPTED)
    ]
    print(f"{len(audited)} of {len(packages)} packages audited, {len(found)} advisories")
    print("\n".join(found), end="\n" if found else "")
    return 1 if found else 0


def _not_audited(reason: str) -> int:
    bold, plain = ("\033[1;31m", "\033[0m") if sys.stdout.isatty() and "NO_COLOR" not in os.environ else ("", "")
    print(f"{bold}*** THE INSTALLED PACKAGES WERE NOT AUDITED: {reason}.{plain}")
    print(f"{bold}*** Run `make check` where pypi.org can be reached.{plain}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
