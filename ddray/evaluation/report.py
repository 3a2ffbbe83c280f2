"""What an evaluation leaves to look at: it fills the page of `ddray.report.page`, and a picture."""

import io
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from ddray import __version__
from ddray.evaluation.evaluate import AUTOREGRESSIVE, Evaluation
from ddray.report.chart import Curve
from ddray.report.page import Report, render_report
from ddray.report.pictures import Picture, labelled_grid
from ddray.report.table import Column, Table, write_summary_table
from ddray.storage import open_storage
from ddray.storage.run_folder import SUMMARY_FILE, write_json

_MEANING = (
    "fd_digits says how far images are from real digits that no model has seen (0 = not to be told "
    "apart), ratio how much further the student's are than its teacher's, and class accuracy how "
    "often a classifier of real digits finds the digit that was asked for."
)

QUALITY_COLUMNS = (
    Column("generator", "generator"),
    Column("steps", "steps"),
    Column("fd_digits", "fd_digits", "lower is better", ".2f"),
    Column("ratio", "ratio", "to the teacher", ".2f"),
    Column("class_accuracy", "class accuracy", "", ".3f"),
    Column("images", "images"),
)


def speed_columns(evaluation: Evaluation) -> list[Column]:
    """Columns of the speed table: one a batch size."""
    sizes = [key for key in evaluation.speed[0] if key.startswith("batch_")]
    return [
        Column("generator", "generator"),
        Column("steps", "steps"),
        *(Column(key, f"batch {key.removeprefix('batch_')}", "images/s", ",.1f") for key in sizes),
    ]


def tables_as_text(evaluation: Evaluation) -> str:
    """Quality and speed for a terminal."""
    return "\n\n".join(
        (
            write_summary_table(evaluation.quality, QUALITY_COLUMNS),
            write_summary_table(evaluation.speed, speed_columns(evaluation)),
        )
    )


def _row(evaluation: Evaluation, generator: str) -> Mapping[str, Any]:
    return next((r for r in evaluation.quality if r["generator"] == generator), {})


def student_rows(evaluation: Evaluation) -> list[Mapping[str, Any]]:
    """Quality rows of the student, fewest steps first."""
    return [row for row in evaluation.quality if row["generator"].startswith("student")]


def _headline(evaluation: Evaluation) -> list[tuple[str, str, str]]:
    teacher, student = _row(evaluation, AUTOREGRESSIVE), student_rows(evaluation)[0]
    speeds = {row["generator"]: row for row in evaluation.speed}
    size = next(key for key in evaluation.speed[0] if key.startswith("batch_"))
    gain = speeds[student["generator"]][size] / speeds[AUTOREGRESSIVE][size]
    return [
        ("one-step student", f"{student['fd_digits']:.2f}", "fd_digits, lower is better"),
        (
            "its teacher",
            f"{teacher['fd_digits']:.2f}",
            f"fd_digits in {teacher['steps']} steps; the student has {student['ratio']:.2f} x that",
        ),
        ("speed-up", f"{gain:.1f} x", f"images/s at batch {size.removeprefix('batch_')}"),
        ("right class", f"{student['class_accuracy']:.1%}", "of the student's images"),
    ]


def _columns(evaluation: Evaluation) -> tuple[str, ...]:
    """What stands above the pictures: their classes."""
    return tuple(map(str, evaluation.classes))


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
    evaluation: Evaluation,
    *,
    title: str,
    subtitle: str,
    history: Sequence[Mapping[str, float]] = (),
    settings: Mapping[str, Mapping[str, Any]],
    commands: Sequence[str],
) -> Report:
    """Everything the page shows.

    Args:
        evaluation: the figures and pictures.
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
    return Report(
        title=title,
        subtitle=subtitle,
        headline=_headline(evaluation),
        pictures=[
            Picture(name, "", images.numpy(), len(images), _columns(evaluation))
            for name, images in evaluation.pictures
        ],
        tables=[
            Table("Quality", QUALITY_COLUMNS, evaluation.quality),
            Table("Speed, class to pixels", speed_columns(evaluation), evaluation.speed),
        ],
        meaning=_MEANING,
        protocol=evaluation.protocol,
        curves=curves,
        commands=commands,
        settings=settings,
        versions=versions(),
    )


def write_evaluation(
    out: str, evaluation: Evaluation, report: Report, summary: Mapping[str, Any]
) -> None:
    """Write report.html, grid.png and, last, summary.json under a URI.

    Raises:
        StorageError: if the URI cannot be written.
    """
    storage = open_storage(out)
    rows = [(name, images.numpy()) for name, images in evaluation.pictures]
    picture = labelled_grid(rows, _columns(evaluation), scale=3, invert=True)
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    storage.write("grid.png", stream.getvalue())
    storage.write("report.html", render_report(report).encode())
    write_json(storage, SUMMARY_FILE, summary)
