"""Rules, alerts and the adapter: valid, tested, and about series that exist."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy.grafana import panels
from tests.deploy.exposition import exposed, scrape
from tests.deploy.manifests import ROOT
from tests.deploy.promql import grouping, matchers, series

FOLDER = ROOT / "deploy" / "prometheus"
RULES = [
    rule for group in yaml.safe_load((FOLDER / "rules.yaml").read_text(encoding="utf-8"))["groups"] for rule in group["rules"]
]
RECORDED = {rule["record"] for rule in RULES if "record" in rule}
ADAPTER = yaml.safe_load((FOLDER / "adapter.yaml").read_text(encoding="utf-8"))["rules"]
SCRAPED_LABELS = {"namespace", "pod", "instance", "job"}
"""What Prometheus adds to every series (prometheus.yaml)."""

needs_promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")


def promtool(*arguments: str, text: str | None = None, cwd: Path = FOLDER) -> None:
    ran = subprocess.run(["promtool", *arguments], input=text, capture_output=True, text=True, cwd=cwd, check=False, timeout=60)
    assert ran.returncode == 0, ran.stdout + ran.stderr


def expressions() -> Iterator[tuple[str, str]]:
    """Every PromQL expression of this project, with where it stands."""
    for rule in RULES:
        yield rule.get("record") or rule["alert"], rule["expr"]
    for rule in ADAPTER:
        yield f"adapter {rule['name']['as']}", adapter_query(rule)
    for title, section in panels.SECTIONS:
        for panel in section:
            for expression, _ in panel.queries:
                yield f"{title}: {panel.title}", expression.replace("$__rate_interval", "5m").replace("$namespace", ".*")


def adapter_query(rule: dict[str, Any]) -> str:
    """What the adapter would ask Prometheus for two pods."""
    name = re.match(r"\w+", rule["seriesQuery"])
    assert name
    return (
        str(rule["metricsQuery"])
        .replace("<<.Series>>", name[0])
        .replace("<<.LabelMatchers>>", 'namespace="transformer", pod=~"a|b"')
        .replace("<<.GroupBy>>", "pod")
    )


@needs_promtool
def test_rules_are_valid() -> None:
    promtool("check", "rules", "rules.yaml")


@needs_promtool
def test_alerts_fire_when_they_should_and_not_otherwise() -> None:
    promtool("test", "rules", "rules_test.yaml")


def test_every_alert_has_a_test_in_which_it_fires() -> None:
    tests = yaml.safe_load((FOLDER / "rules_test.yaml").read_text(encoding="utf-8"))["tests"]
    fired = {case["alertname"] for test in tests for case in test.get("alert_rule_test", []) if case["exp_alerts"]}
    slower_siblings = {"TransformerLatencyBudgetBurns", "TransformerLatencyBudgetBurnsSlowly"}  # as the availability ones
    assert {rule["alert"] for rule in RULES if "alert" in rule} == fired | slower_siblings


@needs_promtool
def test_the_scrape_configuration_is_valid(tmp_path: Path) -> None:
    config = yaml.safe_load((FOLDER / "prometheus.yaml").read_text(encoding="utf-8"))
    # Some builds of promtool leave out the discovery of Kubernetes; all else of the file is checked.
    for job in config["scrape_configs"]:
        assert job.pop("kubernetes_sd_configs") == [{"role": "pod"}]
    (tmp_path / "prometheus.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    shutil.copy(FOLDER / "rules.yaml", tmp_path)
    promtool("check", "config", "prometheus.yaml", cwd=tmp_path)


@needs_promtool
def test_every_expression_parses(tmp_path: Path) -> None:
    rules = [{"record": f"parsed:{index}", "expr": text} for index, (_, text) in enumerate(expressions())]
    content = {"groups": [{"name": "all", "rules": rules}]}
    (tmp_path / "all.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    promtool("check", "rules", "all.yaml", cwd=tmp_path)


@needs_promtool
def test_the_exposition_is_clean() -> None:
    promtool("check", "metrics", text=scrape())


@pytest.mark.parametrize(("where", "expression"), list(expressions()))
def test_every_series_and_label_is_one_that_the_server_exposes(where: str, expression: str) -> None:
    assert series(expression), where
    for name, asked in matchers(expression):
        if name in RECORDED:
            assert asked.keys() <= {"namespace", "model"}
            continue
        assert name in exposed(), f"{where}: no series is called {name}"
        known = exposed()[name].values
        assert asked.keys() <= known.keys() | SCRAPED_LABELS, f"{where}: {name} has no such label"
        for label in asked.keys() & {"le", "outcome", "method", "part"}:
            assert set(asked[label].split("|")) <= known[label], f"{where}: {name} has no {label}={asked[label]}"
    ours = {label for name in series(expression) & exposed().keys() for label in exposed()[name].values}
    assert grouping(expression) <= ours | SCRAPED_LABELS | {"model"}, where


def test_every_recorded_series_is_recorded_once() -> None:
    assert len(RECORDED) == sum("record" in rule for rule in RULES)
    used = {name for _, expression in expressions() for name in series(expression) if ":" in name}
    assert used <= RECORDED


def test_the_adapter_finds_pods() -> None:
    for rule in ADAPTER:
        assert rule["resources"]["overrides"] == {"namespace": {"resource": "namespace"}, "pod": {"resource": "pod"}}
