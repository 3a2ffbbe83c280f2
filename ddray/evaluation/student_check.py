"""A look at a student while it is being trained: how far it is, a picture, the best one kept.

It is an evaluation like any other, of few rows: the teacher's trajectories, which lie there, and
the student along every schedule that it was trained for. Features stay in memory. Plain torch.

Shapes: N rows, L tokens, E code width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ddray.config.base import reserved_device
from ddray.config.distillation import DistillConfig
from ddray.config.sampling import SampleConfig
from ddray.distillation.log import draw
from ddray.errors import ConfigError, ShardError
from ddray.evaluation.feature_set import HeldFeatures
from ddray.evaluation.generators import Generators
from ddray.evaluation.judges import Judge, Judges, leading_of
from ddray.evaluation.judging import Judgement, add_ratio
from ddray.evaluation.making import FeatureMaker
from ddray.evaluation.plan import EvaluationPlan, Generator, Task
from ddray.evaluation.rows import TRANSPORTED, student_row, trained_schedules
from ddray.method.model import Model
from ddray.method.seeding import next_seed
from ddray.method.student import Student
from ddray.method.teacher import AskedFor
from ddray.metrics.frechet import FeatureStatistics
from ddray.metrics.measurement import METRICS
from ddray.models.zoo import load_student
from ddray.report.image_file import encode_png
from ddray.report.pictures import labelled_grid
from ddray.sets.batch_size import batch_size
from ddray.sets.conditions import Conditions, load_encoder, read_conditions
from ddray.sets.trajectories.trajectory_set import TrajectorySet
from ddray.storage import open_storage
from ddray.storage.checkpoint import load_folder, save_folder
from ddray.storage.run_folder import EVALUATIONS_FILE, LineLog, read_lines

BEST_FOLDER = "student-best"
PICTURES_FOLDER = "pictures"
CODES_METRIC = "fd_codes"

_COLUMNS = 10
_PIXELS_SHOWN = 96
_NOT_TOLD = ("kind", "settings", "warnings")


def check_evaluations(config: DistillConfig, trajectories: TrajectorySet, model: Model) -> None:
    """Refuse a training whose students cannot be looked at.

    Args:
        config: of the run.
        trajectories: its set.
        model: of the same images and conditions as the students.

    Raises:
        ConfigError: for a set of a single row, metrics that cannot come out.
        DDRayError: for weights or a reference that cannot be read.
    """
    count = min(config.evaluate_count, trajectories.plan.count)
    if count < 2:
        raise ConfigError("evaluate_every needs a set of at least 2 rows; set it to 0 for this one")
    _judges(config, model, count)


def check_student(folder: str, config: DistillConfig) -> dict[str, Any]:
    """Measure a student beside its teacher's trajectories, and keep it if it is the best so far.

    Writes a line of OUT/evaluations.jsonl, OUT/pictures/step-N.png and, for a student that is
    better than all before, OUT/student-best.

    Args:
        folder: of the student.
        config: of the run.

    Returns:
        The line: "step"; "quality", a row for the trajectories and each schedule with its
        "generator", "steps", "images", metrics by their keys and the "ratio" of the leading one to
        that of the trajectories; "leading", its key; and "worse_in_a_row", evaluations since the
        best one by the leading metric in one step.

    Raises:
        DDRayError: for whatever cannot be read, or judged.
    """
    storage = open_storage(config.out)
    student = load_student(folder, device=reserved_device(config.evaluate_gpus))
    trajectories = TrajectorySet.open(config.data)
    rows = _first_rows(trajectories, config.evaluate_count, student)
    quality, leading = _measured(config, folder, student, rows)
    line: dict[str, Any] = {"step": int(student.config["step"])}
    line |= {"quality": quality, "leading": leading}
    name = f"{PICTURES_FOLDER}/step-{line['step']:07d}.png"
    picture = _picture(student, rows)
    storage.write(name, encode_png(picture))
    draw(config.out, line, picture)
    earlier = [e for e in read_lines(storage, EVALUATIONS_FILE) if e["step"] < line["step"]]
    line["worse_in_a_row"] = _worse_in_a_row([*earlier, line])
    if not line["worse_in_a_row"]:
        card, weights, tokenizer = load_folder(folder)
        save_folder(storage.join(BEST_FOLDER), card, model=weights, tokenizer=tokenizer)
    log = LineLog(storage, EVALUATIONS_FILE)
    log.add(**line)
    log.write()
    return line


def _worse_in_a_row(lines: Sequence[dict[str, Any]]) -> int:
    """Evaluations since the best one in one step, of those that the last can be compared with."""
    leading = lines[-1]["leading"]
    figures = [
        next(
            row[leading]
            for row in line["quality"]
            if row["generator"].startswith("student") and row["steps"] == 1
        )
        for line in lines
        if line.get("leading") == leading  # other metrics, or the keys of an earlier ddray
    ]
    higher = any(m.key == leading and m.higher_is_better for m in METRICS.values())
    best = max(figures) if higher else min(figures)
    return len(figures) - 1 - figures.index(best)


def _judges(config: DistillConfig, model: Model, count: int) -> list[Judge]:
    """Who judges; nobody where there is no more than the trajectories to compare codes with."""
    asked, judges = config.evaluate, Judges(config.evaluate, count, model)
    if not (asked.metrics or asked.reference or judges.are_bundled):
        return []
    if asked.metrics == (CODES_METRIC,):
        return []
    try:
        return judges.all()
    except ConfigError as error:
        raise ConfigError(f"evaluate: {error}") from error


@dataclass(frozen=True)
class _FirstRows:
    """The first sound rows of a set: index int64 [N], tokens int64 [N, L], and their conditions."""

    seed: int
    index: Tensor
    tokens: Tensor
    conditions: Conditions


def _first_rows(trajectories: TrajectorySet, count: int, student: Student) -> _FirstRows:
    """Those of the shards that are there."""
    shards, parts, found = [], [], 0
    for k in trajectories.listing().sizes:
        try:
            index, _, tokens = trajectories.read_shard(k)
        except ShardError:
            continue
        shards.append(k)
        parts.append((index.astype(np.int64), tokens.astype(np.int64)))
        found += len(index)
        if found >= count:
            break
    if not shards:
        raise ShardError(f"there are no trajectories in {trajectories.uri}")
    encode = load_encoder(trajectories.plan, student)
    conditions = read_conditions(trajectories, shards, encode)
    index, tokens = (np.concatenate(column)[:count] for column in zip(*parts, strict=True))
    rows = torch.from_numpy(index), torch.from_numpy(tokens)
    return _FirstRows(trajectories.plan.seed, *rows, conditions)


class _Beside(Generators):
    """The student, and in place of its teacher what that has made: one tokenizer decodes both."""

    def __init__(self, features: HeldFeatures, student: Student, rows: _FirstRows):
        super().__init__(features, str(student.device), student=student)
        self._rows = rows

    def model_of(self, generator: Generator) -> Model:
        return self.student

    def labels(self, generator: Generator, rows: range) -> npt.NDArray[np.int64] | None:
        if self.plan.conditioning != "class":
            return None
        return self._rows.conditions.label[rows.start : rows.stop].astype(np.int64)

    def content(self, generator: Generator, rows: range) -> Tensor:
        if generator.kind == "transport":
            return self._rows.tokens[rows.start : rows.stop]
        return super().content(generator, rows)

    def asked(self, rows: range) -> AskedFor:
        return self._rows.conditions.of(rows)

    def told(self, rows: range) -> list[int | str]:
        return self._rows.conditions.label[rows.start : rows.stop].tolist()

    def codes(self, generator: Generator, rows: range) -> Tensor:
        """Codes float32 [N, L, E] that images are decoded from."""
        content = self.content(generator, rows)
        if content.is_floating_point():
            return content
        return self.student.codebook[content.to(self.student.device)]


def _measured(
    config: DistillConfig, folder: str, student: Student, rows: _FirstRows
) -> tuple[list[dict[str, Any]], str]:
    """Rows of the table, and the key of the metric that they are compared by."""
    count = len(rows.index)
    judges = _judges(config, student, count)
    by_class = student.conditioning == "class"
    plan = EvaluationPlan(
        generators=(
            Generator(TRANSPORTED, "transport", count, len(student.stages)),
            *(student_row(student, s, count) for s in trained_schedules(student.config)),
        ),
        extractors=tuple(judge.extractor for judge in judges),
        models={"student": folder, "data": config.data},
        conditioning=student.conditioning,
        classes=tuple(np.unique(rows.conditions.label[:count]).tolist()) if by_class else (),
        seed=next_seed(rows.seed),
        threads=torch.get_num_threads(),
        batch_size=batch_size(SampleConfig(num_gpus=config.evaluate_gpus), student.model),
    )
    features = HeldFeatures(open_storage(config.out), plan)
    generators = _Beside(features, student, rows)
    if not judges:
        return _codes_compared(generators), CODES_METRIC
    device = str(student.device)
    maker = FeatureMaker(features, device, generators)
    for k in range(plan.num_shards):
        maker.do(k)
    judgement = Judgement(
        *(features, judges, generators),
        splits=config.evaluate.splits,
        skip_broken=False,
        device=device,
    )
    leading = leading_of(judges)
    add_ratio(judgement.quality, leading, "transport")
    told = [{k: v for k, v in row.items() if k not in _NOT_TOLD} for row in judgement.quality]
    return told, leading


def _codes_compared(generators: _Beside) -> list[dict[str, Any]]:
    """The students' rows: how far their codes are from those of the trajectories."""
    plan, statistics = generators.plan, []
    for row in plan.generators:
        batches = plan.batches(Task(row, 0, row.count))
        found = [code_features(generators.codes(row, rows)).cpu() for rows in batches]
        statistics.append(FeatureStatistics.from_features(torch.cat(found)))
    theirs, *ours = statistics
    return [
        {
            "generator": row.name,
            "steps": row.steps,
            "images": row.count,
            CODES_METRIC: theirs.distance(own),
            "ratio": None,
        }
        for row, own in zip(plan.generators[1:], ours, strict=True)
    ]


def _picture(student: Student, rows: _FirstRows) -> npt.NDArray[np.uint8]:
    """The teacher's trajectories, and what the student makes of the same noise [H, W, 3]."""
    index = rows.index[:_COLUMNS]
    asked = rows.conditions.of(range(len(index)))
    shown = [("teacher", student.decode(rows.tokens[:_COLUMNS]).cpu().numpy())]
    for schedule in trained_schedules(student.config):
        codes = student.generate(asked, index=index, seed=rows.seed, schedule=schedule)
        name = student_row(student, schedule, len(index)).name
        shown.append((name, student.decode(codes).cpu().numpy()))
    scale = max(1, _PIXELS_SHOWN // max(shown[0][1].shape[2:]))
    return np.asarray(labelled_grid(shown, scale=scale))


def code_features(codes_BLE: Tensor) -> Tensor:
    """Mean and deviation of an image's codes [B, 2E]: features that need no outside network."""
    return torch.cat((codes_BLE.mean(1), codes_BLE.std(1)), 1)
