"""A worker's side of a distillation: the loop around the plain step, checkpoints, what goes wrong.

The step is ddray.distillation.step, the engine ddray.runtime.training.engine, the driver's side
ddray.runtime.training.driver.
"""

import contextlib
import json
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddray import __version__
from ddray.config.base import reserved_device
from ddray.config.distillation import DistillConfig
from ddray.cost import mfu
from ddray.distillation.log import TrainingLog
from ddray.distillation.objective import new_objective
from ddray.distillation.operations import step_operations
from ddray.distillation.optimization import learning_rate
from ddray.distillation.order import check_state
from ddray.distillation.step import Agreement, Means, TrainingStep
from ddray.distillation.stream import Batch, open_stream
from ddray.errors import DDRayError, StorageError, TrainingError, one_line
from ddray.method.memory import is_out_of_memory
from ddray.models.zoo import load_teacher
from ddray.runtime.training.checkpoints import (
    STATE_FILE,
    checkpoint_name,
    known_checkpoints,
    newest_whole,
)
from ddray.runtime.training.engine import Engine, whole_weights
from ddray.runtime.training.failures import is_full_disk, out_of_memory
from ddray.runtime.training.metrics import TrainingMetrics
from ddray.runtime.training.watchdog import Watchdog
from ddray.sets.trajectories.trajectory_set import TrajectorySet
from ddray.storage import open_storage
from ddray.storage.checkpoint import load_folder, save_folder

STUDENT_FOLDER = "student"
_CRITICS_FILE = "critics.pt"
# How often the cluster is asked whether one of our nodes is about to go.
_LOOK_EVERY_S = 5.0
_WAIT_S = 0.5


class _ElsewhereError(Exception):
    """Another worker cannot go on, and says why."""


