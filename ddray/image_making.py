"""What a plan asks of its student: a plan for a job, the student of a plan, its rows as files.

Bulk generation without Ray: the workers of a pool run this, and so may a loop in one process.
Imports ddray.conditions, config, errors, generate (through the zoo), image_plan, report (pixels),
schedule and seeding.

Shapes: B rows of a batch, L all tokens, H and W pixels.
"""

import os

import numpy as np
import numpy.typing as npt
import torch

from ddray.caption_file import CaptionFile
from ddray.conditions import encoder_name
from ddray.config import GenerateConfig
from ddray.errors import ConfigError, ShardError
from ddray.generate import AskedFor, Student
from ddray.image_plan import ImagePlan
from ddray.models.zoo import load_student
from ddray.report import to_uint8
from ddray.schedule import TeacherStages, parse_schedule
from ddray.seeding import SCHEME


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
    name = config.student
    return ImagePlan(
        # Workers have another current folder.
        student=os.path.abspath(name) if os.path.isdir(name) else name,
        student_fingerprint=student.fingerprint,
        tokenizer_fingerprint=student.tokenizer.fingerprint,
        conditioning=student.conditioning,
        num_classes=student.num_classes,
        seed=config.seed,
        noise_scheme=SCHEME,
        schedule=schedule,
        encoding=config.format,
        content=config.content,
        image_format=config.image_format,
        quality=config.quality,
        threads=config.threads,
        count=config.count,
        shard_rows=config.shard_rows,
        batch_size=config.batch_size,
        stages=student.stages,
        vocab_size=len(student.codebook),
        classes=config.classes,
        text_encoder=encoder_name(config, captions),
    )


def planned_student(plan: ImagePlan, device: str | torch.device = "auto") -> Student:
    """Load the student that a plan names.

    Raises:
        ConfigError: if there is no such student here.
        ShardError: if it has other weights than the plan's.
    """
    student = load_student(plan.student, device=device)
    for what, here, there in (
        ("network", student.fingerprint, plan.student_fingerprint),
        ("tokenizer", student.tokenizer.fingerprint, plan.tokenizer_fingerprint),
    ):
        if here != there:
            raise ShardError(
                f"{plan.student} has another {what} here (sha256 {here[:12]}) than in the plan "
                f"({there[:12]}); restore the weights that the set was made with"
            )
    return student


def generate_rows(
    student: Student, plan: ImagePlan, rows: range, cond: AskedFor
) -> npt.NDArray[np.uint8] | npt.NDArray[np.int64]:
    """Consecutive rows as the plan's settings give them.

    Args:
        student: the plan's.
        plan: of the set.
        rows: indices.
        cond: what the rows are asked for by.

    Returns:
        Pixels uint8 [B, H, W] or [B, H, W, 3], or tokens int64 [B, L].
    """
    index = torch.arange(rows.start, rows.stop)
    codes = student.generate(cond, index=index, seed=plan.seed, schedule=plan.schedule)
    if plan.content == "images":
        return to_uint8(student.decode(codes).cpu().numpy())
    tokens: npt.NDArray[np.int64] = student.tokenizer.module.nearest(codes).cpu().numpy()
    return tokens
