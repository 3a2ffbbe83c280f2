"""The schedule of a student: where it jumps, and which stages a teacher writes in between.

Pure text and numbers.
"""

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

from ddray.errors import ConfigError, is_integer

TEACHER_ALONE = "teacher"
"""In place of a schedule, where images by the teacher alone can be had: all stages, from noise."""


class TeacherStages(NamedTuple):
    """Stages first, ..., last - 1 are written by the teacher."""

    first: int
    last: int


Schedule = tuple[int | TeacherStages, ...]


def parse_schedule(schedule: Sequence[int] | str, num_stages: int) -> Schedule:
    """Read a schedule and check it against a model.

    Args:
        schedule: stages at which the student jumps, (0, 16) or "0,16"; "teacher:8-16" between them
            lets the teacher write stages 8 to 15.
        num_stages: stages of the model.

    Returns:
        The steps in order.

    Raises:
        ConfigError: if it is empty, does not increase, leaves the model's stages, or starts with
            noise that nothing has turned into data.
    """
    if not isinstance(schedule, Sequence):
        raise ConfigError(f'schedule {schedule!r} must be a list of stages or a string like "0,16"')
    parts = schedule.split(",") if isinstance(schedule, str) else list(schedule)
    steps: list[int | TeacherStages] = []
    at = -1
    if not parts:
        raise ConfigError('the schedule is empty; give at least one jump, such as "0"')
    for part in parts:
        step = _parse_step(part, schedule)
        start = step.first if isinstance(step, TeacherStages) else step
        end = step.last if isinstance(step, TeacherStages) else step
        if isinstance(step, TeacherStages) and not step.first < step.last <= num_stages:
            raise ConfigError(
                f"schedule {schedule!r}: teacher:{step.first}-{step.last} must name stages in "
                f"increasing order up to {num_stages}"
            )
        if isinstance(step, int) and not at < step < num_stages:
            raise ConfigError(
                f"schedule {schedule!r}: {step} must be above the jump before it and below "
                f"{num_stages}, the model's number of stages"
            )
        if isinstance(step, TeacherStages) and step.last <= at:
            raise ConfigError(
                f"schedule {schedule!r}: teacher:{step.first}-{step.last} ends before stage {at}, "
                "where the student has jumped already"
            )
        if not steps and start > 0:
            raise ConfigError(
                f"schedule {schedule!r} begins at stage {start}, but nothing has made the stages "
                "before it; begin with 0 or teacher:0-..."
            )
        if steps and isinstance(steps[-1], TeacherStages) and start != steps[-1].last:
            raise ConfigError(
                f"schedule {schedule!r}: after teacher:{steps[-1].first}-{steps[-1].last} the "
                f"student must jump at {steps[-1].last}"
            )
        steps.append(step)
        at = end if isinstance(step, int) else end - 1
    last = steps[-1]
    if isinstance(last, TeacherStages) and last.last < num_stages:
        raise ConfigError(
            f"schedule {schedule!r}: behind teacher:{last.first}-{last.last} nothing makes the "
            f"stages up to {num_stages}; let the student jump at {last.last}"
        )
    return tuple(steps)


def _parse_step(part: int | str, schedule: object) -> int | TeacherStages:
    if is_integer(part) or re.fullmatch(r"\s*\d+\s*", str(part)):
        step = int(part)
    elif isinstance(part, str) and (match := re.fullmatch(r"\s*teacher:(\d+)-(\d+)\s*", part)):
        return TeacherStages(int(match[1]), int(match[2]))
    else:
        raise ConfigError(
            f'schedule {schedule!r}: {part!r} is neither a stage number nor "teacher:FIRST-LAST"'
        )
    if step < 0:
        raise ConfigError(f"schedule {schedule!r}: stage {step} is negative")
    return step


def default_schedule(stages: Sequence[int]) -> tuple[int, int]:
    """Two jumps: from noise, and from 5/16 of single tokens or half of the scales.

    The published students jump at 80 of 256 tokens and at 4 or 5 of 10 scales.
    """
    scales = max(stages) > 1
    return 0, max(1, len(stages) // 2 if scales else math.ceil(len(stages) * 5 / 16))


def num_steps(schedule: Schedule) -> int:
    """Network evaluations of a schedule: one a jump, one a stage of the teacher."""
    return sum(s.last - s.first if isinstance(s, TeacherStages) else 1 for s in schedule)
