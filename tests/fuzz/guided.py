"""The process in which atheris (libFuzzer) fuzzes one decoder, with what can branch on its input instrumented.

python -m tests.fuzz.guided NAME FINDINGS_FOLDER [LIBFUZZER_OPTION …]
"""

from __future__ import annotations

import sys
import tempfile

import atheris

with atheris.instrument_imports(include=["cortex", "cortex_common", "services", "yaml", "jwt"]):
    from tests.fuzz.targets import TARGETS

from tests.fuzz.harness import CORPUS, HANG_S, MORE_MEMORY_BYTES, Ran, check_one, memory_bytes

GROWN = CORPUS.parent / ".grown"


def main() -> None:
    name, found, *options = sys.argv[1:]
    target, grown = TARGETS[name], GROWN / name
    # libFuzzer ends the process before Python could clean up: whoever started it does.
    tempfile.tempdir = found
    grown.mkdir(parents=True, exist_ok=True)
    for number, data in enumerate(target.seeds()):
        (grown / f"seed-{number}").write_bytes(data)

    def one(data: bytes) -> None:
        check_one(target, data, Ran())

    one(b"")
    rss_mb = memory_bytes() >> 20
    print(f"stat::started_rss_mb: {rss_mb}", flush=True)
    limits = [f"-rss_limit_mb={rss_mb + (MORE_MEMORY_BYTES >> 20)}", f"-timeout={HANG_S:g}", "-max_len=65536"]
    folders = [str(grown), *([str(CORPUS / name)] if (CORPUS / name).is_dir() else [])]
    said = ["-verbosity=0", "-print_final_stats=1", f"-artifact_prefix={found}/found-"]
    atheris.Setup([sys.argv[0], *limits, *said, *options, *folders], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