class _Run:
    """One worker's side of a distillation.

    Args:
        config: the job.
        lanes: of the data; see `TrajectoryStream`.
        shards: that are trained on; None = all.
        earlier: names of checkpoints in the run's folder that Train knows nothing of.
        board: handle of the run's `Board`.
        watchdog: of this process.
    """

    def __init__(
        self,
        config: DistillConfig,
        lanes: int,
        shards: list[int] | None,
        earlier: list[str],
        board: Any,
        watchdog: Watchdog,
    ):
        import ray.train

        began = time.monotonic()
        context = ray.train.get_context()
        self.rank, self.world = context.get_world_rank(), context.get_world_size()
        self.config, self.board, self.watchdog = config, board, watchdog
        if not config.use_gpu:
            torch.set_num_threads(config.threads)
        device = torch.device(reserved_device(config.use_gpu))
        self.trajectories = TrajectorySet.open(config.data)
        plan = self.trajectories.plan
        self.teacher = load_teacher(config.teacher or plan.teacher, device=device)
        self.agree = Agreement(self.world, device)
        self.stream = open_stream(
            self.trajectories,
            self.teacher,
            config,
            lanes=lanes,
            shards=shards,
            rank=self.rank,
            world=self.world,
        )
        torch.manual_seed(config.seed)
        self.objective = new_objective(config, self.teacher, plan)
        self.step, self.bad_steps = 0, 0
        lines: list[dict[str, Any]] = []
        loaded = time.monotonic()
        known = known_checkpoints(earlier)
        self._earlier, self._has_checkpoint = earlier, False
        with newest_whole(known, self.rank, self.world, self._leave_out) as folder:
            if folder is None:
                self.engine = self._engine()
            else:
                self.step, lines = self._resume(folder)
        self.training_step = TrainingStep(
            self.engine, self.objective, config, self.agree, self.rank, self.world
        )
        self.log = TrainingLog(config.out, lines) if self.rank == 0 else None
        self._metrics = TrainingMetrics(config.out) if self.rank == 0 else None
        self._saved = self.step
        self._looked_at, self._preempted = time.monotonic(), list[int]()
        self._start = {"loading_s": loaded - began, "engine_s": self._looked_at - loaded}

    def _engine(self, weights: dict[str, Tensor] | None = None) -> Engine:
        torch.manual_seed(self.config.seed)
        network, self.card = self.objective.new_network()
        if self.config.use_gpu and self.rank == 0:
            plan = self.trajectories.plan
            self._operations = step_operations(network, self.teacher, self.config, plan)
        if weights is not None:
            network.load_state_dict(weights, strict=False)
        return Engine(network, self.teacher.codebook, self.config, self.world)

    def _leave_out(self, reason: str) -> None:
        self.board.tell.remote("checkpoint left out", reason=reason)

    def _resume(self, folder: str) -> tuple[int, list[dict[str, Any]]]:
        """Take up a checkpoint; returns its step and what had been logged."""
        state = json.loads((Path(folder) / STATE_FILE).read_text())
        check_state(state["data"], self.stream.identity())
        _, averaged, _ = load_folder(Path(folder) / STUDENT_FOLDER)
        states = torch.load(Path(folder) / _CRITICS_FILE, self.teacher.device, weights_only=True)
        for critic, saved in zip(self.objective.critics, states, strict=True):
            critic.load_state_dict(saved)
        same = state["workers"] == self.world
        # ZeRO cuts the optimizer's state into as many parts as there are workers.
        if same or self.config.zero == 0:
            self.engine = self._engine()
            self.engine.load(folder, averaged)
        else:
            self.engine = self._engine(whole_weights(folder, self.config.zero))
            self.engine.set_average(averaged)
        if self.rank == 0:
            moments = "kept" if same or self.config.zero == 0 else "restarted"
            self.board.tell.remote(
                "resumed",
                step=state["step"],
                workers=self.world,
                workers_before=state["workers"],
                optimizer_moments=moments,
            )
        return state["step"], state["lines"]

    def train(self) -> None:
        """Steps until the end or until told to stop, with checkpoints and log lines."""
        with self.stream:
            self._train(self.stream.batches(self.step))
        if self._saved < self.step:
            self.save(wait=True)

    def _train(self, batches: Iterator[Batch]) -> None:
        config, means = self.config, Means()
        since = time.monotonic()
        while self.step < config.steps:
            batch, failure = self._next(batches)
            look = time.monotonic() - self._looked_at > _LOOK_EVERY_S
            failed, stop, look = self.agree(failure is not None, self.watchdog.stop, look)
            if failed:
                raise failure or _ElsewhereError
            if stop:
                break
            if look and self._is_preempted() and self._saved < self.step:
                self.save(wait=True)
            assert batch is not None
            figures, loss = self.training_step.take(batch, self.step)
            if figures is None:
                self._note_bad_step(batch, loss)
            else:
                self.bad_steps = 0
                means.add(figures)
            self.step += 1
            if self._start:
                self._tell_start(time.monotonic() - since)
            self.watchdog.moved(f"step {self.step}")
            if self.step % config.log_every == 0 or self.step == config.steps:
                self._note(means, time.monotonic() - since)
                means, since = Means(), time.monotonic()
            if self.log is not None and self._metrics is not None:
                samples = 0 if figures is None else config.batch_size
                self._metrics.moved(self.step, samples, self.log.lines)
            if self.step % config.checkpoint_every == 0 and self.step < config.steps:
                began = time.monotonic()
                self.save(wait=False)
                since += time.monotonic() - began

    def _tell_start(self, step_s: float) -> None:
        """Note, once, what the time before the first step went to."""
        spent = {
            name: round(value, 2) for name, value in (self._start | {"step_s": step_s}).items()
        }
        self._start = {}
        if self.rank == 0:
            self.board.tell.remote("first step", step=self.step, **spent)

    def _next(self, batches: Iterator[Batch]) -> tuple[Batch | None, DDRayError | None]:
        """This step's batch, or why there is none.

        Under `follow` all workers wait together until each has one: a worker that waits inside a
        collective could not tell its watchdog so.
        """
        if self.config.follow:
            while self.agree(not self.stream.ready)[0]:
                self.watchdog.moved(self.stream.waiting or "waiting for another worker's data")
                if self.rank == 0:
                    self.board.put.remote(self.step, self.stream.waiting or "waiting for data")
                time.sleep(_WAIT_S)
        try:
            return next(batches), None
        except DDRayError as error:
            return None, error

    def _note_bad_step(self, batch: Batch, loss: float) -> None:
        """Write down the rows of a step that had no finite loss; end after too many of them."""
        self.bad_steps += 1
        name = f"bad-steps/step-{self.step:07d}-worker-{self.rank}.json"
        record = {"step": self.step, "loss": str(loss), "index": batch.index_B.tolist()}
        open_storage(self.config.out).write(name, json.dumps(record).encode())
        if self.rank == 0:
            self.board.tell.remote("step skipped", step=self.step, in_a_row=self.bad_steps)
        if self.bad_steps > self.config.max_bad_steps:
            raise TrainingError(
                f"the loss was not finite (here {loss}) in {self.bad_steps} steps in a row, the "
                f"last one step {self.step}; their rows are named in {self.config.out}/bad-steps; "
                f"lower lr (now {self.config.lr:g}) or use precision=float32"
            )

    def _note(self, means: Means, seconds: float) -> None:
        config = self.config
        if not means.steps:
            return  # Every step was skipped.
        values = means.over(self.agree)
        if self.log is None:
            return
        line = {"step": self.step, **values}
        line["lr"] = learning_rate(
            self.step - 1, config.steps, config.lr, config.warmup, config.decay
        )
        line["samples_per_s"] = means.steps * config.batch_size / seconds
        if config.use_gpu:
            line["gpu_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
            step_s = config.batch_size / line["samples_per_s"]
            share = mfu(self._operations, step_s, torch.cuda.get_device_name(), self.world)
            line |= {} if share is None else {"mfu": share}
        self.log.add(line)
        self.board.put.remote(
            self.step, f"loss {line['loss']:.3f}, {line['samples_per_s']:.0f} samples/s"
        )

    def save(self, *, wait: bool) -> None:
        """A checkpoint: every rank's part, the averaged student whole, and what has been logged.

        Args:
            wait: until it is in the storage; else it is copied there while training goes on.
        """
        import ray.train
        from ray.train import CheckpointUploadMode

        if self.bad_steps:
            return  # These weights may be what is wrong.
        every = self.config.evaluate_every
        with self.watchdog.patient(f"checkpoint of step {self.step}"):
            # Waits for those under way: else copies would pile up before a slow storage, and more
            # than two intervals be lost.
            names = [*known_checkpoints(), *self._earlier]
            self._tell_first_checkpoint(names)
            name = checkpoint_name(self.step, self.world, names)
            folder = tempfile.mkdtemp(prefix="ddray-", dir=Path.cwd())
            try:
                self._write_parts(folder)
                ray.train.report(
                    {"step": self.step},
                    checkpoint=ray.train.Checkpoint.from_directory(folder),
                    checkpoint_dir_name=name,
                    checkpoint_upload_mode=CheckpointUploadMode.SYNC
                    if wait
                    else CheckpointUploadMode.ASYNC,
                    delete_local_checkpoint_after_upload=True,
                    checkpoint_upload_fn=self._upload,
                    validation=bool(every) and self.step % every == 0,
                )
            except (OSError, RuntimeError, StorageError) as error:
                shutil.rmtree(folder, ignore_errors=True)
                if not is_full_disk(error):
                    raise
                raise self._no_space(name, folder, error) from error
        self._saved = self.step

    def _tell_first_checkpoint(self, names: list[str]) -> None:
        """Say, once, that there is something to go on from."""
        if names and not self._has_checkpoint and self.rank == 0:
            self.board.tell.remote("first checkpoint")
        self._has_checkpoint = bool(names)

    def _upload(self, checkpoint: Any, name: str) -> Any:
        """Copy this rank's part of a checkpoint to the run's storage; in a thread of Train's.

        What is raised here ends the attempt but says too little: Train would try again and again.
        """
        import ray
        import ray.train

        try:
            return (
                ray.train.get_context().get_storage().persist_current_checkpoint(checkpoint, name)
            )
        except Exception as error:  # Arrow's are those of every storage it knows
            if is_full_disk(error):
                failure = self._no_space(name, self.config.out, error)
                ray.get(self.board.fail.remote(one_line(failure)))
            else:
                ray.get(self.board.complain.remote(f"cannot write {name}: {one_line(error)}"))
            raise

    def _no_space(self, name: str, where: str, error: BaseException) -> TrainingError:
        return TrainingError(
            f"no space left for the checkpoint {name}: {one_line(error)}; make room at {where}, "
            "then rerun: it goes on from the last checkpoint"
        )

    def _write_parts(self, folder: str) -> None:
        averaged = self.engine.averaged()
        if self.log is not None:
            self._write_student(f"{folder}/{STUDENT_FOLDER}", averaged)
            state = {
                "step": self.step,
                "workers": self.world,
                "data": self.stream.state(self.step),
                "lines": self.log.lines,
            }
            (Path(folder) / STATE_FILE).write_text(json.dumps(state))
            states = [critic.state_dict() for critic in self.objective.critics]
            torch.save(states, Path(folder) / _CRITICS_FILE)
            self.log.flush()
        self.engine.save(folder)

    def finish(self) -> None:
        """Write the student folder of the run."""
        averaged = self.engine.averaged()
        if self.log is not None:
            self._write_student(f"{self.config.out}/{STUDENT_FOLDER}", averaged)
            self.board.put.remote(self.step, "")

    def close(self) -> None:
        """Write the log's last lines, whatever has ended the run."""
        if self.log is not None:
            self.log.close()

    def _write_student(self, uri: str, averaged: dict[str, Tensor]) -> None:
        teacher = self.teacher
        card = {
            **self.card,
            "step": self.step,
            "teacher": teacher.name,
            "teacher_fingerprint": teacher.fingerprint,
            "tokenizer_fingerprint": teacher.tokenizer.fingerprint,
            "ddray_version": __version__,
        }
        save_folder(uri, card, model=averaged, tokenizer=teacher.tokenizer.state_dict())

    def _is_preempted(self) -> bool:
        """Whether the cluster has said that a node of this run is about to go; all ranks call.

        Until it goes the run goes on, with a checkpoint at each look: Train then takes up the last.
        """
        import ray.train

        self._looked_at = time.monotonic()
        info = ray.train.get_preemption_info()
        ranks = [] if info is None else info.preempted_ranks
        if ranks != self._preempted and self.rank == 0:
            self.board.tell.remote("preemption", step=self.step, workers=ranks)
        self._preempted = ranks
        return info is not None


def work(arguments: dict[str, Any]) -> None:
    """What Ray Train runs on every worker."""
    import ray
    import ray.train

    config, board = DistillConfig.model_validate(arguments["config"]), arguments["board"]
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    me = ray.get_runtime_context().current_actor
    if ray.get(board.sign_on.remote(rank, world, me)):
        return  # An earlier attempt met what no restart would mend; the driver knows.
    with Watchdog(board, rank, config.step_timeout_s) as watchdog:
        try:
            data = {key: arguments[key] for key in ("lanes", "shards", "earlier")}
            run = _Run(config, **data, board=board, watchdog=watchdog)
            with contextlib.closing(run):
                run.train()
                run.finish()
        except Exception as error:
            if is_out_of_memory(error):
                ray.get(board.fail.remote(out_of_memory(error, config, world)))
            elif isinstance(error, StorageError):
                ray.get(board.complain.remote(one_line(error)))
            elif isinstance(error, DDRayError):
                ray.get(board.fail.remote(one_line(error)))
            raise
