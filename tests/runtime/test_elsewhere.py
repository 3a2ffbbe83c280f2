"""Workers run in other folders than the command: what it was told relative to its own is found."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from ddray.config.distillation import DistillConfig
from ddray.config.evaluation import EvaluateConfig
from ddray.config.generation import GenerateConfig
from ddray.config.loading import load_config
from ddray.config.sampling import SampleConfig
from ddray.models.zoo import BUNDLED
from ddray.runtime.evaluating import evaluate_on_cluster
from ddray.runtime.pools.bulk import generate
from ddray.runtime.pools.sampling import sample
from ddray.runtime.training.driver import distill
from tests.runtime.tiny import write_teacher

pytestmark = [pytest.mark.ray, pytest.mark.chaos, pytest.mark.usefixtures("ray_local")]


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current and a home folder that Ray's workers, which are there already, do not have."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path


def test_a_job_whose_every_location_is_relative(elsewhere: Path) -> None:
    write_teacher(Path("models") / "t u%20#")
    sizes = {"count": 40, "shard_rows": 20, "batch_size": 8, "workers": 1, "num_evals": 6}
    teacher = "models/t u%20#"
    sample(SampleConfig(teacher=teacher, out="s e%20t", **sizes))
    short = {"steps": 2, "batch_size": 8, "schedule": "0,8", "threads": 1, "checkpoint_every": 1}
    first = distill(DistillConfig(data="s e%20t", teacher=teacher, out="r u%20n", **short))
    assert first["student"] == str(elsewhere / "r u%20n" / "student")
    for spelling in (str(elsewhere / teacher), f"./{teacher}/", "~/../models/t u%20#"):
        again = DistillConfig(data="s e%20t", teacher=spelling, out="r u%20n", **short)
        assert distill(again) == first
    # As an earlier ddray wrote it, and from another folder.
    written = Path("r u%20n/config.json")
    values: dict[str, Any] = json.loads(written.read_text())
    values["identity"]["teacher"] = teacher
    written.write_text(json.dumps(values))
    assert distill(again) == first
    kept = json.loads(written.read_text())["identity"]["teacher"]
    assert kept == teacher
    on = DistillConfig(data="s e%20t", init="r u%20n/student", out="~/on", **short)
    assert distill(on)["student"] == str(elsewhere / "home" / "on" / "student")


def test_images_and_an_evaluation_of_a_student_in_the_home_folder(elsewhere: Path) -> None:
    shutil.copytree(BUNDLED / "digits-llamagen-dd", elsewhere / "home" / "runs x" / "student")
    student = "~/runs x/student"
    made = generate(GenerateConfig(student=student, out="images", count=4, shard_rows=4))
    assert (made["student"], made["images"]) == (str(elsewhere / "home/runs x/student"), 4)
    settings = ["speed_batches=[1]", "speed_seconds=0.1", "transport_count=2", "batch_size=10"]
    flags = {"student": student, "count": "10", "out": "evaluated", "rows": "student"}
    config = load_config(EvaluateConfig, settings=settings, flags=flags)
    rows = evaluate_on_cluster(config).quality
    assert {row["images"] for row in rows if row["steps"]} >= {10}
