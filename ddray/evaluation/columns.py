"""How every figure of an evaluation is headed and printed, on the page and on the terminal."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ddray.config.evaluation import SWEPT
from ddray.metrics.measurement import METRICS
from ddray.report.table import Column

LOWER, HIGHER = "lower is better", "higher is better"
ARROWS = {LOWER: "↓", HIGHER: "↑"}
_WIDE = 4  # metrics, above which a table has arrows for words
_FORMATS = {
    "frechet": ".2f",
    "kernel": ".5f",
    "manifold": ".3f",
    "score": ".1f",
    "agreement": ".1f",
    "retrieval": ".3f",
}
_NETWORKS = {
    "efficientnet": "EfficientNet",
    "dinov2": "DINOv2",
    "clip": "CLIP",
    "digits": "digits",
    "emoji": "emoji",
}
_KEPT = ("fd_digits", "class_accuracy")
_LABELS = {
    "fid": "FID",
    "sfid": "sFID",
    "inception_score": "IS",
    "kid": "KID",
    "clip_score": "CLIP score",
    "emoji_score": "emoji score",
}
_HEADS = {"fd": "FD", "kd": "KD"}


def _label(key: str) -> str:
    """As papers write it: fd_dinov2 is FD DINOv2."""
    name, _, network = key.partition("_")
    if key in _LABELS or not network:
        return _LABELS.get(key, key)
    return f"{_HEADS.get(name, name)} {_NETWORKS[network]}"


METRIC_COLUMNS: dict[str, Column] = {
    "fd_digits": Column("fd_digits", "fd_digits", LOWER, ".2f"),
    **{
        metric.key: Column(
            metric.key,
            _label(metric.key),
            HIGHER if metric.higher_is_better else LOWER,
            _FORMATS[metric.kind],
        )
        for metric in METRICS.values()
        if metric.key not in _KEPT
    },
    "class_accuracy": Column("class_accuracy", "class accuracy", HIGHER, ".3f"),
}
"""The column of every metric by its key in `summary.json`, in the order of tables."""

GENERATOR = Column("generator", "generator")
STEPS = Column("steps", "steps")
SECONDS = Column("seconds_per_image", "time", "s an image", ".3g")
_RATIO = Column("ratio", "ratio", "to the teacher", ".2f")


def metrics_of(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Keys of the metrics that any row has a figure of."""
    rows = list(rows)
    return [key for key in METRIC_COLUMNS if any(row.get(key) is not None for row in rows)]


def quality_columns(rows: Sequence[Mapping[str, Any]], leading: str | None = None) -> list[Column]:
    """Columns for what there is: settings that rows differ in, metrics, time, number of images.

    Args:
        rows: of `quality` or `published`.
        leading: key of the metric that comes first, with its ratio.
    """
    settings = [row.get("settings") or {} for row in rows]
    swept = [key for key in SWEPT if key != "schedule"]  # which the names of rows tell
    differing = [key for key in swept if len({str(s[key]) for s in settings if key in s}) > 1]
    metrics = metrics_of(rows)
    if leading in metrics:
        metrics = [leading, *(key for key in metrics if key != leading)]
    columns = [METRIC_COLUMNS[key] for key in metrics]
    if len(columns) > _WIDE:
        columns = [replace(column, unit=ARROWS[column.unit]) for column in columns]
    if _has(rows, "ratio"):
        columns.insert(1, _RATIO)
    return [
        GENERATOR,
        *(Column(setting_key(key), key) for key in differing),
        STEPS,
        *columns,
        *(column for column in (SECONDS, Column("images", "images")) if _has(rows, column.key)),
    ]


def speed_columns(rows: Sequence[Mapping[str, Any]]) -> list[Column]:
    """Columns of the speed table: one a batch size."""
    sizes = dict.fromkeys(key for row in rows for key in row if key.startswith("batch_"))
    return [
        GENERATOR,
        STEPS,
        *(Column(key, f"batch {key.removeprefix('batch_')}", "images/s", ",.1f") for key in sizes),
    ]


def setting_key(name: str) -> str:
    """Key of a row's setting, once the row is flat."""
    return f"settings.{name}"


def flat(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row with its settings beside its figures."""
    settings = row.get("settings") or {}
    return {**row, **{setting_key(key): value for key, value in settings.items()}}


def _has(rows: Iterable[Mapping[str, Any]], key: str) -> bool:
    return any(row.get(key) is not None for row in rows)
