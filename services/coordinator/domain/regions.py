"""Regions in regions, by their names: `eu.paris` lies in `eu`."""

from __future__ import annotations


def around(region: str) -> tuple[str, ...]:
    """A region and those it lies in, the nearest first: `eu.paris`, `eu`."""
    levels = region.split(".")
    return tuple(".".join(levels[:count]) for count in range(len(levels), 0, -1))
