"""The dashboard: made from its panels, well-formed, and about everything that the server exposes."""

from __future__ import annotations

import json
from itertools import combinations
from typing import Any

from deploy.grafana import __main__ as builder
from tests.deploy.exposition import exposed
from tests.deploy.promql import series

DASHBOARD: dict[str, Any] = json.loads(builder.PATH.read_text(encoding="utf-8"))
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
LEFT_OUT = {"transformer_build_info"}
"""Facts for a person with a question, not for a screen."""


def test_the_file_is_what_the_panels_make() -> None:
    assert builder.PATH.read_text(encoding="utf-8") == builder.text(), "run: python -m deploy.grafana"


def test_every_series_of_the_server_is_shown() -> None:
    shown = {name for panel in PANELS for target in panel["targets"] for name in series(target["expr"])}
    # Shown through the recording rule of the latency objective and as quantiles.
    histograms = {name.removesuffix(end) for name in exposed() for end in ("_bucket", "_count", "_sum") if name.endswith(end)}
    plain = {name for name in exposed() if not name.endswith(("_bucket", "_count", "_sum"))}
    wanted = plain | {f"{name}_bucket" for name in histograms}
    assert wanted - shown == LEFT_OUT


def test_panels_do_not_overlap_and_fill_the_width() -> None:
    places = [panel["gridPos"] for panel in DASHBOARD["panels"]]
    assert all(place["x"] + place["w"] <= builder.WIDTH for place in places)
    for one, other in combinations(places, 2):
        apart = (
            one["x"] + one["w"] <= other["x"]
            or other["x"] + other["w"] <= one["x"]
            or one["y"] + one["h"] <= other["y"]
            or other["y"] + other["h"] <= one["y"]
        )
        assert apart, (one, other)


def test_panels_can_be_told_apart_and_say_what_they_show() -> None:
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    assert len({panel["title"] for panel in PANELS}) == len(PANELS)
    assert all(panel["description"] for panel in PANELS)


def test_every_variable_that_is_used_is_defined() -> None:
    defined = {variable["name"] for variable in DASHBOARD["templating"]["list"]}
    assert defined == {"datasource", "namespace", "model"}
    for panel in PANELS:
        assert panel["datasource"]["uid"] == "${datasource}"
