"""The rows of a table: which generators there are, what each is called, how it samples."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ddray.config.evaluation import EvaluateConfig
from ddray.errors import ConfigError
from ddray.evaluation.generators import reconstructed_digits
from ddray.evaluation.plan import Generator
from ddray.method.masked_decoding import Masked
from ddray.method.model import Model
from ddray.method.schedule import num_steps, parse_schedule
from ddray.method.teacher import Teacher
from ddray.sets.trajectories.trajectory_set import TrajectorySet

AUTOREGRESSIVE = "teacher, autoregressive"
TRANSPORTED = "teacher, by transport"
NAIVE = "independent tokens"
RECONSTRUCTION = "tokenizer reconstruction"
SAMPLES = "samples"


def student_name(schedule: str, stages: int, trained: Sequence[str] = ()) -> str:
    """Name of a student's row: of a schedule that it was trained for, the steps say all."""
    steps = num_steps(parse_schedule(schedule, stages))
    return f"student, {_plural(steps)}" + ("" if schedule in trained else f" ({schedule})")


def trained_schedules(config: Mapping[str, Any]) -> list[str]:
    """Those that a student was trained for: its first jump, its first two, and so on."""
    trained = tuple(config.get("schedule", (0,)))
    return [",".join(map(str, trained[:n])) for n in range(1, len(trained) + 1)]


def student_row(student: Model, schedule: str, count: int) -> Generator:
    """The row of a student alone along a schedule."""
    stages = len(student.stages)
    name = student_name(schedule, stages, trained_schedules(student.config))
    steps = num_steps(parse_schedule(schedule, stages))
    return Generator(name, "student", count, steps, {"schedule": schedule})


def _plural(steps: int) -> str:
    return f"{steps} step{'s' if steps > 1 else ''}"


class Rows:
    """The rows of models.

    Args:
        config: the job.
        models: student, teacher and masked model, as far as there are any.
        classes: that images are asked for by.
    """

    def __init__(self, config: EvaluateConfig, models: Mapping[str, Model], classes: Sequence[int]):
        self.config, self.models, self.classes = config, models, classes

    def all(self, trajectories: TrajectorySet | None, is_digits: bool) -> tuple[Generator, ...]:
        """The rows that were asked for, or all that apply.

        Args:
            trajectories: the set whose rows stand for the teacher's by transport, if there is one.
            is_digits: whether there are real images to reconstruct.

        Raises:
            ConfigError: for a row that there cannot be.
        """
        self.trajectories, self.is_digits = trajectories, is_digits
        makers = {
            "reconstruction": self._reconstructions,
            "teacher": self._teachers,
            "transport": self._transports,
            "student": self._students,
            "skip": self._skips,
            "independent": self._naives,
            "masked": self._maskeds,
        }
        asked = self.config.rows or tuple(makers)
        return tuple(row for name, make in makers.items() if name in asked for row in make())

    def _sampling(self) -> list[tuple[str, dict[str, Any]]]:
        """What is added to a row's name, and how its teacher samples: one for each of a sweep."""
        config, teacher = self.config, self.models["teacher"]
        assert isinstance(teacher, Teacher)
        settings: dict[str, Any] = {"cfg": config.cfg, "top_k": config.top_k}
        settings |= {"top_p": config.top_p, "temperature": config.temperature}
        settings |= {k: v for k, v in teacher.recommended.items() if settings[k] is None}
        keys = list(config.sampling_sweep)
        found = []
        for values in itertools.product(*config.sampling_sweep.values()):
            swept = dict(zip(keys, values, strict=True))
            suffix = "".join(f", {key} {value:g}" for key, value in swept.items())
            found.append((suffix, settings | swept))
        return found

    def _teachers(self) -> list[Generator]:
        if "teacher" not in self.models:
            return []
        steps, count = len(self.models["teacher"].stages), self.config.num_images
        return [
            Generator(AUTOREGRESSIVE + suffix, "teacher", count, steps, sampling)
            for suffix, sampling in self._sampling()
        ]

    def _transports(self) -> list[Generator]:
        if "teacher" not in self.models:
            return []
        steps, count = len(self.models["teacher"].stages), self.config.num_images
        suffix, sampling = self._sampling()[0]
        if self.trajectories is not None:
            count, suffix = min(count, self.trajectories.plan.count), ""
        return [Generator(TRANSPORTED + suffix, "transport", count, steps, sampling)]

    def _students(self) -> list[Generator]:
        student, config = self.models.get("student"), self.config
        if student is None:
            return []
        found = []
        for schedule in dict.fromkeys(
            config.student_schedules or trained_schedules(student.config)
        ):
            row = student_row(student, schedule, config.num_images)
            if not row.uses_teacher:
                found.append(row)
                continue
            found += [
                replace(row, name=row.name + suffix, settings={**row.settings, **sampling})
                for suffix, sampling in self._sampling()
            ]
        return found

    def _skips(self) -> list[Generator]:
        if "teacher" not in self.models or not self.config.skip:
            return []
        stages, found = len(self.models["teacher"].stages), []
        for skip in dict.fromkeys(self.config.skip):
            if skip > stages:
                raise ConfigError(f"skip={skip}, but {self.models['teacher'].name} has {stages}")
            found += [
                Generator(
                    f"teacher, last {skip} steps in one{suffix}",
                    "skip",
                    self.config.num_images,
                    stages - skip + 1,
                    {**sampling, "skip": skip},
                )
                for suffix, sampling in self._sampling()
            ]
        return found

    def _naives(self) -> list[Generator]:
        made = self.trajectories is not None or "transport" in (self.config.rows or ("transport",))
        if "teacher" not in self.models:
            return []
        if not made:
            raise ConfigError("rows has independent, which are counted in trajectories: give data=")
        return [Generator(NAIVE, "independent", self.config.num_images, 1)]

    def _maskeds(self) -> list[Generator]:
        model = self.models.get("masked")
        if not isinstance(model, Masked):
            return []
        settings: dict[str, Any] = {"cfg": model.default_cfg}
        settings |= {k: model.config[k] for k in ("choice_temperature",) if k in model.config}
        return [
            Generator(
                f"masked decoding, {_plural(steps)}",
                "masked",
                self.config.num_images,
                steps,
                {"steps": steps, **settings},
            )
            for steps in dict.fromkeys(self.config.masked_steps)
        ]

    def _reconstructions(self) -> list[Generator]:
        if "teacher" not in self.models or not self.is_digits:
            return []
        try:
            digits = reconstructed_digits(self.classes, self.config.num_images)
        except ConfigError:
            # Without the real digits this row alone is missing: the statistics are bundled.
            return []
        return [Generator(RECONSTRUCTION, "reconstruction", len(digits.labels))]
