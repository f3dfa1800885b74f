"""The JSON of Grafana dashboards, as far as Cortex needs it: stat and time series panels over Prometheus."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

SOURCE = {"type": "prometheus", "uid": "${datasource}"}
COLUMNS = 24
SCHEMA_VERSION = 41


@dataclass(frozen=True)
class Panel:
    """One panel.

    Attributes:
        kind: `stat`, the newest values, or `timeseries`.
        queries: PromQL by legend.
        unit: One of Grafana's units: s, bytes, Bps, percentunit, short, none …
        limits: Values from which a stat turns orange and red; with falling ones, below which.
        width: Of 24 columns.
    """

    kind: str
    title: str
    description: str
    queries: dict[str, str]
    unit: str = "short"
    limits: tuple[float, float] | None = None
    width: int = 8
    stacked: bool = False

    @property
    def height(self) -> int:
        """Rows of the grid."""
        return 4 if self.kind == "stat" else 8

    def json(self, number: int, x: int, y: int) -> dict[str, Any]:
        """The panel at a place of the grid."""
        return {
            "id": number,
            "type": self.kind,
            "title": self.title,
            "description": self.description,
            "datasource": SOURCE,
            "gridPos": {"h": self.height, "w": self.width, "x": x, "y": y},
            "targets": [self._target(position, *query) for position, query in enumerate(self.queries.items())],
            "fieldConfig": {"defaults": self._defaults(), "overrides": []},
            "options": self._stat_options() if self.kind == "stat" else _series_options(),
        }

    def _target(self, position: int, legend: str, expression: str) -> dict[str, Any]:
        return {
            "refId": chr(ord("A") + position),
            "datasource": SOURCE,
            "editorMode": "code",
            "expr": expression,
            "legendFormat": legend,
            "instant": self.kind == "stat",
            "range": self.kind != "stat",
        }

    def _defaults(self) -> dict[str, Any]:
        defaults: dict[str, Any] = {"unit": self.unit, "thresholds": {"mode": "absolute", "steps": self._steps()}}
        if self.kind == "timeseries":
            fill = 30 if self.stacked else 10
            stacking = {"mode": "normal" if self.stacked else "none", "group": "A"}
            defaults["custom"] = {"lineWidth": 1, "fillOpacity": fill, "showPoints": "never", "stacking": stacking}
        return defaults

    def _steps(self) -> list[dict[str, Any]]:
        if self.limits is None:
            return [{"color": "green", "value": None}]
        first, second = self.limits
        if first < second:
            return [
                {"color": "green", "value": None},
                {"color": "orange", "value": first},
                {"color": "red", "value": second},
            ]
        return [
            {"color": "red", "value": None},
            {"color": "orange", "value": second},
            {"color": "green", "value": first},
        ]

    def _stat_options(self) -> dict[str, Any]:
        return {
            "colorMode": "value",
            "graphMode": "none",
            "justifyMode": "auto",
            "orientation": "auto",
            "textMode": "auto",
            "wideLayout": True,
            "showPercentChange": False,
            "percentChangeColorMode": "standard",
            "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
        }


def _series_options() -> dict[str, Any]:
    return {
        "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True, "calcs": []},
        "tooltip": {"mode": "multi", "sort": "desc"},
    }


@dataclass(frozen=True)
class Dashboard:
    """Panels in reading order; a row of the grid is filled before the next one begins."""

    uid: str
    title: str
    description: str
    panels: Sequence[Panel]
    variables: dict[str, str] = field(default_factory=dict)
    """Label values to choose from: PromQL of `label_values` by variable."""

    def json(self) -> dict[str, Any]:
        """What Grafana reads."""
        placed, x, y, tallest = [], 0, 0, 0
        for number, panel in enumerate(self.panels, start=1):
            if x + panel.width > COLUMNS:
                x, y, tallest = 0, y + tallest, 0
            placed.append(panel.json(number, x, y))
            x, tallest = x + panel.width, max(tallest, panel.height)
        return {
            "uid": self.uid,
            "title": self.title,
            "description": self.description,
            "tags": ["cortex"],
            "schemaVersion": SCHEMA_VERSION,
            "version": 1,
            "editable": True,
            "graphTooltip": 1,
            "refresh": "10s",
            "time": {"from": "now-1h", "to": "now"},
            "timezone": "browser",
            "templating": {"list": [_source(), *(_variable(*each) for each in self.variables.items())]},
            "annotations": {"list": []},
            "links": [_to_the_others()],
            "panels": placed,
        }


def _source() -> dict[str, Any]:
    return {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus"}


def _variable(name: str, query: str) -> dict[str, Any]:
    return {
        "name": name,
        "label": name,
        "type": "query",
        "datasource": SOURCE,
        "query": {"query": query, "refId": name},
        "refresh": 2,
        "sort": 1,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"text": "All", "value": "$__all"},
    }


def _to_the_others() -> dict[str, Any]:
    return {
        "title": "Cortex",
        "type": "dashboards",
        "icon": "external link",
        "tooltip": "",
        "tags": ["cortex"],
        "asDropdown": False,
        "includeVars": False,
        "keepTime": True,
        "targetBlank": False,
    }
