"""What bulk generation asks of a student: a plan for a job, the student of a plan, statistics."""

import torch

from ddray.config.generation import GenerateConfig
from ddray.errors import ConfigError
from ddray.method.schedule import TeacherStages, parse_schedule
from ddray.method.student import Student
from ddray.models.zoo import load_student
from ddray.sets.images.plan import ImagePlan
from ddray.sets.labels import with_block
from ddray.sets.making import planned_fields, require_planned
from ddray.storage.caption_file import CaptionFile


def make_plan(
    config: GenerateConfig, student: Student, captions: CaptionFile | None = None
) -> ImagePlan:
    """Everything that decides the bytes of an image set, but the captions themselves.

    Raises:
        ConfigError: if the student cannot do what the job asks for.
    """
    schedule = config.schedule or "0"
    steps = parse_schedule(schedule, len(student.stages))
    if any(isinstance(step, TeacherStages) for step in steps):
        raise ConfigError(
            f"schedule {schedule!r} has a teacher's part; in bulk the student is alone"
        )
    split = student.config.get("split", len(student.stages))
    if config.content == "tokens" and split != len(student.stages):
        raise ConfigError(
            f"content=tokens, but {student.name} gives tokens for {split} of {len(student.stages)} "
            "stages alone (its split), and codes between tokens for the rest; take content=images"
        )
    return ImagePlan(
        student=config.student,
        student_fingerprint=student.fingerprint,
        schedule=schedule,
        encoding=config.format,
        content=config.content,
        image_format=config.image_format,
        quality=config.quality,
        compression=config.compression,
        class_names=_class_names(student),
        dtype=config.student_dtype,
        decode_dtype=config.pixel_dtype,
        labels=_labels(config, student),
        samples_per_prompt=config.images_per_prompt,
        **planned_fields(config, student, captions),
    )


def _labels(config: GenerateConfig, student: Student) -> str:
    """The plan's rule, refused where there are no classes."""
    if student.conditioning == "text" and config.labels != "balanced":
        raise ConfigError(
            f"labels={config.labels} is of classes, but {student.name} is conditioned on captions"
        )
    return with_block(config.labels, config.count, config.classes or student.num_classes)


def _class_names(student: Student) -> tuple[str, ...]:
    """The names of a student's classes, if it has one for each."""
    names = tuple(map(str, student.config.get("class_names", ())))
    return names if len(names) == student.num_classes else ()


def planned_student(plan: ImagePlan, device: str | torch.device) -> Student:
    """Load the student that a plan names, in the plan's dtypes.

    Raises:
        ConfigError: if there is no such student here.
        ShardError: if it has other weights than the plan's.
    """
    student = load_student(
        plan.student, device=device, dtype=plan.dtype, decode_dtype=plan.decode_dtype
    )
    require_planned(student, plan.student, plan.student_fingerprint, plan)
    return student
