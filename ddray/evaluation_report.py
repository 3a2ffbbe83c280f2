"""The page that shows an evaluation: report.html, grid.png, summary.json.

Imports ddray.evaluate, report, chart and storage.
"""

import io
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from ddray import __version__
from ddray.chart import Curve
from ddray.evaluate import AUTOREGRESSIVE, NAIVE, RECONSTRUCTION, Evaluation
from ddray.report import (
    Bar,
    Column,
    Picture,
    Report,
    Table,
    labelled_grid,
    render_report,
    write_summary_table,
)
from ddray.run_folder import SUMMARY_FILE, write_json
from ddray.storage import open_storage

DIGITS = tuple("0123456789")

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


def bars(evaluation: Evaluation) -> list[Bar]:
    """What a good digits run reaches, beside what this one measured."""
    teacher = _row(evaluation, AUTOREGRESSIVE)
    first = student_rows(evaluation)[0]
    naive = _row(evaluation, NAIVE)["fd_digits"]
    transport = evaluation.transport
    rows = [
        ("teacher, autoregressive: fd_digits", "<= 4.5", teacher["fd_digits"], 4.5),
        ("teacher: class accuracy", ">= 0.96", -teacher["class_accuracy"], -0.96),
        ("student, 1 step: fd_digits", "<= 8.0", first["fd_digits"], 8.0),
        ("student, 1 step: fd_digits / naive", "<= 0.25", first["fd_digits"] / naive, 0.25),
        ("student, 1 step: class accuracy", ">= 0.95", -first["class_accuracy"], -0.95),
        ("transport: same tokens as the exact map", ">= 0.997", -transport["agreement"], -0.997),
        ("trajectories: time / plain sampling", "<= 1.2", transport["cost_ratio"], 1.2),
    ]
    if reconstruction := _row(evaluation, RECONSTRUCTION):
        used = reconstruction["codes_used"]
        rows.insert(0, ("tokenizer: fd_digits", "<= 1.0", reconstruction["fd_digits"], 1.0))
        rows.insert(0, ("tokenizer: codes used", ">= 0.9", -used, -0.9))
    return [
        Bar(what, bar, f"{abs(measured):.4g}", measured <= limit)
        for what, bar, measured, limit in rows
    ]


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
    reached: Sequence[Bar] | None = None,
) -> Report:
    """Everything the page shows.

    Args:
        evaluation: the figures and pictures.
        title: of the page.
        subtitle: the line below it.
        history: lines of the training, for the curves.
        settings: resolved configs by name.
        commands: how to do it again.
        reached: the bars; None = those of the evaluation.
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
            Picture(name, "", images.numpy(), len(images), DIGITS[: len(images)])
            for name, images in evaluation.pictures
        ],
        tables=[
            Table("Quality", QUALITY_COLUMNS, evaluation.quality),
            Table("Speed", speed_columns(evaluation), evaluation.speed),
        ],
        protocol=evaluation.protocol,
        bars=bars(evaluation) if reached is None else reached,
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
    picture = labelled_grid(rows, DIGITS, scale=3, invert=True)
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    storage.write("grid.png", stream.getvalue())
    storage.write("report.html", render_report(report).encode())
    write_json(storage, SUMMARY_FILE, summary)
