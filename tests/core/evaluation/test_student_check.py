"""Facts about looking at a student in training: figures, the picture, the best one, its curves."""

import io
import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tensorboardX.proto.event_pb2 import Event

import ddray
from ddray.distillation.log import TrainingLog
from ddray.evaluation.student_check import check_student, code_features
from ddray.metrics.frechet import FeatureStatistics
from ddray.sets.trajectories.making import make_plan
from ddray.sets.trajectories.trajectory_set import TrajectorySet
from ddray.storage.checkpoint import load_folder, save_folder
from tests.runtime.tiny import sampling, write_student, write_teacher

COUNT = 20


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def data(teacher: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    out = tmp_path_factory.mktemp("set")
    model = ddray.load_teacher(teacher, device="cpu")
    plan = make_plan(sampling(teacher, out, count=COUNT), model)
    index = torch.arange(COUNT).numpy()
    tokens = model.trajectories(torch.arange(COUNT) % 10, index, seed=plan.seed, num_evals=6)
    TrajectorySet.create(str(out), plan).write_shard(0, index, plan.label(index), tokens)
    return str(out)


def _student(folder: Path, teacher: str, step: int, scale: float = 1.0) -> str:
    """A student whose output layer is scaled: each is another one."""
    name = write_student(folder / str(step), teacher)
    config, weights, tokenizer = load_folder(name)
    weights = {k: w * scale if k == "output.weight" else w for k, w in weights.items()}
    save_folder(name, {**config, "step": step}, model=weights, tokenizer=tokenizer)
    return name


def _events(out: Path) -> dict[str, set[int]]:
    """Tags that TensorBoard finds, and their steps."""
    found: dict[str, set[int]] = {}
    for file in (out / "tensorboard").iterdir():
        data = file.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            event = Event.FromString(data[12 : 12 + length])
            for value in event.summary.value:
                found.setdefault(value.tag, set()).add(event.step)
            data = data[16 + length :]
    return found


@pytest.mark.slow
def test_a_check_writes_figures_a_picture_and_the_best_student(
    teacher: str, data: str, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    first = check_student(_student(tmp_path, teacher, 10), data, str(out), COUNT, teacher)
    assert first.keys() == {"step", "fd_codes_1", "fd_codes_2", "worse_in_a_row"}
    assert (first["step"], first["worse_in_a_row"]) == (10, 0)
    with Image.open(io.BytesIO((out / "pictures" / "step-0000010.png").read_bytes())) as picture:
        assert picture.width > 10 * 8
    # Logits turned round are another student; if it is the worse one, it is counted and not kept.
    worse = check_student(_student(tmp_path, teacher, 20, -1.0), data, str(out), COUNT, teacher)
    kept = load_folder(out / "student-best")[0]["step"]
    lines = [json.loads(x) for x in (out / "evaluations.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [10, 20]
    assert (worse["worse_in_a_row"] == 0) == (worse["fd_codes_1"] < first["fd_codes_1"])
    assert kept == (20 if worse["worse_in_a_row"] == 0 else 10)
    events = _events(out)
    assert events["fd_codes_1"] == events["same_noise"] == {10, 20}


def test_the_distance_is_that_of_what_the_student_generates(
    teacher: str, data: str, tmp_path: Path
) -> None:
    name = _student(tmp_path, teacher, 1)
    line = check_student(name, data, str(tmp_path / "run"), COUNT, teacher)
    student, model = ddray.load_student(name), ddray.load_teacher(teacher)
    index, label, tokens = TrajectorySet.open(data).read_shard(0)
    codes = student.generate(
        torch.from_numpy(label).long(), index=torch.from_numpy(index), seed=1, schedule="0,8"
    )
    theirs = model.codebook[torch.from_numpy(tokens.astype("int64"))]
    statistics = [FeatureStatistics.from_features(code_features(x)) for x in (theirs, codes)]
    assert line["fd_codes_2"] == pytest.approx(statistics[0].distance(statistics[1]), rel=1e-5)


def test_a_log_goes_on_with_the_lines_of_an_earlier_attempt(tmp_path: Path) -> None:
    earlier: list[dict[str, Any]] = [{"step": 1, "loss": 2.0}]
    log = TrainingLog(str(tmp_path), earlier)
    log.add({"step": 2, "loss": 1.5})
    log.close()
    lines = [json.loads(x) for x in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.5}]
    assert _events(tmp_path)["loss"] == {2}
