"""A look at a student while it is being trained: how far it is, a picture, the best one kept.

Plain torch.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ddray.distillation.log import draw
from ddray.errors import ConfigError
from ddray.evaluation.rows import student_name, trained_schedules
from ddray.method.schedule import num_steps, parse_schedule
from ddray.method.seeding import next_seed
from ddray.method.student import Student
from ddray.method.teacher import Teacher
from ddray.metrics.fd_digits import DigitsMetric, makes_digits
from ddray.metrics.frechet import FeatureStatistics
from ddray.models.zoo import METRIC_FOLDER, load_student, load_teacher
from ddray.report.image_file import encode_png
from ddray.report.pictures import labelled_grid
from ddray.sets.trajectories.plan import TrajectoryPlan
from ddray.sets.trajectories.shard import Rows
from ddray.sets.trajectories.trajectory_set import TrajectorySet
from ddray.storage import open_storage
from ddray.storage.checkpoint import load_folder, save_folder
from ddray.storage.run_folder import EVALUATIONS_FILE, LineLog, read_lines

BEST_FOLDER = "student-best"
PICTURES_FOLDER = "pictures"

_TOGETHER = 64
_COLUMNS = 10
_PIXELS_SHOWN = 96


def require_classes(plan: TrajectoryPlan) -> None:
    """Refuse a set whose students cannot be looked at.

    Raises:
        ConfigError: for captions, or a single row.
    """
    if plan.conditioning == "text":
        raise ConfigError("evaluate_every is for students of classes; set it to 0 for captions")
    if plan.count < 2:
        raise ConfigError("evaluate_every needs a set of at least 2 rows; set it to 0 for this one")


def check_student(folder: str, data: str, out: str, count: int, teacher: str) -> dict[str, Any]:
    """Measure a student against its teacher's trajectories, and keep it if it is the best so far.

    Writes a line of OUT/evaluations.jsonl, OUT/pictures/step-N.png and, for a student that is
    better than all before, OUT/student-best.

    Args:
        folder: of the student.
        data: URI of the trajectory set, whose first sound rows are what the teacher makes.
        out: URI of the run.
        count: images of each.
        teacher: name or folder.

    Returns:
        The line: step, for every number of steps the Frechet distance of images to the held-out
        digits ("fd_digits", and its "ratio" to that of the trajectories) and the class accuracy, or
        for other images the distance of their codes' means and deviations to those of the
        trajectories ("fd_codes"), and "worse_in_a_row", evaluations since the best one.
    """
    storage = open_storage(out)
    student, model = load_student(folder, device="cpu"), load_teacher(teacher, device="cpu")
    trajectories = TrajectorySet.open(data)
    index_N, labels_N, tokens_NL = _trajectories(trajectories, count)
    measure = _digits_figures if makes_digits(model) else _code_figures
    line: dict[str, Any] = {"step": int(student.config["step"])}
    line |= measure(student, model, labels_N, tokens_NL, next_seed(trajectories.plan.seed))
    name = f"{PICTURES_FOLDER}/step-{line['step']:07d}.png"
    first = index_N[:_COLUMNS], labels_N[:_COLUMNS], tokens_NL[:_COLUMNS]
    picture = _picture(student, model, trajectories.plan.seed, *first)
    storage.write(name, encode_png(picture))
    draw(out, line, picture)
    earlier = [e for e in read_lines(storage, EVALUATIONS_FILE) if e["step"] < line["step"]]
    line["worse_in_a_row"] = _worse_in_a_row([*earlier, line])
    if not line["worse_in_a_row"]:
        config, weights, tokenizer = load_folder(folder)
        save_folder(storage.join(BEST_FOLDER), config, model=weights, tokenizer=tokenizer)
    log = LineLog(storage, EVALUATIONS_FILE)
    log.add(**line)
    log.write()
    return line


def _worse_in_a_row(lines: list[dict[str, Any]]) -> int:
    """Evaluations since the one of the least distance in one step."""
    key = next(name for name in lines[-1] if name.startswith("fd_"))
    distances = [line[key] for line in lines]
    return len(distances) - 1 - distances.index(min(distances))


def _trajectories(trajectories: TrajectorySet, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Indices [N], classes [N] and tokens [N, L] of the first rows of the shards that are there."""
    parts: list[Rows] = []
    for k in trajectories.listing().sizes:
        parts.append(trajectories.read_shard(k))
        if sum(len(index) for index, _, _ in parts) >= count:
            break
    columns = [np.concatenate(column)[:count] for column in zip(*parts, strict=True)]
    index, label, tokens = (torch.from_numpy(column.astype(np.int64)) for column in columns)
    return index, label, tokens


