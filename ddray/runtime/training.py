"""Distillation on Ray Train and DeepSpeed: workers, ZeRO, checkpoints, resume.

The step itself is plain torch in ddray.distill. Imports ddray.config, distill, shards, checkpoint
and the zoo.
"""

import contextlib
import hashlib
import json
import logging
import os
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ddray import __version__
from ddray.checkpoint import CONFIG_FILE, save_folder
from ddray.config import DistillConfig
from ddray.distill import MovingAverage, TrajectoryBatches, batch_loss, learning_rate
from ddray.errors import ConfigError, ShardError, TrainingError
from ddray.generate import Teacher
from ddray.models.zoo import load_teacher, new_student
from ddray.progress import Progress
from ddray.runtime.cluster import connect, require
from ddray.shards import TrajectorySet
from ddray.storage import open_storage

STUDENT_FOLDER = "student"
_CHECKPOINT_TAG = "deepspeed"
_POLL_S = 1.0

# What a run writes into its folder, and --fresh may delete; other things may lie beside it.
_RUN_FILES = (CONFIG_FILE, "metrics.jsonl", "summary.json", f"{STUDENT_FOLDER}/", "checkpoints-")

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
    if config.schedule[-1] >= len(teacher.stages):
        raise ConfigError(
            f"schedule={[*config.schedule]}: stages must be below {len(teacher.stages)}, the "
            f"number of stages of {teacher.name}"
        )
    return teacher


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
    storage.check_writable()
    if config.fresh:
        for name in storage.list():
            if name.startswith(_RUN_FILES):
                storage.delete(name)
    if storage.exists(CONFIG_FILE):
        try:
            earlier = json.loads(storage.read(CONFIG_FILE)).get("identity", {})
        except ValueError:
            earlier = {}
        changed = [
            f"{key}: {earlier.get(key)!r} then, {value!r} now"
            for key, value in identity.items()
            if earlier.get(key) != value
        ]
        if changed:
            raise ConfigError(
                f"{config.out} holds a run with other settings ({'; '.join(changed)}); use another "
                "out, or --fresh to start over"
            )
    resolved = {**config.model_dump(mode="json"), "identity": identity}
    storage.write(CONFIG_FILE, (json.dumps(resolved, indent=2) + "\n").encode())


def _finished_summary(config: DistillConfig) -> dict[str, Any] | None:
    storage = open_storage(config.out)
    if storage.exists("summary.json") and storage.exists(f"{STUDENT_FOLDER}/{CONFIG_FILE}"):
        return dict(json.loads(storage.read("summary.json")))
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
    identity = _identity(config, trajectories.plan.hash)
    _claim_folder(config, identity)
    earlier = _finished_summary(config)
    if earlier is not None:
        return earlier
    started = time.monotonic()
    with connect():
        gpus = config.workers if config.use_gpu else 0
        require(config.workers * config.threads, gpus, "distillation")
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
    storage.write("summary.json", (json.dumps(summary, indent=2) + "\n").encode())
    return summary


def read_history(out: str) -> list[dict[str, float]]:
    """The lines of a run's `metrics.jsonl`."""
    storage = open_storage(out)
    if not storage.exists("metrics.jsonl"):
        return []
    return [json.loads(line) for line in storage.read("metrics.jsonl").splitlines()]


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
        _work,
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
        with _watch(board, config.steps):
            trainer.fit()
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


