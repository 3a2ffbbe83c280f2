"""Distillation on Ray Train and DeepSpeed: workers, ZeRO, checkpoints, resume.

The driver's side: what is refused, the run folder, progress. The step itself is plain torch in
ddray.distill, the loop around it ddray.runtime.training_worker. Imports also ddray.conditions,
config, shards and the zoo.
"""

import contextlib
import hashlib
import json
import logging
import threading
import time
from collections.abc import Callable
from typing import Any

from ddray import __version__
from ddray.conditions import check_encoder
from ddray.config import DistillConfig
from ddray.errors import ConfigError, ShardError, TrainingError
from ddray.generate import Teacher
from ddray.models.zoo import load_teacher
from ddray.progress import Progress
from ddray.run_folder import CONFIG_FILE, METRICS_FILE, SUMMARY_FILE, claim, write_json
from ddray.runtime.cluster import connect, require
from ddray.runtime.training_worker import STUDENT_FOLDER, work
from ddray.schedule import default_schedule
from ddray.shards import TrajectorySet
from ddray.storage import open_storage

_POLL_S = 1.0

# What a run writes into its folder, and --fresh may delete; other things may lie beside it.
_RUN_FILES = (CONFIG_FILE, METRICS_FILE, SUMMARY_FILE, f"{STUDENT_FOLDER}/", "checkpoints-")

# What may differ between the runs that share a folder: where and how, but not what.
_FREE_TO_CHANGE = {
    "out",
    "workers",
    "threads",
    "use_gpu",
    "checkpoint_every",
    "keep_checkpoints",
    "log_every",
    "max_failures",
    "fresh",
    "allow_partial",
}


class StepBoard:
    """A tiny actor where the first worker says how far it is and the driver looks."""

    def __init__(self) -> None:
        self._latest = (0, "")

    def put(self, step: int, note: str) -> None:
        """Say the step and what to show beside it."""
        self._latest = (step, note)

    def get(self) -> tuple[int, str]:
        """The latest step and note."""
        return self._latest


def _open_complete_set(config: DistillConfig) -> TrajectorySet:
    trajectories = TrajectorySet.open(config.data)
    missing = trajectories.missing()
    if missing and not config.allow_partial:
        raise ShardError(
            f"{config.data} lacks {len(missing)} of {trajectories.plan.num_shards} shards; finish "
            "it with `ddray sample`, or train on what is there with --allow-partial"
        )
    return trajectories


def _load_matching_teacher(config: DistillConfig, trajectories: TrajectorySet) -> Teacher:
    plan = trajectories.plan
    teacher = load_teacher(config.teacher or plan.teacher, device="cpu")
    for what, here, there in (
        ("teacher", teacher.fingerprint, plan.teacher_fingerprint),
        ("tokenizer", teacher.tokenizer.fingerprint, plan.tokenizer_fingerprint),
    ):
        if here != there and plan.dtype == "float32":
            raise ConfigError(
                f"{config.data} was sampled from another {what} ({there[:12]}) than "
                f"{teacher.name}'s ({here[:12]}); give the teacher it names: {plan.teacher}"
            )
    check_encoder(plan, teacher)
    return teacher


def _with_schedule(config: DistillConfig, teacher: Teacher) -> DistillConfig:
    """The config with the schedule that the run will use."""
    schedule = config.schedule or default_schedule(teacher.stages)
    if schedule[-1] >= len(teacher.stages):
        raise ConfigError(
            f"schedule={[*schedule]}: stages must be below {len(teacher.stages)}, the number of "
            f"stages of {teacher.name}"
        )
    return config.model_copy(update={"schedule": schedule})


def _identity(config: DistillConfig, plan_hash: str) -> dict[str, Any]:
    """What makes two runs the same run."""
    # Under ZeRO the optimizer's state lies in as many parts as there are workers.
    free = _FREE_TO_CHANGE if config.zero == 0 else _FREE_TO_CHANGE - {"workers"}
    # The set is known by its plan, wherever it lies.
    fixed = config.model_dump(mode="json", exclude=free | {"data"})
    return {**fixed, "plan_hash": plan_hash}


def _claim_folder(config: DistillConfig, identity: dict[str, Any]) -> None:
    """Take the run folder, or take it up again; refuse one of a run with other settings."""
    storage = open_storage(config.out)
    if config.fresh:
        for name in storage.list():
            if name.startswith(_RUN_FILES):
                storage.delete(name)
    claim(
        storage,
        config.model_dump(mode="json"),
        identity,
        "use another out, or --fresh to start over",
    )


