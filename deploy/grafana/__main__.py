"""Writes dashboard.json beside this file: ``python -m deploy.grafana``.

The dashboard is made by code, so that a panel is a few words in panels.py rather than sixty lines of JSON. A test holds the two
together, and every series against those that the server registers. Classic dashboard model, Grafana 10 and later.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .panels import SECTIONS, Panel

PATH = Path(__file__).with_name("dashboard.json")
SOURCE = {"type": "prometheus", "uid": "${datasource}"}
WIDTH = 24


def dashboard() -> dict[str, Any]:
    panels: list[dict[str, Any]] = []
    y = 0
    for title, section in SECTIONS:
        place = {"h": 1, "w": WIDTH, "x": 0, "y": y}
        panels.append(
            {"id": len(panels) + 1, "type": "row", "title": title, "collapsed": False, "gridPos": place, "panels": []}
        )
        y, x, tallest = y + 1, 0, 0
        for panel in section:
            if x + panel.width > WIDTH:
                y, x, tallest = y + tallest, 0, 0
            place = {"h": panel.height, "w": panel.width, "x": x, "y": y}
            panels.append(render(panel, len(panels) + 1, place))
            x, tallest = x + panel.width, max(tallest, panel.height)
        y += tallest
    return {
        "uid": "transformer-serving",
        "title": "Transformer serving",
        "description": "What callers feel, how full the batch is, and where the time of a step goes.",
        "tags": ["transformer-serving"],
        "schemaVersion": 39,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "timezone": "browser",
        "templating": {"list": variables()},
        "annotations": {"list": []},
        "links": [],
        "panels": panels,
    }


def render(panel: Panel, number: int, place: dict[str, int]) -> dict[str, Any]:
    table = panel.kind == "table"
    targets = [
        {
            "refId": chr(ord("A") + index),
            "datasource": SOURCE,
            "expr": expression,
            "legendFormat": legend or "__auto",
            "range": not table,
            "instant": table,
            "format": "table" if table else "time_series",
        }
        for index, (expression, legend) in enumerate(panel.queries)
    ]
    defaults: dict[str, Any] = {
        "unit": panel.unit,
        "min": 0,
        "color": {"mode": "palette-classic" if panel.kind == "timeseries" else "thresholds"},
        "thresholds": {
            "mode": "absolute",
            "steps": [{"value": value, "color": colour} for value, colour in panel.thresholds],
        },
    }
    if panel.top is not None:
        defaults["max"] = panel.top
    if panel.kind == "timeseries":
        defaults["custom"] = {
            "drawStyle": "line",
            "lineWidth": 2,
            "fillOpacity": 30 if panel.stacked else 8,
            "gradientMode": "none",
            "showPoints": "never",
            "spanNulls": False,
            "stacking": {"mode": "normal" if panel.stacked else "none", "group": "A"},
        }
    overrides = [
        {
            "matcher": {"id": "byName", "options": name},
            "properties": [{"id": "color", "value": {"mode": "fixed", "fixedColor": colour}}],
        }
        for name, colour in panel.colours.items()
    ]
    return {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.description,
        "datasource": SOURCE,
        "gridPos": place,
        "targets": targets,
        "fieldConfig": {"defaults": defaults, "overrides": overrides},
        "options": OPTIONS[panel.kind],
        **({"transformations": TABLE_COLUMNS} if table else {}),
    }


OPTIONS: dict[str, dict[str, Any]] = {
    "timeseries": {
        "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True},
        "tooltip": {"mode": "multi", "sort": "desc"},
    },
    "stat": {
        "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
        "colorMode": "value",
        "graphMode": "area",
        "textMode": "value",
    },
    "table": {"showHeader": True},
}
TABLE_COLUMNS = [{"id": "organize", "options": {"excludeByName": {"Time": True}, "renameByName": {"Value": "pods"}}}]


def variables() -> list[dict[str, Any]]:
    return [
        {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus", "hide": 0},
        _choice("namespace", "Namespace", "label_values(transformer_ready, namespace)"),
        _choice("model", "Model", 'label_values(transformer_model_info{namespace=~"$namespace"}, model)'),
    ]


def _choice(name: str, label: str, query: str) -> dict[str, Any]:
    return {
        "name": name,
        "label": label,
        "type": "query",
        "datasource": SOURCE,
        "query": {"query": query, "refId": f"variable-{name}"},
        "refresh": 2,
        "sort": 1,
        "multi": True,
        "includeAll": True,
        # Matches a missing label too: outside Kubernetes there is no namespace.
        "allValue": ".*",
        "current": {"text": ["All"], "value": ["$__all"]},
    }


def text() -> str:
    return json.dumps(dashboard(), indent=2, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    PATH.write_text(text(), encoding="utf-8")