@contextlib.contextmanager
def _watch(board: Any, steps: int) -> Iterator[None]:
    """Show the board's step while the training blocks this thread."""
    import ray

    over = threading.Event()

    def show() -> None:
        with Progress("distillation", steps, "steps") as bar:
            last = False
            while not last:
                last = over.wait(_POLL_S)
                with contextlib.suppress(ray.exceptions.RayError):
                    bar.advance_to(*ray.get(board.get.remote(), timeout=5))

    thread = threading.Thread(target=show, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(timeout=10)


def _local_tensors(network: nn.Module) -> list[Tensor]:
    """This worker's part of every weight: all of it, or its partition under ZeRO stage 3."""
    return [getattr(p, "ds_tensor", p).detach() for p in network.parameters()]


class _Run:
    """One worker's side of a distillation.

    Args:
        config: the job.
        board: actor handle for progress.
    """

    def __init__(self, config: DistillConfig, board: Any):
        import ray.train

        context = ray.train.get_context()
        self.rank, self.world = context.get_world_rank(), context.get_world_size()
        self.config, self.board = config, board
        if not config.use_gpu:
            torch.set_num_threads(config.threads)
        device = torch.device("cuda" if config.use_gpu else "cpu")
        trajectories = TrajectorySet.open(config.data)
        plan = trajectories.plan
        self.teacher = load_teacher(config.teacher or plan.teacher, device=device)
        self.codebook = self.teacher.codebook
        self.batches = TrajectoryBatches(
            *_read_rows(trajectories, config.allow_partial), plan.seed, config.seed
        )
        torch.manual_seed(config.seed)
        network, self.card = new_student(self.teacher)
        self.engine, self.optimizer = self._initialize(network)
        self.average = MovingAverage(_local_tensors(network), config.ema_decay)
        self.history: list[dict[str, float]] = []
        self.step = 0

    def _initialize(self, network: nn.Module) -> tuple[Any, torch.optim.Optimizer]:
        import deepspeed

        config = self.config
        optimizer = torch.optim.AdamW(
            network.parameters(),
            config.lr,
            betas=(0.9, 0.95),
            weight_decay=config.weight_decay,
            # Measured: as fast as DeepSpeed's own, and nothing to compile.
            fused=True,
        )
        engine, *_ = deepspeed.initialize(
            model=network,
            optimizer=optimizer,
            config={
                "train_micro_batch_size_per_gpu": config.batch_size // self.world,
                "gradient_clipping": config.grad_clip,
                "zero_optimization": {"stage": config.zero},
                "zero_allow_untested_optimizer": True,
                "steps_per_print": 10**9,
            },
            dist_init_required=False,
        )
        return engine, engine.optimizer

    @property
    def _average_file(self) -> str:
        """Every rank has the whole average, but for ZeRO stage 3, where it has its partition."""
        return f"average-{self.rank if self.config.zero == 3 else 0}.pt"

    def resume(self) -> None:
        """Take up the last checkpoint that Train has kept, if there is one."""
        import ray.train

        checkpoint = ray.train.get_checkpoint()
        if checkpoint is None:
            return
        with checkpoint.as_directory() as folder:
            self.engine.load_checkpoint(folder, tag=_CHECKPOINT_TAG)
            state = torch.load(Path(folder) / self._average_file, weights_only=True)
            self.history = json.loads((Path(folder) / "history.json").read_text())
        self.step = int(state["step"])
        for average, saved in zip(self.average.average, state["average"], strict=True):
            average.copy_(saved)

    def save(self) -> None:
        """Every rank's part into one checkpoint; rank 0 also writes what the run shows."""
        import ray.train

        with tempfile.TemporaryDirectory(prefix="ddray-") as folder:
            self.engine.save_checkpoint(folder, tag=_CHECKPOINT_TAG)
            if self.rank == 0 or self.config.zero == 3:
                state = {"step": self.step, "average": self.average.average}
                torch.save(state, Path(folder) / self._average_file)
            if self.rank == 0:
                (Path(folder) / "history.json").write_text(json.dumps(self.history))
                lines = "".join(json.dumps(line) + "\n" for line in self.history)
                open_storage(self.config.out).write("metrics.jsonl", lines.encode())
            ray.train.report(
                {"step": self.step},
                checkpoint=ray.train.Checkpoint.from_directory(folder),
                checkpoint_dir_name=f"step-{self.step:07d}",
            )

    def train(self) -> None:
        """Steps until the end, with a log line and a checkpoint now and then."""
        config = self.config
        each = config.batch_size // self.world
        sums = torch.zeros(4, device=self.codebook.device)
        logged, since = self.step, time.monotonic()
        while self.step < config.steps:
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate(self.step, config.steps, config.lr, config.warmup)
            with self._precision():
                losses = batch_loss(
                    self.engine,
                    self.batches,
                    self.teacher.stages,
                    self.codebook,
                    first=self.step * config.batch_size + self.rank * each,
                    count=each,
                    schedule=config.schedule,
                    logits_weight=config.logits_weight,
                    code_weight=config.code_weight,
                )
            self.engine.backward(losses.total)
            self.engine.step()
            self.average.update(_local_tensors(self.engine.module), self.step)
            sums += torch.stack((losses.total.detach(), *losses[1:]))
            self.step += 1
            if self.step % config.log_every == 0 or self.step == config.steps:
                self._log(sums / (self.step - logged), self.step - logged, since)
                sums.zero_()
                logged, since = self.step, time.monotonic()
            if self.step % config.checkpoint_every == 0 or self.step == config.steps:
                self.save()
                since = time.monotonic()

    def _precision(self) -> torch.autocast:
        return torch.autocast(
            self.codebook.device.type,
            dtype=torch.bfloat16,
            enabled=self.config.precision == "bfloat16",
        )

    def _log(self, means: Tensor, steps: int, since: float) -> None:
        torch.distributed.all_reduce(means)
        loss, cross_entropy, code_error, accuracy = (means / self.world).tolist()
        if not np.isfinite(loss):
            raise TrainingError(
                f"the loss is {loss} at step {self.step}; lower lr (now {self.config.lr:g}) or use "
                "precision=float32"
            )
        line = {
            "step": self.step,
            "loss": loss,
            "cross_entropy": cross_entropy,
            "code_error": code_error,
            "token_accuracy": accuracy,
            "lr": self.optimizer.param_groups[0]["lr"],
            "samples_per_s": steps * self.config.batch_size / (time.monotonic() - since),
        }
        self.history.append(line)
        if self.rank == 0:
            self.board.put.remote(self.step, f"loss {loss:.3f}")

    def write_student(self) -> None:
        """Gather the averaged weights and write the student folder."""
        state = self._averaged_state()
        if self.rank != 0:
            return
        teacher, config = self.teacher, self.config
        card = {
            **self.card,
            "schedule": list(config.schedule),
            "step": self.step,
            "teacher": teacher.name,
            "teacher_fingerprint": teacher.fingerprint,
            "tokenizer_fingerprint": teacher.tokenizer.fingerprint,
            "ddray_version": __version__,
        }
        tokenizer = teacher.tokenizer.state_dict()
        save_folder(f"{config.out}/{STUDENT_FOLDER}", card, model=state, tokenizer=tokenizer)

    def _averaged_state(self) -> dict[str, Tensor]:
        """The moving average under the network's names, whole on rank 0."""
        import deepspeed

        network = self.engine.module
        names = [name for name, _ in network.named_parameters()]
        if self.config.zero < 3:
            return dict(zip(names, self.average.average, strict=True))
        # Partitions hold the average for the length of the gathering; the run is over by then.
        for mine, average in zip(_local_tensors(network), self.average.average, strict=True):
            mine.copy_(average)
        with deepspeed.zero.GatheredParameters(list(network.parameters())):
            return {name: p.detach().clone() for name, p in network.named_parameters()}


def _read_rows(
    trajectories: TrajectorySet, partial: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    missing = set(trajectories.missing()) if partial else set()
    shards = [k for k in range(trajectories.plan.num_shards) if k not in missing]
    if not shards:
        raise ShardError(f"{trajectories.uri} holds no shard to train on")
    parts = [trajectories.read_shard(k) for k in shards]
    index, label, tokens = (np.concatenate(column) for column in zip(*parts, strict=True))
    return index, label, tokens


def _work(arguments: dict[str, Any]) -> None:
    """What Ray Train runs on every worker."""
    config = DistillConfig.model_validate(arguments["config"])
    # Both are read when deepspeed is imported.
    os.environ["DS_ACCELERATOR"] = "cuda" if config.use_gpu else "cpu"
    warnings.filterwarnings("ignore", category=FutureWarning)
    import deepspeed
    import deepspeed.ops

    deepspeed.utils.logger.setLevel(logging.ERROR)
    # An op that DeepSpeed would compile with g++ for a minute, to save what gloo does as well.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    run = _Run(config, arguments["board"])
    run.resume()
    run.train()
    run.write_student()
