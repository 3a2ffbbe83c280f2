"""The real command in a process group of its own, what can be done to it, and a set for it."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

import ddray
from ddray.sets.trajectories.making import make_plan, sample_rows
from ddray.sets.trajectories.trajectory_set import TrajectorySet
from tests.patience import PATIENCE_S, wait_until
from tests.processes import kill_with_children
from tests.runtime.tiny import command, environment, sampling


def json_lines(file: Path) -> list[Any]:
    """What a running job has noted so far; nothing before it has begun."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def events(out: Path, event: str) -> list[dict[str, Any]]:
    """Lines of a kind in `events.jsonl` of a set or run."""
    return [line for line in json_lines(out / "events.jsonl") if line["event"] == event]


def logged_steps(run: Path) -> list[int]:
    """Steps in the log of a training."""
    return [line["step"] for line in json_lines(run / "metrics.jsonl")]


class Job:
    """`ddray ...` in a process group of its own."""

    def __init__(self, *arguments: str, **variables: str):
        self.process = subprocess.Popen(
            command(*arguments),
            env=environment(**variables),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def workers(self, title: str) -> list[psutil.Process]:
        """Processes of this job's Ray whose title contains a text."""
        found = []
        for process in self.tree():
            try:
                if title in " ".join(process.cmdline()):
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def tree(self) -> list[psutil.Process]:
        """All processes that this job has started."""
        try:
            return psutil.Process(self.process.pid).children(recursive=True)
        except psutil.Error:
            return []

    def until(self, condition: Callable[[], bool]) -> None:
        """Wait while the job runs; it must not end before the condition holds."""
        running = self.process
        wait_until(
            condition, "what is waited for", lambda: running.poll() is None, running.communicate
        )

    def end_by_force(self) -> None:
        """Kill what still runs, as a failed test leaves it."""
        if self.process.poll() is None:
            kill_with_children(self.process.pid)
            self.process.communicate(timeout=PATIENCE_S)

    def kill_driver(self) -> None:
        """SIGKILL to the driver alone; what it started must go by itself."""
        tree = self.tree()
        folders = {Path(part) for p in tree for part in _session_folders(p)}
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.communicate(timeout=PATIENCE_S)
        try:
            wait_until(lambda: not any(map(is_alive, tree)), "end of what the driver has started")
        finally:
            for process in tree:
                with contextlib.suppress(psutil.Error):
                    process.kill()
            for folder in folders:
                shutil.rmtree(folder, ignore_errors=True)

    def end(self) -> tuple[int, str, str]:
        """Exit status, stdout and stderr."""
        stdout, stderr = self.process.communicate(timeout=PATIENCE_S)
        return self.process.returncode, stdout, stderr


# Ray's own agents of a node write nothing of ours, and take their time to notice a lost node.
_AGENTS = ("ray::Dashboard", "ray::RuntimeEnv")


def is_alive(process: psutil.Process) -> bool:
    """Whether it still runs: not every init collects orphans at once."""
    try:
        if process.name().startswith(_AGENTS):
            return False
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _session_folders(process: psutil.Process) -> list[str]:
    """Folders that a killed driver could not delete: the parents of Ray's session folders."""
    try:
        parts = process.cmdline()
    except psutil.Error:
        return []
    sessions = [p.partition("=")[2] for p in parts if p.startswith("--session_dir=")]
    return [str(Path(s).parent) for s in sessions if Path(s).parent.name.startswith("ddray-")]


def foreign_lines(stderr: str) -> list[str]:
    """Lines that no part of ddray has written: they belong to nobody's terminal."""
    ours = re.compile(r"ddray: |found \d|(trajectories|images|distillation|evaluation|verify): ")
    return [line for line in stderr.splitlines() if not ours.match(line)]


def write_set(teacher: str, out: Path, **settings: Any) -> Path:
    """A set that no Ray has seen, by a plain loop in this process."""
    model = ddray.load_teacher(teacher, device="cpu")
    trajectories = TrajectorySet.create(
        str(out), make_plan(sampling(teacher, out, **settings), model)
    )
    plan, threads = trajectories.plan, torch.get_num_threads()
    torch.set_num_threads(plan.threads)
    for k in range(plan.num_shards):
        index = np.asarray(plan.shard_range(k))
        tokens = np.concatenate([sample_rows(model, plan, batch) for batch in plan.batches(k)])
        trajectories.write_shard(k, index, plan.label(index), tokens)
    torch.set_num_threads(threads)
    return out
