"""A head is lost under a job: another comes up in its place, and nobody submits by hand."""

import contextlib
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from ddray.sets.trajectories.trajectory_set import TrajectorySet
from tests.chaos.job import json_lines, logged_steps, write_set
from tests.chaos.ray_head import BIN, ray_head
from tests.loopback import free_port
from tests.paths import ROOT
from tests.patience import PATIENCE_S, wait_until

pytestmark = pytest.mark.chaos


def drill(folder: Path, stage: str, begun: Callable[[], object], *flags: object) -> str:
    """Submit, lose the head once the job has begun, start another; what the command printed."""
    command = [BIN / "ddray", "cluster", "submit", "--submission-id", "drill"]
    command += ["--working-dir", ROOT / "jobs", "--", "python", f"{stage}.py"]
    command += ["--config", f"configs/digits-{stage}.yaml", *map(str, flags)]
    printed = folder / "printed"
    port = free_port()
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(ray_head(dashboard_port=port))
        environment = {**first.environment, "RAY_ADDRESS": first.dashboard}
        out = stack.enter_context(printed.open("wb"))
        submitting = subprocess.Popen(command, env=environment, stdout=out, stderr=out)
        stack.callback(submitting.kill)

        def alive() -> bool:
            return submitting.poll() is None

        wait_until(begun, f"begin of {stage}", alive, printed.read_text)
        first.lose()
        token = environment["RAY_AUTH_TOKEN"]
        stack.enter_context(ray_head(dashboard_port=port, RAY_AUTH_TOKEN=token))
        assert submitting.wait(PATIENCE_S) == 0, printed.read_text()
    told = printed.read_text()
    # To a head that knows nothing of the first attempt, under the same name.
    assert told.count("ddray: submitted drill;") == 2, told
    assert "ddray: drill has succeeded" in told
    return told


def test_a_set_is_whole_after_its_head_was_lost(teacher: str, tmp_path: Path) -> None:
    shards = tmp_path / "set" / "shards"
    sizes = ("--count", 160, "--shard-rows", 8, "--set", "batch_size=8", "--num-evals", 2400)
    flags = ("--teacher", teacher, *sizes, "--out", tmp_path / "set")
    drill(tmp_path, "sample", lambda: any(shards.glob("*.parquet")), *flags)
    assert TrajectorySet.open(str(tmp_path / "set")).verify().ok


def test_a_student_is_there_after_its_head_was_lost(teacher: str, tmp_path: Path) -> None:
    data = write_set(teacher, tmp_path / "set")
    run = tmp_path / "run"
    flags = ("--data", data, "--out", run, "--steps", 600, "--schedule", "0,8")
    flags = (*flags, "--log-every", 1, "--checkpoint-every", 100, "--evaluate-every", 0)

    def events() -> list[str]:
        return [line["event"] for line in json_lines(run / "events.jsonl")]

    drill(tmp_path, "distill", lambda: max(logged_steps(run), default=0) >= 150, *flags)
    assert sorted(set(logged_steps(run))) == list(range(1, 601))
    assert "resumed" in events()
    assert (run / "student" / "model.safetensors").is_file()
