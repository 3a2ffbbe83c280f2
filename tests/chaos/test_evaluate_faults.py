"""Evaluations whose worker or driver dies in mid-run: the bits of one that nobody disturbed.

Every job is the real command in a process group of its own, with a private Ray.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ddray.config.evaluation import EvaluateConfig
from ddray.evaluation.evaluate import evaluate
from tests.chaos.job import Job
from tests.runtime.tiny import contents

pytestmark = pytest.mark.chaos

# One row a batch, only to make a shard last half a second: time to strike.
SLOW: dict[str, Any] = {
    "student": "digits-llamagen-dd",
    "rows": "transport,student,independent",
    "count": 48,
    "shard_rows": 4,
    "batch_size": 1,
    "speed_batches": "off",
    "transport_count": 0,
    "threads": 1,
}
# Of each of four rows.
SHARDS = 4 * 12


def _command(out: Path, workers: int) -> list[str]:
    flags = {**SLOW, "workers": workers, "out": out}
    return ["evaluate", *(f"--{k.replace('_', '-')}={value}" for k, value in flags.items())]


def _features(out: Path) -> int:
    return len(list((out / "features").rglob("*.safetensors")))


def test_kills_cost_nothing_but_time(start: Callable[..., Job], tmp_path: Path) -> None:
    undisturbed, out = tmp_path / "undisturbed", tmp_path / "out"
    figures = evaluate(EvaluateConfig(**SLOW, out=undisturbed)).quality
    job = start(*_command(out, workers=2))
    job.until(lambda: _features(out) >= 2)
    job.workers("ray::MapWorker")[0].kill()
    there = _features(out)
    job.until(lambda: _features(out) > there + 4)
    job.kill_driver()
    assert _features(out) < SHARDS
    # By one process: what there is belongs to the plan, not to who made it.
    status, _, stderr = start(*_command(out, workers=1)).end()
    assert status == 0, stderr
    assert "Traceback" not in stderr
    assert contents(out, "features") == contents(undisturbed, "features")
    assert json.loads((out / "summary.json").read_text())["quality"] == figures
