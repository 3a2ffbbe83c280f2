"""What an evaluation leaves to look at, all of it from what `summary.json` holds.

Figures fill the page of `ddray.report.page`, tables of a terminal, and a picture.
"""

import io
import platform
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import numpy.typing as npt

from ddray import __version__
from ddray.errors import is_finite
from ddray.evaluation.columns import (
    ARROWS,
    GENERATOR,
    LOWER,
    METRIC_COLUMNS,
    flat,
    metrics_of,
    quality_columns,
    speed_columns,
)
from ddray.report.chart import Curve
from ddray.report.frontier import Point
from ddray.report.page import SHOWN_SIDE, Report, render_report
from ddray.report.pictures import Picture, labelled_grid, reduced
from ddray.report.table import Column, Marked, Table, note_mark, write_summary_table
from ddray.storage import open_storage
from ddray.storage.run_folder import SUMMARY_FILE, write_json

Pictures = Sequence[tuple[str, npt.NDArray[np.floating[Any]]]]

_DIGITS = (
    "fd_digits says how far images are from real digits that no model has seen (0 = not to be told "
    "apart), ratio how much further the student's are than its teacher's, and class accuracy how "
    "often a classifier of real digits finds the digit that was asked for."
)
_DISTANCES = (
    "Distances are to real images, in features of a network, and compare only under one protocol: "
    "the same reference, network and number of images."
)
_PUBLISHED = (
    "Measured elsewhere, by the authors and on other hardware. Only rows of one note compare "
    "closely: protocols alone move the FID of one teacher by a fifth."
)
_COLUMNS = 10  # of pictures that no heading names
_HEADLINES = 4
# What the headline tells of images beside their distance, whichever is there.
_BESIDE = (
    "class_accuracy",
    "retrieval_emoji",
    "retrieval_clip",
    "inception_score",
    "precision",
    "recall",
)


def _quality_table(summary: Mapping[str, Any]) -> Table:
    """All metrics; warnings are notes below, marked in the cells of the leading one."""
    leading, rows = summary["leading"], [flat(row) for row in summary["quality"]]
    columns = quality_columns(summary["quality"], leading)
    notes = list(dict.fromkeys(text for row in rows for text in row.get("warnings") or ()))
    for row in rows:
        numbers = [notes.index(text) + 1 for text in row.get("warnings") or ()]
        if numbers:
            row[leading] = Marked(row.get(leading), numbers)
    return Table("Quality", columns, rows, notes=notes)


def tables_as_text(summary: Mapping[str, Any]) -> str:
    """Quality and speed for a terminal, with the warnings.

    Args:
        summary: what `summary.json` holds of the evaluation.
    """
    quality, speed = _quality_table(summary), summary["speed"]
    parts = [write_summary_table(quality.rows, quality.columns)]
    if quality.notes:
        parts.append("\n".join(f"{note_mark(k)} {text}" for k, text in enumerate(quality.notes, 1)))
    if speed:
        parts.append(write_summary_table(speed, speed_columns(speed)))
    return "\n\n".join(parts)


def _shown(row: Mapping[str, Any], key: str) -> str:
    """A figure of a row, as the table has it."""
    return format(row[key], METRIC_COLUMNS[key].format)


def _first(summary: Mapping[str, Any], kind: str) -> Mapping[str, Any] | None:
    """The row of a kind with the fewest steps, of these the best."""
    leading = summary["leading"]
    rows = [r for r in summary["quality"] if r["kind"] == kind and is_finite(r.get(leading))]
    sign = 1 if METRIC_COLUMNS[leading].unit == LOWER else -1
    return min(rows, key=lambda row: (row["steps"] or 0, sign * row[leading]), default=None)


