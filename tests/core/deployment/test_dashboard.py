"""The Grafana dashboards: valid, and every metric that they show is one that exists."""

import json
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.paths import ROOT

DASHBOARDS = sorted((ROOT / "cluster" / "grafana").glob("*.json"))
_METRIC = re.compile(r"\b(ray_\w+)\{")
# Of Ray Serve 2.60, as seen at /metrics. Ray's own charts do not show it.
_SERVES_OWN = {"ray_serve_deployment_replica_starts_total"}
# Not the sums of histograms: Ray adds up the middles of the buckets.
_SUFFIXES = {"Histogram": ("_bucket", "_count"), "Counter": ("",), "Gauge": ("",)}

each_dashboard = pytest.mark.parametrize("file", DASHBOARDS, ids=lambda file: file.stem)


def _dashboard(file: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(file.read_text("utf-8"))
    return value


def _expressions(file: Path) -> list[str]:
    panels = _dashboard(file)["panels"]
    return [target["expr"] for panel in panels for target in panel["targets"]]


def dashboard_metrics(name: str) -> set[str]:
    """Names of all metrics that a dashboard asks Prometheus for.

    Args:
        name: of its file, without `.json`.
    """
    file = ROOT / "cluster" / "grafana" / f"{name}.json"
    return {metric for text in _expressions(file) for metric in _METRIC.findall(text)}


def _exported() -> set[str]:
    """Names under which Ray shows the metrics of this code: a counter is named _total already."""
    found, kinds = set(), "|".join(_SUFFIXES)
    for source in (ROOT / "ddray" / "runtime").rglob("*.py"):
        made = re.findall(rf'\b({kinds})\(\s*"(ddray_\w+)"', source.read_text("utf-8"))
        found |= {f"ray_{name}{suffix}" for kind, name in made for suffix in _SUFFIXES[kind]}
    return found


def _rays_own() -> set[str]:
    """Names of Ray's metrics in the charts that come with it."""
    spec = find_spec("ray")
    assert spec is not None and spec.origin is not None
    charts = Path(spec.origin).parent / "dashboard" / "modules" / "metrics" / "dashboards"
    return {name for file in charts.glob("*.py") for name in _METRIC.findall(file.read_text())}


@each_dashboard
def test_every_expression_names_metrics_that_exist(file: Path) -> None:
    known = _exported() | _rays_own() | _SERVES_OWN
    for expression in _expressions(file):
        named = set(re.findall(r"\bray_(?!io_cluster\b)\w+", expression))
        assert named and named == set(_METRIC.findall(expression)), expression
        assert named <= known, expression


def test_every_metric_of_the_code_is_shown() -> None:
    shown = set().union(*(dashboard_metrics(file.stem) for file in DASHBOARDS))
    made = _exported()
    assert {"ray_ddray_rows_total", "ray_ddray_train_step", "ray_ddray_images_total"} <= made

    def plain(names: set[str]) -> set[str]:
        return {re.sub("_(bucket|count)$", "", name) for name in names}

    assert plain(made) <= plain(shown)


def test_dashboards_are_told_apart() -> None:
    assert [file.stem for file in DASHBOARDS] == ["ddray-jobs", "ddray-serving"]
    for file in DASHBOARDS:
        dashboard = _dashboard(file)
        assert dashboard["uid"] == file.stem == dashboard["title"].replace(" ", "-")


@each_dashboard
def test_a_dashboard_can_be_imported_anywhere(file: Path) -> None:
    dashboard = _dashboard(file)
    assert dashboard["schemaVersion"] >= 39
    (variable,) = dashboard["templating"]["list"]
    assert (variable["name"], variable["type"], variable["query"]) == (
        "datasource",
        "datasource",
        "prometheus",
    )
    for panel in dashboard["panels"]:
        for part in (panel, *panel["targets"]):
            assert part["datasource"] == {"type": "prometheus", "uid": "${datasource}"}


@each_dashboard
def test_panels_lie_side_by_side(file: Path) -> None:
    panels = _dashboard(file)["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = [
        (x, y)
        for panel in panels
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(set(cells)) == len(cells)
    assert max(x for x, _ in cells) < 24
