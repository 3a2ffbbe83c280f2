"""Images in bulk: a plan, a pool of students, shards of images.

Imports ddray.config, images, the zoo and the pool.
"""

from typing import Any

import numpy as np
import torch

from ddray.config import GenerateConfig
from ddray.errors import ConfigError
from ddray.generate import Student
from ddray.images import ImagePlan, ImageSet
from ddray.models.zoo import load_student
from ddray.run_folder import CONFIG_FILE, SUMMARY_FILE, write_json
from ddray.runtime.pool import fill
from ddray.schedule import TeacherStages, parse_schedule


class ImageWorker:
    """An actor's student, which writes whole shards of images.

    Args:
        uri: of the image set.
        device: "auto", "cpu" or "cuda".
    """

    def __init__(self, uri: str, device: str):
        self._set = ImageSet.open(uri)
        torch.set_num_threads(self._set.plan.threads)
        self._student = load_student(self._set.plan.student, device=device)

    def do(self, shard: int) -> int:
        """Generate and write one shard."""
        plan = self._set.plan
        rows = plan.shard_range(shard)
        images = [
            generate_rows(self._student, plan, np.arange(i, min(i + plan.batch_size, rows.stop)))
            for i in range(rows.start, rows.stop, plan.batch_size)
        ]
        self._set.write_shard(shard, np.concatenate(images))
        return len(rows)


def generate_rows(student: Student, plan: ImagePlan, index: np.ndarray) -> np.ndarray:
    """Images float32 [N, C, H, W] in [0, 1] of the given indices."""
    codes = student.generate(
        torch.from_numpy(plan.label(index)),
        index=torch.from_numpy(index),
        seed=plan.seed,
        schedule=plan.schedule,
    )
    return student.decode(codes).cpu().numpy()


def make_plan(config: GenerateConfig, student: Student) -> ImagePlan:
    """Everything that decides the bytes of an image set."""
    schedule = config.schedule or "0"
    steps = parse_schedule(schedule, len(student.stages))
    if any(isinstance(step, TeacherStages) for step in steps):
        raise ConfigError(
            f"schedule {schedule!r} has a teacher's part; in bulk the student is alone"
        )
    return ImagePlan(
        student=student.name,
        student_fingerprint=student.fingerprint,
        tokenizer_fingerprint=student.tokenizer.fingerprint,
        num_classes=student.num_classes,
        seed=config.seed,
        schedule=schedule,
        encoding=config.format,
        count=config.count,
        shard_rows=config.shard_rows,
        batch_size=config.batch_size,
        threads=config.threads,
    )


def generate(config: GenerateConfig) -> dict[str, Any]:
    """Fill an image set; a rerun fills gaps only.

    Args:
        config: the job.

    Returns:
        Summary: what is there and what was made, seconds, images/s.

    Raises:
        ConfigError: a schedule that does not fit, or another plan at the URI.
        StorageError: the URI cannot be written.
        ClusterError: Ray cannot start, or the pool keeps failing.
        ShardError: shards are missing although the pool finished.
    """
    student = load_student(config.student, device="cpu")
    images = ImageSet.create(config.out, make_plan(config, student))
    write_json(images.storage, CONFIG_FILE, config.model_dump(mode="json"))
    filled = fill("images", images, ImageWorker, config)
    summary = {
        "uri": images.storage.uri,
        "student": images.plan.student,
        "schedule": images.plan.schedule,
        "images": images.plan.count,
        "format": images.plan.encoding,
        **filled.summary(),
    }
    write_json(images.storage, SUMMARY_FILE, summary)
    return summary
