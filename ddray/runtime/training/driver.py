"""Distillation on Ray Train and DeepSpeed: what is refused, the run folder, restarts, progress.

The driver's side. The step itself is plain torch in ddray.distillation.optimization, the loop
around it ddray.runtime.training.worker.
"""

import logging
import time
from typing import Any

import torch

from ddray import __version__
from ddray.config.distillation import DistillConfig
from ddray.distillation.order import default_lanes
from ddray.distillation.perceptual import check_lpips
from ddray.errors import ConfigError, StoppedError, TrainingError
from ddray.evaluation.student_check import check_evaluations, check_student
from ddray.method.schedule import default_schedule
from ddray.method.teacher import Teacher
from ddray.models.zoo import continue_student, load_teacher
from ddray.runtime.cluster.capacity import node_labels, require
from ddray.runtime.cluster.connection import connect
from ddray.runtime.cluster.doctor import preflight, probing
from ddray.runtime.cluster.machine import Probe
from ddray.runtime.training.checkpoints import without_a_cut_list
from ddray.runtime.training.claim import (
    check_claim,
    claim_folder,
    drop_replaced,
    finished_summary,
    run_identity,
    set_aside,
)
from ddray.runtime.training.watch import Watch
from ddray.runtime.training.watchdog import Board
from ddray.runtime.training.worker import STUDENT_FOLDER, work
from ddray.sets.conditions import check_encoder
from ddray.sets.inspection import trainable_shards
from ddray.sets.sharded_set import MANIFEST
from ddray.sets.trajectories.trajectory_set import TrajectorySet
from ddray.storage import open_storage
from ddray.storage.arrow import arrow_filesystem
from ddray.storage.lease import Lease
from ddray.storage.run_folder import (
    METRICS_FILE,
    SUMMARY_FILE,
    EventLog,
    read_lines,
    write_json,
)

# A group of processes has at least so long to come up and meet in its first collective.
_MEETING_S = 600
_CHECK_CPUS = 1


def _load_matching_teacher(config: DistillConfig, trajectories: TrajectorySet) -> Teacher:
    plan, name = trajectories.plan, config.teacher or trajectories.plan.teacher
    teacher = sampled = load_teacher(name, device="cpu")
    if plan.dtype != "float32":
        # Weights have another fingerprint in another type.
        sampled = load_teacher(name, device="cpu", dtype=plan.dtype)
    for what, here, there in (
        ("teacher", sampled.fingerprint, plan.teacher_fingerprint),
        ("tokenizer", sampled.tokenizer.fingerprint, plan.tokenizer_fingerprint),
    ):
        if here != there:
            raise ConfigError(
                f"{config.data} was sampled from another {what} ({there[:12]}) than "
                f"{teacher.name}'s ({here[:12]}); give the teacher it names: {plan.teacher}"
            )
    check_encoder(plan, teacher)
    return teacher


def _with_schedule(config: DistillConfig, teacher: Teacher) -> DistillConfig:
    """The config with the schedule that the run will use, if it trains a student."""
    if config.objective != "distilled":
        return config
    schedule = config.schedule or default_schedule(teacher.stages)
    if schedule[-1] >= len(teacher.stages):
        raise ConfigError(
            f"schedule={[*schedule]}: stages must be below {len(teacher.stages)}, the number of "
            f"stages of {teacher.name}"
        )
    return config.model_copy(update={"schedule": schedule})


