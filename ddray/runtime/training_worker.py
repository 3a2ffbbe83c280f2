"""A worker's side of a distillation: the DeepSpeed engine around the plain step, checkpoints.

Imports ddray.config, conditions, distill, shards, checkpoint and the zoo; the driver's side is
ddray.runtime.training.
"""

import json
import logging
import os
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ddray import __version__
from ddray.checkpoint import save_folder
from ddray.conditioning import Condition
from ddray.conditions import load_encoder, read_conditions
from ddray.config import DistillConfig
from ddray.distill import (
    MovingAverage,
    TrajectoryBatches,
    batch_loss,
    default_code_precision,
    learning_rate,
    parameter_groups,
    set_learning_rate,
)
from ddray.errors import ShardError, TrainingError
from ddray.generate import Teacher
from ddray.models.zoo import load_teacher, new_student
from ddray.run_folder import METRICS_FILE
from ddray.shards import TrajectorySet
from ddray.storage import open_storage

STUDENT_FOLDER = "student"
_CHECKPOINT_TAG = "deepspeed"


def _local_tensors(network: nn.Module) -> list[Tensor]:
    """This worker's part of every weight: all of it, or its partition under ZeRO stage 3."""
    return [getattr(p, "ds_tensor", p).detach() for p in network.parameters()]


def _stored(network: nn.Module) -> dict[str, Tensor]:
    """What a network's file holds beside its weights: not trained, and not implied by its sizes."""
    implied: dict[str, Tensor] = getattr(network, "constants", dict)()
    weights = {name for name, _ in network.named_parameters()}
    return {
        name: value
        for name, value in network.state_dict().items()
        if name not in weights and name not in implied
    }


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
        assert config.schedule is not None  # the driver has put in the default
        self.config, self.board, self.schedule = config, board, config.schedule
        if not config.use_gpu:
            torch.set_num_threads(config.threads)
        device = torch.device("cuda" if config.use_gpu else "cpu")
        trajectories = TrajectorySet.open(config.data)
        plan = trajectories.plan
        self.teacher = load_teacher(config.teacher or plan.teacher, device=device)
        self.codebook = self.teacher.codebook
        self.batches = read_batches(trajectories, self.teacher, config)
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
            parameter_groups(network, self.codebook, config.weight_decay),
            config.lr,
            betas=(0.9, 0.95),
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
                open_storage(self.config.out).write(METRICS_FILE, lines.encode())
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
            rate = learning_rate(self.step, config.steps, config.lr, config.warmup, config.decay)
            set_learning_rate(self.optimizer, rate)
            with self._precision():
                losses = batch_loss(
                    self.engine,
                    self.batches,
                    self.teacher.stages,
                    self.codebook,
                    first=self.step * config.batch_size + self.rank * each,
                    count=each,
                    schedule=self.schedule,
                    logits_weight=config.logits_weight,
                    code_weight=config.code_weight,
                )
            self.engine.backward(losses.total)
            self.engine.step()
            self.average.update(_local_tensors(self.engine.module), self.step)
            sums += torch.stack((losses.total.detach(), *losses[1:4]))
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
            "schedule": list(self.schedule),
            "code_precision": default_code_precision(teacher.stages)
            if config.code_precision is None
            else config.code_precision,
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
            return dict(zip(names, self.average.average, strict=True)) | _stored(network)
        # Partitions hold the average for the length of the gathering; the run is over by then.
        for mine, average in zip(_local_tensors(network), self.average.average, strict=True):
            mine.copy_(average)
        with deepspeed.zero.GatheredParameters(list(network.parameters())):
            gathered = {name: p.detach().clone() for name, p in network.named_parameters()}
        return gathered | _stored(network)


def read_batches(
    trajectories: TrajectorySet, teacher: Teacher, config: DistillConfig
) -> TrajectoryBatches:
    """All rows that are there, and the features of their captions where they have any."""
    plan = trajectories.plan
    missing = set(trajectories.missing()) if config.allow_partial else set()
    shards = [k for k in range(plan.num_shards) if k not in missing]
    if not shards:
        raise ShardError(f"{trajectories.uri} holds no shard to train on")
    parts = [trajectories.read_shard(k) for k in shards]
    index, label, tokens = (np.concatenate(column) for column in zip(*parts, strict=True))
    condition = None
    if plan.conditioning == "text":
        captions = read_conditions(trajectories, shards, load_encoder(plan, teacher))
        if not np.array_equal(captions.label, label):
            raise ShardError(f"{trajectories.uri} was sampled from other captions than it holds")

        def condition(rows: np.ndarray) -> Condition:
            return teacher.condition(captions.of(rows))

    return TrajectoryBatches(index, label, tokens, plan.seed, config.seed, condition)


def work(arguments: dict[str, Any]) -> None:
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