def _finished_summary(config: DistillConfig) -> dict[str, Any] | None:
    storage = open_storage(config.out)
    if storage.exists(SUMMARY_FILE) and storage.exists(f"{STUDENT_FOLDER}/{CONFIG_FILE}"):
        return dict(json.loads(storage.read(SUMMARY_FILE)))
    return None


def distill(config: DistillConfig) -> dict[str, Any]:
    """Train a student on a trajectory set; a rerun goes on from the last checkpoint.

    Args:
        config: the job.

    Returns:
        Summary: steps, final losses, samples/s, where the student lies.

    Raises:
        ConfigError: a teacher, schedule or earlier run that does not fit.
        ShardError: an incomplete or damaged set.
        TrainingError: workers failed more often than allowed, or the loss is not finite.
    """
    # Workers elsewhere have another current folder: from here on, locations are absolute.
    config = config.model_copy(
        update={name: open_storage(getattr(config, name)).uri for name in ("data", "out")}
    )
    trajectories = _open_complete_set(config)
    teacher = _load_matching_teacher(config, trajectories)
    config = _with_schedule(config, teacher)
    identity = _identity(config, trajectories.plan.hash)
    _claim_folder(config, identity)
    earlier = _finished_summary(config)
    if earlier is not None:
        return earlier
    started = time.monotonic()
    with connect():
        require("distillation", config.workers, config.threads, int(config.use_gpu))
        _fit(config, identity)
    storage = open_storage(config.out)
    history = read_history(config.out)
    last = history[-1] if history else {}
    summary: dict[str, Any] = {
        "student": storage.join(STUDENT_FOLDER),
        "ddray_version": __version__,
        "steps": config.steps,
        "rows": trajectories.plan.count,
        "teacher": teacher.name,
        "seconds": round(time.monotonic() - started, 3),
        **{key: last[key] for key in ("loss", "token_accuracy", "samples_per_s") if key in last},
    }
    write_json(storage, SUMMARY_FILE, summary)
    return summary


def read_history(out: str) -> list[dict[str, float]]:
    """The lines of a run's `metrics.jsonl`."""
    storage = open_storage(out)
    if not storage.exists(METRICS_FILE):
        return []
    return [json.loads(line) for line in storage.read(METRICS_FILE).splitlines()]


def _fit(config: DistillConfig, identity: dict[str, Any]) -> None:
    import ray
    from ray.train import (
        CheckpointConfig,
        FailureConfig,
        LoggingConfig,
        RunConfig,
        ScalingConfig,
        TrainingFailedError,
    )
    from ray.train.torch import TorchTrainer

    board = ray.remote(num_cpus=0)(StepBoard).remote()
    name = "checkpoints-" + hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:12]
    trainer = TorchTrainer(
        work,
        train_loop_config={"config": config.model_dump(mode="json"), "board": board},
        scaling_config=ScalingConfig(
            num_workers=config.workers,
            use_gpu=config.use_gpu,
            resources_per_worker={"CPU": config.threads} | ({"GPU": 1} if config.use_gpu else {}),
        ),
        run_config=RunConfig(
            name=name,
            storage_path=open_storage(config.out).uri,
            failure_config=FailureConfig(max_failures=config.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=config.keep_checkpoints),
            logging_config=LoggingConfig(log_level="ERROR"),
        ),
    )
    logging.getLogger("ray.train").setLevel(logging.ERROR)
    try:
        _run_beside(trainer.fit, board, config.steps)
    except TrainingFailedError as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        ours = [
            line for line in lines if "ddray.errors." in line or line.startswith("TrainingError")
        ]
        reason = (ours or lines or ["unknown"])[-1][:400]
        raise TrainingError(
            f"the workers failed: {reason}; checkpoints in {config.out} stay, and a rerun goes on "
            "from the last one"
        ) from error


def _run_beside(fit: Callable[[], object], board: Any, steps: int) -> None:
    """Train in a thread, and show the board's step meanwhile.

    In the main thread Ray Train would take Ctrl-C for itself, and end the process with status 1.
    """
    import ray

    failure: list[BaseException] = []

    def train() -> None:
        try:
            fit()
        except BaseException as error:  # to be raised where it is waited for
            failure.append(error)

    thread = threading.Thread(target=train, daemon=True)
    with Progress("distillation", steps, "steps") as bar:
        thread.start()
        while thread.is_alive():
            thread.join(_POLL_S)
            with contextlib.suppress(ray.exceptions.RayError):
                bar.advance_to(*ray.get(board.get.remote(), timeout=5))
    if failure:
        raise failure[0]