def _headline(summary: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    leading = summary["leading"]
    found = {kind: _first(summary, kind) for kind in ("student", "teacher", "samples")}
    student, teacher = found["student"], found["teacher"]
    subject = student or teacher or found["samples"]
    if subject is None:
        return []
    column = METRIC_COLUMNS[leading]
    head = f"{column.label}, {column.unit}"
    name = subject["generator"]
    if subject is student:
        name = "one-step student" if subject["steps"] == 1 else f"{subject['steps']}-step student"
    items = [(name, _shown(subject, leading), f"{head}; {subject['images']:,} images")]
    if student and teacher:
        note = f"{column.label} in {teacher['steps']} steps"
        if is_finite(student.get("ratio")):
            note += f"; the student has {student['ratio']:.2f} x that"
        items = [(name, _shown(student, leading), head)]
        items += [("its teacher", _shown(teacher, leading), note)]
        items += _gain(summary, student, teacher)
    whose = (
        "the student's" if subject is student else "their" if subject is found["samples"] else "its"
    )
    for key in dict.fromkeys((*_BESIDE, *metrics_of([subject]))):
        label = METRIC_COLUMNS[key].label
        if key == leading or not is_finite(subject.get(key)) or len(items) == _HEADLINES:
            continue
        if key == "class_accuracy":
            items.append(("right class", f"{subject[key]:.1%}", f"of {whose} images"))
        else:
            items.append((f"{whose} {label}", _shown(subject, key), METRIC_COLUMNS[key].unit))
    return items


def _gain(
    summary: Mapping[str, Any], student: Mapping[str, Any], teacher: Mapping[str, Any]
) -> list[tuple[str, str, str]]:
    """How much faster the student is, at the smallest batch that was timed."""
    speeds = {row["generator"]: row for row in summary["speed"]}
    fast, slow = (speeds.get(row["generator"], {}) for row in (student, teacher))
    size = next((key for key in fast if key.startswith("batch_") and slow.get(key)), None)
    if size is None:
        return []
    note = f"images/s at batch {size.removeprefix('batch_')}"
    return [("speed-up", f"{fast[size] / slow[size]:.1f} x", note)]


def _points(summary: Mapping[str, Any]) -> list[Point]:
    """What the frontier shows: rows that were timed, ours and published ones."""
    leading = summary["leading"]
    if METRIC_COLUMNS[leading].unit != LOWER:
        return []
    return [
        Point(row["generator"], row["seconds_per_image"], row[leading], row["kind"], published)
        for rows, published in ((summary["quality"], False), (summary["published"], True))
        for row in rows
        if is_finite(row.get(leading)) and is_finite(row["seconds_per_image"])
    ]


def _worst_table(worst: Mapping[str, Sequence[Mapping[str, Any]]]) -> Table:
    """The worst classes of each row on one line: no-break spaces keep each of them together."""
    rows = []
    for generator, classes in worst.items():
        told = (
            f"{str(c['name']).partition(',')[0] if c['name'] else c['class']} {c['distance']:.3g}"
            for c in classes
        )
        rows.append(
            {"generator": generator, "worst": " · ".join(t.replace(" ", "\u00a0") for t in told)}
        )
    columns = (GENERATOR, Column("worst", "classes", "distance, the worst first"))
    note = "Distance between the mean features of a class's images and of the teacher's of it."
    return Table("Worst classes", columns, rows, note)


def _published_table(summary: Mapping[str, Any]) -> Table:
    """What others report; where a row is from, and its protocol, is a note below."""
    rows = [dict(row) for row in summary["published"]]
    # No more digits than were published.
    shorter = {key: ".2f" for key in ("precision", "recall")}
    columns = [
        replace(column, format=shorter.get(column.key, column.format))
        for column in quality_columns(rows, summary["leading"])
    ]
    notes = list(dict.fromkeys(_origin(row) for row in rows))
    for row in rows:
        row["generator"] = Marked(row["generator"], [notes.index(_origin(row)) + 1])
    return Table("Published", columns, rows, _PUBLISHED, notes=notes)


def _origin(row: Mapping[str, Any]) -> str:
    return f"{row['source']}: {row['protocol']}"


def _tables(summary: Mapping[str, Any]) -> list[Table]:
    tables = [_quality_table(summary)]
    if summary["published"]:
        tables.append(_published_table(summary))
    if summary["speed"]:
        rows = summary["speed"]
        note = _transport_note(summary["transport"])
        tables.append(Table("Speed, to pixels", speed_columns(rows), rows, note))
    if summary["worst_classes"]:
        tables.append(_worst_table(summary["worst_classes"]))
    return tables


def _transport_note(transport: Mapping[str, Any] | None) -> str:
    if not transport:
        return ""
    return (
        f"Transport by {transport['solver']} in {transport['num_evals']} evaluations gives "
        f"{transport['agreement']:.2%} of {transport['tokens']:,} tokens as the exact map does, "
        f"and takes {transport['cost_ratio']:.2f} times as long as plain sampling."
    )


def _meaning(summary: Mapping[str, Any]) -> str:
    if summary["leading"] == "fd_digits":
        return _DIGITS
    arrows = {column.unit for column in quality_columns(summary["quality"])} & {*ARROWS.values()}
    told = ", ".join(f"{arrow} {word}" for word, arrow in ARROWS.items() if arrow in arrows)
    return f"{_DISTANCES} {told}".strip() + "." * bool(told)


def versions() -> dict[str, str]:
    """Versions of what computes here."""
    found = {"ddray": __version__, "python": platform.python_version()}
    for package in ("torch", "ray", "deepspeed", "pyarrow"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return {**found, "machine": f"{platform.system()} {platform.machine()}"}


def build_report(
    summary: Mapping[str, Any],
    pictures: Pictures,
    columns: Sequence[str],
    *,
    title: str,
    subtitle: str,
    history: Sequence[Mapping[str, float]] = (),
    settings: Mapping[str, Mapping[str, Any]],
    commands: Sequence[str],
) -> Report:
    """Everything the page shows.

    Args:
        summary: what `summary.json` holds of the evaluation.
        pictures: name and images [N, C, H, W] in [0, 1] of generators, the same noise in each.
        columns: what stands above the images: class names or captions; empty for nothing.
        title: of the page.
        subtitle: the line below it.
        history: lines of the training, for the curves.
        settings: resolved configs by name.
        commands: how to do it again.
    """
    curves = [
        Curve(label, [h["step"] for h in history], [h[key] for h in history])
        for key, label in (("loss", "loss"), ("cross_entropy", "cross entropy"))
        if history
    ]
    points, leading = _points(summary), METRIC_COLUMNS[summary["leading"]]
    note = "Time: steady state, at the largest batch that was timed."
    if any(point.published for point in points):
        note += " Hollow points are published figures, of other hardware and other protocols."
    told = {
        row["generator"]: f"{leading.label} {_shown(row, leading.key)}"
        for row in summary["quality"]
        if is_finite(row.get(leading.key))
    }
    return Report(
        title=title,
        subtitle=subtitle,
        headline=_headline(summary),
        frontier=points if any(not point.published for point in points) else (),
        distance=f"{leading.label}, {leading.unit}",
        frontier_note=note,
        pictures=[
            Picture(name, told.get(name, ""), images, _width(images, columns), columns)
            for name, images in pictures
        ],
        tables=_tables(summary),
        meaning=_meaning(summary),
        protocol=summary["protocol"],
        facts={key: value for key, value in summary["settings"].items() if value is not None},
        curves=curves,
        commands=commands,
        settings=settings,
        versions=versions(),
    )


def _width(images: npt.NDArray[np.floating[Any]], columns: Sequence[str]) -> int:
    return len(columns) or min(len(images), _COLUMNS)


def write_evaluation(
    out: str,
    summary: Mapping[str, Any],
    report: Report,
    pictures: Pictures,
    columns: Sequence[str],
) -> None:
    """Write report.html, grid.png where there are pictures and, last, summary.json under a URI.

    Args:
        out: the URI.
        summary: what `summary.json` is to hold.
        report: the page.
        pictures: as for `build_report`.
        columns: likewise.

    Raises:
        StorageError: if the URI cannot be written.
    """
    storage = open_storage(out)
    if pictures:
        rows = [(name, reduced(images, SHOWN_SIDE)) for name, images in pictures]
        first = rows[0][1]
        picture = labelled_grid(
            rows,
            columns,
            columns=_width(first, columns),
            # Small ones are enlarged by whole numbers; digits are dark on white.
            scale=max(1, 96 // max(first.shape[2:])),
            invert=first.shape[1] == 1,
        )
        stream = io.BytesIO()
        picture.save(stream, "PNG")
        storage.write("grid.png", stream.getvalue())
    storage.write("report.html", render_report(report).encode())
    write_json(storage, SUMMARY_FILE, summary)