def _lanes(config: DistillConfig, num_shards: int) -> int:
    """Lanes of the data: every number of workers that the run may have must divide them."""
    fewest, most = config.workers
    lanes = default_lanes(config.batch_size)
    if config.follow:
        # The first step waits for as many shards as there are lanes.
        lanes = default_lanes(config.batch_size, most, most=max(1, num_shards // 8))
    for workers in range(fewest, most + 1):
        if lanes % workers:
            raise ConfigError(
                f"workers={fewest}:{most}: {workers} workers do not divide the {lanes} lanes in "
                f"which a batch of {config.batch_size} is read; give a number that does, or a "
                f"batch_size that is a multiple of {workers}"
            )
    return lanes


def distill(config: DistillConfig) -> dict[str, Any]:
    """Train a student on a trajectory set; a rerun goes on from the last checkpoint.

    Args:
        config: the job.

    Returns:
        Summary: steps, final losses, samples/s, where the student lies.

    Raises:
        CheckpointError: damaged checkpoints of an earlier run.
        ConfigError: a teacher, schedule or earlier run that does not fit.
        ShardError: an incomplete or damaged set.
        StoppedError: after SIGTERM, with a checkpoint of the last step.
        TrainingError: workers failed more often than allowed, or losses are not finite.
    """
    check_lpips(config)
    trajectories = TrajectorySet.open(config.data)
    teacher = _load_matching_teacher(config, trajectories)
    config = _with_schedule(config, teacher)
    if config.init is not None:
        continue_student(config.init, teacher)
    sound = trainable_shards(trajectories, allow_partial=config.allow_partial, follow=config.follow)
    shards = None if config.follow or len(sound) == trajectories.plan.num_shards else sound
    if config.evaluate_every:
        check_evaluations(config, trajectories, teacher)
    lanes = _lanes(config, trajectories.plan.num_shards)
    identity = run_identity(config, lanes, shards, trajectories.plan.hash)
    check_claim(config, identity)
    storage = open_storage(config.out)
    storage.check_writable()
    started = time.monotonic()
    with Lease(storage) as lease:
        if not config.fresh and (earlier := finished_summary(storage)):
            return earlier
        named = config.teacher or trajectories.plan.teacher
        step = _train(config, lease, identity, lanes, shards, named)
        history = read_history(config.out)
        last = history[-1] if history else {}
        figures = ("loss", "token_accuracy", "samples_per_s")
        summary: dict[str, Any] = {
            "student": storage.join(STUDENT_FOLDER),
            "ddray_version": __version__,
            "steps": step,
            "rows": trajectories.plan.count,
            "teacher": teacher.name,
            "seconds": round(time.monotonic() - started, 3),
            **{key: last[key] for key in figures if key in last},
        }
        lease.require()
        write_json(storage, SUMMARY_FILE, summary)
        return summary


def _train(
    config: DistillConfig,
    lease: Lease,
    identity: dict[str, Any],
    lanes: int,
    shards: list[int] | None,
    teacher: str,
) -> int:
    """Train in the run folder that is held; returns the last step.

    Nothing of an earlier run is touched before all that can refuse has agreed.
    """
    storage = open_storage(config.out)
    with connect(), probing([config.out]) as probes:
        gpus = int(config.use_gpu)
        fewest, most = config.workers
        beside: tuple[float, float] | None = (_CHECK_CPUS, config.evaluate_gpus)
        if not (config.evaluate_every and config.evaluate_gpus):
            beside, most = None, fewest
        # Workers that come later must not take the GPU that evaluations wait for.
        require(
            *("distillation", most, config.threads, gpus, config.wait_s, config.node_pool),
            beside=beside,
        )
        probes = [Probe(config.data, MANIFEST, writable=False), *probes]
        preflight(config.threads, gpus, config.node_pool, [teacher], probes)
        if config.fresh:
            set_aside(storage)
        name = claim_folder(config, identity)
        job = {"config": config.model_dump(mode="json"), "lanes": lanes, "shards": shards}
        job["earlier"] = without_a_cut_list(storage, name)
        with EventLog(storage, workers=config.workers, steps=config.steps) as events:
            step = _fit(config, name, job, events, lease)
        drop_replaced(storage)
    return step


def read_history(out: str) -> list[dict[str, float]]:
    """The lines of a run's `metrics.jsonl`."""
    return read_lines(open_storage(out), METRICS_FILE)


def _validation(config: DistillConfig, board: Any) -> Any:
    """What Train runs beside the training, in a task of its own, on checkpoints."""
    from ray.train import ValidationConfig

    def validate(checkpoint: Any) -> dict[str, Any]:
        torch.set_num_threads(1)
        with checkpoint.as_directory() as folder:
            line = check_student(f"{folder}/{STUDENT_FOLDER}", config)
        if config.patience and line["worse_in_a_row"] >= config.patience:
            board.stop.remote()
        return line

    beside = {
        "num_cpus": _CHECK_CPUS,
        "num_gpus": config.evaluate_gpus,
        "max_retries": 1,
        "label_selector": node_labels(config.node_pool),
    }
    return ValidationConfig(validate, ray_remote_kwargs=beside)


def _fit(
    config: DistillConfig,
    name: str,
    job: dict[str, Any],
    events: EventLog,
    lease: Lease,
) -> int:
    """Train; returns the last step."""
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
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from ddray.runtime.training.process_group import process_group

    # It must outlive every node that the run may lose: it lies on the driver's.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    board = ray.remote(num_cpus=0, scheduling_strategy=here)(Board).remote()
    fewest, most = config.workers
    # Train would take a URI for escaped, and ask the AWS environment by rules of its own.
    filesystem, path = arrow_filesystem(config.out)
    trainer = TorchTrainer(
        work,
        validation_config=_validation(config, board) if config.evaluate_every else None,
        train_loop_config={**job, "board": board},
        # A hung collective is the watchdog's to notice; this is for a group that never meets.
        torch_config=process_group(int(max(config.step_timeout_s, _MEETING_S))),
        scaling_config=ScalingConfig(
            num_workers=most if fewest == most else config.workers,
            use_gpu=config.use_gpu,
            resources_per_worker={"CPU": config.threads} | ({"GPU": 1} if config.use_gpu else {}),
            label_selector=node_labels(config.node_pool) or None,
        ),
        run_config=RunConfig(
            name=name,
            storage_path=path,
            storage_filesystem=filesystem,
            failure_config=FailureConfig(max_failures=config.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=config.keep_checkpoints),
            logging_config=LoggingConfig(log_level="ERROR"),
        ),
    )
    logging.getLogger("ray.train").setLevel(logging.ERROR)
    watch = Watch(board, config, events, lease)
    try:
        watch.run(trainer.fit)
    except TrainingFailedError as error:
        raise TrainingError(
            watch.failure
            or f"the workers failed: {watch.reason or _reason(error)}; checkpoints in "
            f"{config.out} stay, and a rerun goes on from the last one"
        ) from error
    except ray.exceptions.RayError as error:
        raise TrainingError(f"Ray Train has failed: {_reason(error)}") from error
    if watch.failure is not None:
        raise TrainingError(watch.failure)
    if watch.terminated:
        raise StoppedError(
            f"stopped at step {watch.step} of {config.steps}; a rerun goes on from there"
        )
    return watch.step


def _reason(error: BaseException) -> str:
    """The line of Train's report that says what happened."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines or ["unknown"])[-1][:400]
