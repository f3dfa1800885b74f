"""Tables of what is measured beside rounds: each shows what it says it does."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import channel, channel_return, channel_silence, regions, worker_memory

MB = 1_000_000


def cells(table: str) -> list[list[str]]:
    rows = [line for line in table.splitlines() if line.startswith("| ")][1:]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def worker(**changed: int) -> dict[str, Any]:
    sizes = {"model_bytes": 40 * MB, "training_bytes": 80 * MB, "idle_bytes": 700 * MB, "peak_bytes": 830 * MB}
    return {"parameters": 10 * MB, "codec": "int8", **sizes, **changed}


def test_a_worker_is_charged_what_comes_on_top_of_idling_and_of_training() -> None:
    assert cells(worker_memory.table([worker()])) == [["10M", "int8", "40", "80", "130", "50", "1.25×", "68 met"]]
    assert worker_memory.share_of_allowed(worker()) == pytest.approx(50 / 68)


def test_a_worker_that_holds_a_second_copy_has_missed() -> None:
    assert cells(worker_memory.table([worker(peak_bytes=870 * MB)]))[0][-1] == "68 **missed**"


def passes(up: float, down: float) -> dict[str, float]:
    return {"up": up, "down": down, "up_cpu": 1.5, "down_cpu": 1.0, "beside_ms": 2.0}


def test_options_are_compared_with_those_set_on_the_same_line() -> None:
    near, far = {"mbit_per_s": None, "round_trip_s": None}, {"mbit_per_s": 100, "round_trip_s": 0.2}
    entries = [
        {"variant": channel.AS_SET, **near, "runs": [passes(100, 200), passes(300, 200), passes(200, 200)]},
        {"variant": "bdp_probe left", **near, "runs": [passes(100, 300)]},
        {"variant": channel.AS_SET, **far, "runs": [passes(5, 5)]},
        {"variant": "bdp_probe left", **far, "runs": [passes(6, 10)]},
    ]
    shares = [(row[0], row[1], row[3], row[6]) for row in cells(channel.table(entries))]
    assert shares == [
        ("loopback", "as set", "1.00", "1.00"),
        ("loopback", "bdp_probe left", "0.50", "1.50"),
        ("100 Mbit/s, 200 ms", "as set", "1.00", "1.00"),
        ("100 Mbit/s, 200 ms", "bdp_probe left", "1.20", "2.00"),
    ]


def test_every_variant_differs_from_what_is_set() -> None:
    names = [each.name for each in channel.VARIANTS]
    assert len(set(names)) == len(names)
    options = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 1), ("grpc.use_local_subchannel_pool", 1)]
    for variant in channel.VARIANTS:
        is_same = variant.applied_to(options) == options and variant.connections == 1
        assert is_same == (variant.name == channel.AS_SET)
    assert [each.name for each in channel.variants(["connections"])] == [
        "as set",
        "two connections",
        "four connections",
    ]


def test_a_server_that_was_away_has_the_median_of_its_returns() -> None:
    entries = [{"variant": channel.AS_SET, "away_s": 10.0, "seconds": [0.5, 2.5, 1.5]}]
    assert cells(channel_return.table(entries)) == [["as set", "10", "1.50 (0.50 to 2.50)"]]


def test_a_call_that_does_not_end_has_no_seconds() -> None:
    entries = [
        {"variant": channel.AS_SET, "limit_s": 90.0, "seconds": 38.04},
        {"variant": "keepalive left", "limit_s": 90.0, "seconds": None},
    ]
    assert cells(channel_silence.table(entries)) == [["as set", "38.0"], ["keepalive left", "not within 90"]]


def test_regions_are_compared_with_the_flat_job_of_the_same_size() -> None:
    case = {"parameters": 10 * MB, "codec": "none", "workers": 4, "regions": 2, "seconds": [2.0]}
    moved = {"bytes_up": [160 * MB], "bytes_down": [160 * MB]}
    entries = [
        {**case, **moved, "topology": "flat", "bytes_between_regions": [160 * MB]},
        {**case, **moved, "topology": "regional", "bytes_between_regions": [80 * MB]},
    ]
    assert [row[5:] for row in cells(regions.table(entries))] == [["320.0", "160.0", "1.00"], ["320.0", "80.0", "2.00"]]
