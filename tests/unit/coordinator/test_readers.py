"""Who an aggregator is told may download a job's versions."""

from __future__ import annotations

from dataclasses import replace

from cortex_common.ids import NodeName, SeatIndex
from services.coordinator.domain.job import Tier
from services.coordinator.domain.topology import readers_of
from tests.unit.coordinator.jobs import collecting


def test_a_seat_without_a_part_in_the_round_reads_too() -> None:
    job = collecting("a", "b", "c")
    assert readers_of(job, None) == ()
    assert readers_of(replace(job, cohort=(SeatIndex(1),)), None) == ("a", "c")
    assert readers_of(replace(job, seats=(None, NodeName("b"), NodeName("c")), cohort=(SeatIndex(1),)), None) == ("c",)


def test_the_root_serves_everybody_and_a_region_those_who_upload_there() -> None:
    tier = Tier("eu", NodeName("agg-eu"), "eu:1", (SeatIndex(0), SeatIndex(1)))
    job = replace(collecting("a", "b", "c"), tiers=(tier,), cohort=(SeatIndex(0), SeatIndex(1)))
    assert readers_of(job, 0) == ()
    assert readers_of(job, None) == ("a", "b", "c")
