"""The Grafana dashboard: valid, and every metric that it shows is one that exists."""

import json
import re
from typing import Any

from tests.paths import ROOT

_FILE = ROOT / "cluster" / "grafana" / "ddray-serving.json"
# Of Ray Serve 2.60 itself, as seen at /metrics.
_SERVES_OWN = {
    "ray_serve_deployment_replica_healthy",
    "ray_serve_deployment_replica_starts_total",
}
# Not the sums of histograms: Ray adds up the middles of the buckets.
_SUFFIXES = {"Histogram": ("_bucket", "_count"), "Counter": ("",), "Gauge": ("",)}


def _dashboard() -> dict[str, Any]:
    value: dict[str, Any] = json.loads(_FILE.read_text("utf-8"))
    return value


def _expressions() -> list[str]:
    return [target["expr"] for panel in _dashboard()["panels"] for target in panel["targets"]]


def dashboard_metrics() -> set[str]:
    """Names of all metrics that the dashboard asks Prometheus for."""
    return {name for text in _expressions() for name in re.findall(r"(ray_\w+)\{", text)}


def _exported() -> set[str]:
    """Names under which Ray shows the metrics of this code: a counter is named _total already."""
    found = set()
    for source in (ROOT / "ddray" / "runtime").rglob("*.py"):
        made = re.findall(r'metrics\.(\w+)\(\s*"(ddray_\w+)"', source.read_text("utf-8"))
        found |= {f"ray_{name}{suffix}" for kind, name in made for suffix in _SUFFIXES[kind]}
    return found


def test_every_metric_of_the_dashboard_exists() -> None:
    assert len(dashboard_metrics()) >= 10
    assert dashboard_metrics() <= _exported() | _SERVES_OWN


def test_every_metric_of_the_code_is_shown() -> None:
    shown = {re.sub("_(bucket|count)$", "", name) for name in dashboard_metrics()}
    made = {re.sub("_(bucket|count)$", "", name) for name in _exported()}
    assert made <= shown


def test_the_dashboard_can_be_imported_anywhere() -> None:
    dashboard = _dashboard()
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


def test_panels_lie_side_by_side() -> None:
    panels = _dashboard()["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = [
        (x, y)
        for panel in panels
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(set(cells)) == len(cells)
    assert max(x for x, _ in cells) < 24
