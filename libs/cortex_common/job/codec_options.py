"""The codecs and their options: what exists, what is the default, what is allowed.

Data only: who encodes and who validates a job file read the same table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from cortex_common.errors import Violation

CodecName = Literal["none", "bf16", "int8", "int4", "topk"]
OptionValue = bool | int | float | str


@dataclass(frozen=True, slots=True)
class CodecOption:
    """One option: its default, and what is allowed, as a sentence and as a test."""

    default: OptionValue
    allowed: str
    accepts: Callable[[object], bool]


def _is_block(value: object) -> bool:
    return type(value) is int and 16 <= value <= 65536 and not value & (value - 1)


def _is_density(value: object) -> bool:
    return type(value) is float and 0.0005 <= value <= 0.5


def _block(default: int) -> CodecOption:
    return CodecOption(default, "a power of two from 16 to 65536", _is_block)


_STOCHASTIC = CodecOption(False, "true or false", lambda value: isinstance(value, bool))

CODEC_OPTIONS: Mapping[CodecName, Mapping[str, CodecOption]] = {
    "none": {},
    "bf16": {},
    "int8": {"block": _block(256), "stochastic": _STOCHASTIC},
    "int4": {"block": _block(128), "stochastic": _STOCHASTIC},
    "topk": {
        "density": CodecOption(0.01, "a number from 0.0005 to 0.5", _is_density),
        "values": CodecOption("int8", "int8 or fp32", lambda value: value in ("int8", "fp32")),
        "stochastic": _STOCHASTIC,
    },
}
CODECS: tuple[CodecName, ...] = get_args(CodecName)


def codec_violations(codec: CodecName, options: Mapping[str, object]) -> list[Violation]:
    """Everything wrong with a codec's options; each path is the option's name."""
    known = CODEC_OPTIONS[codec]
    names = ", ".join(sorted(known)) or "none"
    violations = []
    for name, value in options.items():
        if name not in known:
            violations.append(Violation(name, f"unknown option of codec {codec}; allowed: {names}"))
        elif not known[name].accepts(value):
            message = f"{_shown(value)} given; allowed with codec {codec}: {known[name].allowed}"
            violations.append(Violation(name, message))
    return violations


def with_defaults(codec: CodecName, options: Mapping[str, OptionValue]) -> dict[str, OptionValue]:
    """Every option of a codec: as given, or its default."""
    return {name: options.get(name, option.default) for name, option in CODEC_OPTIONS[codec].items()}


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