def _jumps(student: Student) -> Iterator[tuple[str, int, list[int]]]:
    """Name, number of steps and stages of every schedule that the student was trained for."""
    stages = len(student.stages)
    for schedule in trained_schedules(student.config):
        steps = num_steps(parse_schedule(schedule, stages))
        yield (
            student_name(schedule, stages, [schedule]),
            steps,
            [int(t) for t in schedule.split(",")],
        )


def _generate(
    student: Student, labels_N: Tensor, index_N: Tensor, seed: int, schedule: list[int]
) -> Tensor:
    parts = zip(labels_N.split(_TOGETHER), index_N.split(_TOGETHER), strict=True)
    return torch.cat([student.generate(c, index=i, seed=seed, schedule=schedule) for c, i in parts])


def _digits_figures(
    student: Student, teacher: Teacher, labels_N: Tensor, tokens_NL: Tensor, seed: int
) -> dict[str, float]:
    metric = DigitsMetric(METRIC_FOLDER)

    def judge(content: Tensor) -> dict[str, float]:
        images = torch.cat([teacher.decode(part) for part in content.split(_TOGETHER)])
        return metric(images, labels_N)

    base = judge(tokens_NL)["fd_digits"]
    figures = {}
    for _, steps, schedule in _jumps(student):
        found = judge(_generate(student, labels_N, torch.arange(len(labels_N)), seed, schedule))
        figures[f"fd_digits_{steps}"] = found["fd_digits"]
        figures[f"ratio_{steps}"] = found["fd_digits"] / base
        figures[f"class_accuracy_{steps}"] = found["class_accuracy"]
    return figures


def _code_figures(
    student: Student, teacher: Teacher, labels_N: Tensor, tokens_NL: Tensor, seed: int
) -> dict[str, float]:
    theirs = FeatureStatistics.from_features(code_features(teacher.codebook[tokens_NL]))
    figures = {}
    for _, steps, schedule in _jumps(student):
        codes_NLE = _generate(student, labels_N, torch.arange(len(labels_N)), seed, schedule)
        ours = FeatureStatistics.from_features(code_features(codes_NLE))
        figures[f"fd_codes_{steps}"] = theirs.distance(ours)
    return figures


def _picture(
    student: Student,
    teacher: Teacher,
    seed: int,
    index_N: Tensor,
    labels_N: Tensor,
    tokens_NL: Tensor,
) -> npt.NDArray[np.uint8]:
    """The teacher's trajectories, and what the student makes of the same noise [H, W, 3]."""
    rows = [("teacher", teacher.decode(tokens_NL).numpy())]
    for name, _, schedule in _jumps(student):
        codes = _generate(student, labels_N, index_N, seed, schedule)
        rows.append((name, student.decode(codes).numpy()))
    scale = max(1, _PIXELS_SHOWN // max(rows[0][1].shape[2:]))
    return np.asarray(labelled_grid(rows, scale=scale))


def code_features(codes_BLE: Tensor) -> Tensor:
    """Mean and deviation of an image's codes [B, 2E]: features that need no outside network."""
    return torch.cat((codes_BLE.mean(1), codes_BLE.std(1)), 1)
