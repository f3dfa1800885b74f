"""`python -m cortex`: the same as the `cortex` command."""

from __future__ import annotations

import sys

from cortex.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
