"""`ddray quickstart --preset tiny` as a user runs it, with the bundled teacher."""

import json
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
from PIL import Image

import ddray
from ddray.sets.inspection import verify
from tests.patience import PATIENCE_S
from tests.runtime.tiny import command, contents, environment

pytestmark = pytest.mark.chaos


def _quickstart(folder: Path, teacher: str) -> subprocess.CompletedProcess[str]:
    settings = ["--set", "sample.workers=1", "--set", "distill.threads=1"]
    return subprocess.run(
        command("quickstart", "--preset", "tiny", "--teacher", teacher, "--out", "run", *settings),
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE_S,
    )


class _Made(NamedTuple):
    """What a teacher's quickstart measures, and what its student makes of one condition."""

    metric: str
    condition: list[int] | list[str]
    image: tuple[int, ...]


MADE = {
    "digits-llamagen": _Made("fd_digits", [3], (1, 1, 28, 28)),
    "digits-var": _Made("fd_digits", [3], (1, 1, 28, 28)),
    "emoji-llamagen": _Made("fd_efficientnet", ["red apple"], (1, 3, 32, 32)),
}


@pytest.fixture(scope="module", params=MADE)
def teacher(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def folder(teacher: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quickstart")
    done = _quickstart(folder, teacher)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return folder


def test_it_leaves_a_report_a_student_a_set_and_images(folder: Path, teacher: str) -> None:
    run = folder / "run"
    assert list(folder.iterdir()) == [run]
    assert (run / "report.html").read_text().startswith("<!")
    assert min(Image.open(run / "grid.png").size) > 200
    assert verify(str(run / "trajectories")) == []
    student = ddray.load_student(run / "student", device="cpu")
    assert student.config["teacher"] == teacher
    made = MADE[teacher]
    assert student.decode(student.generate(made.condition, seed=1)).shape == made.image
    assert json.loads((run / "images" / "summary.json").read_text())["images"] == 100


def test_the_summary_has_the_protocol_of_its_figures(folder: Path, teacher: str) -> None:
    summary = json.loads((folder / "run" / "summary.json").read_text())
    protocol = " ".join(summary["evaluation"]["protocol"])
    assert "100" in protocol
    assert "seed" in protocol
    generators = [row["generator"] for row in summary["evaluation"]["quality"]]
    assert {"student, 1 step", "student, 2 steps", "independent tokens"} <= {*generators}
    assert all(row[MADE[teacher].metric] > 0 for row in summary["evaluation"]["quality"])
    assert (summary["trajectories"]["rows_made"], summary["distillation"]["steps"]) == (200, 20)


def test_a_second_run_makes_no_part_again(folder: Path, teacher: str) -> None:
    parts = ("trajectories/shards", "distill/student", "images/shards", "student")
    before = contents(folder / "run", *parts)
    done = _quickstart(folder, teacher)
    assert done.returncode == 0, done.stderr
    summary = json.loads((folder / "run" / "summary.json").read_text())
    assert (summary["trajectories"]["rows_made"], summary["images"]["rows_made"]) == (0, 0)
    assert contents(folder / "run", *parts) == before
    history = (folder / "run" / "distill" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in history] == [5, 10, 15, 20]
