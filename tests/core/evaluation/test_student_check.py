"""Facts about looking at a student in training: figures, the picture, the best one, its curves."""

import io
import json
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboardX.proto.event_pb2 import Event

import ddray
from ddray.config.distillation import DistillConfig
from ddray.config.evaluation import EvaluateConfig
from ddray.distillation.log import TrainingLog
from ddray.errors import ConfigError
from ddray.evaluation.evaluate import evaluate
from ddray.evaluation.student_check import (
    _worse_in_a_row,
    check_evaluations,
    check_student,
    code_features,
)
from ddray.method.seeding import next_seed
from ddray.method.teacher import Teacher
from ddray.metrics.fd_digits import DigitsNetwork
from ddray.metrics.frechet import FeatureStatistics
from ddray.metrics.network import POOL
from ddray.metrics.reference import Reference
from ddray.models.zoo import BUNDLED, METRIC_FOLDER
from ddray.sets.captions import cut_captions, padded
from ddray.sets.trajectories.making import make_plan
from ddray.sets.trajectories.trajectory_set import TrajectorySet
from ddray.storage import open_storage
from ddray.storage.caption_file import CaptionFile
from ddray.storage.checkpoint import load_folder, save_folder
from tests.runtime.tiny import sampling, write_student, write_teacher

COUNT = 20
LENGTH, WIDTH = 5, 3


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_teacher(tmp_path_factory.mktemp("teacher"))


def _write_set(teacher: str, out: Path, shards: int = 1, **changes: Any) -> TrajectorySet:
    """A set of any tokens: what it holds is not looked at."""
    model = ddray.load_teacher(teacher, device="cpu")
    plan = make_plan(sampling(teacher, out, **{"count": COUNT, **changes}), model)
    trajectories = TrajectorySet.create(str(out), plan)
    random = np.random.default_rng(0)
    for k in range(shards):
        index = np.array(plan.shard_range(k))
        tokens = random.integers(0, plan.vocab_size, (len(index), plan.num_tokens))
        label = [f"a cat, {i}" for i in index]
        if plan.conditioning == "class":
            label = plan.label(index)
        trajectories.write_shard(k, index, label, tokens)
    return trajectories


@pytest.fixture(scope="module")
def data(teacher: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    return _write_set(teacher, tmp_path_factory.mktemp("set")).uri


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A set by the bundled teacher."""
    return _write_set("digits-var", tmp_path_factory.mktemp("digits")).uri


@pytest.fixture(scope="module")
def digits_teacher() -> Teacher:
    return ddray.load_teacher("digits-var", device="cpu")


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The bundled student, as a checkpoint has it."""
    return _at_step(BUNDLED / "digits-var-dd", tmp_path_factory.mktemp("student"), 10)


def _at_step(source: Path | str, folder: Path, step: int, scale: float = 1.0) -> str:
    """A student whose output layer is scaled: each is another one."""
    config, weights, tokenizer = load_folder(source)
    weights = {k: w * scale if k == "output.weight" else w for k, w in weights.items()}
    save_folder(folder, {**config, "step": step}, model=weights, tokenizer=tokenizer)
    return str(folder)


def _student(folder: Path, teacher: str, step: int, scale: float = 1.0) -> str:
    name = write_student(folder / "plain", teacher)
    return _at_step(name, folder / str(step), step, scale)


def _config(data: str, out: Path, **changes: Any) -> DistillConfig:
    return DistillConfig(**{"data": data, "out": str(out), "evaluate_count": COUNT, **changes})


def _lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "evaluations.jsonl").read_text().splitlines()]


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
    first = check_student(_student(tmp_path, teacher, 10), _config(data, out))
    assert first.keys() == {"step", "quality", "leading", "worse_in_a_row"}
    assert (first["step"], first["leading"], first["worse_in_a_row"]) == (10, "fd_codes", 0)
    told = [(row["generator"], row["steps"], row["images"]) for row in first["quality"]]
    assert told == [("student, 1 step", 1, COUNT), ("student, 2 steps", 2, COUNT)]
    with Image.open(io.BytesIO((out / "pictures" / "step-0000010.png").read_bytes())) as picture:
        assert picture.width > 10 * 8
    # Logits turned round are another student; if it is the worse one, it is counted and not kept.
    worse = check_student(_student(tmp_path, teacher, 20, -1.0), _config(data, out))
    kept = load_folder(out / "student-best")[0]["step"]
    assert [{k: v for k, v in line.items() if k != "time"} for line in _lines(out)] == [
        first,
        worse,
    ]
    is_better = worse["quality"][0]["fd_codes"] < first["quality"][0]["fd_codes"]
    assert (worse["worse_in_a_row"] == 0) == is_better
    assert kept == (20 if worse["worse_in_a_row"] == 0 else 10)
    events = _events(out)
    assert events.keys() == {"fd_codes_1", "fd_codes_2", "same_noise"}
    assert events["fd_codes_1"] == events["same_noise"] == {10, 20}


def test_the_distance_of_codes_is_that_of_what_the_student_generates(
    teacher: str, data: str, tmp_path: Path
) -> None:
    name = _student(tmp_path, teacher, 1)
    line = check_student(name, _config(data, tmp_path / "run"))
    student, model = ddray.load_student(name), ddray.load_teacher(teacher)
    index, label, tokens = TrajectorySet.open(data).read_shard(0)
    codes = student.generate(
        torch.from_numpy(label).long(), index=torch.from_numpy(index), seed=1, schedule="0,8"
    )
    theirs = model.codebook[torch.from_numpy(tokens.astype("int64"))]
    statistics = [FeatureStatistics.from_features(code_features(x)) for x in (theirs, codes)]
    distance = statistics[0].distance(statistics[1])
    assert line["quality"][1]["fd_codes"] == pytest.approx(distance, rel=1e-5)


@pytest.mark.slow
def test_figures_are_those_of_an_evaluation_of_the_same_images(
    digits: str, student: str, tmp_path: Path
) -> None:
    line = check_student(student, _config(digits, tmp_path / "run"))
    whole = evaluate(
        EvaluateConfig(
            student=student,
            data=digits,
            count=COUNT,
            seed=next_seed(TrajectorySet.open(digits).plan.seed),
            rows="transport,student",
            speed_batches="off",
            transport_count=0,
            out=tmp_path / "evaluation",
        )
    )
    keys = ("generator", "steps", "images", "fd_digits", "class_accuracy")
    expected = [{key: row[key] for key in keys} for row in whole.quality]
    assert [{k: v for k, v in row.items() if k != "ratio"} for row in line["quality"]] == expected
    base, *others = line["quality"]
    assert base["generator"] == "teacher, by transport"
    assert [r["ratio"] for r in others] == [r["fd_digits"] / base["fd_digits"] for r in others]
    assert line["leading"] == whole.summary["leading"] == "fd_digits"
    assert {"fd_digits_teacher", "ratio_1", "class_accuracy_1"} < _events(tmp_path / "run").keys()
    assert not (tmp_path / "run" / "features").exists()


def _reference(path: Path, **notes: Any) -> str:
    """Statistics and features of random images by the digit classifier, or said to be others."""
    network = DigitsNetwork(METRIC_FOLDER)
    images = torch.randint(0, 256, (80, 1, 28, 28), generator=torch.manual_seed(0))
    found = network(images.to(torch.uint8))[POOL]
    reference = Reference(
        str(path),
        {POOL: FeatureStatistics.from_features(found)},
        network.fingerprint,
        network.name,
        found.half().numpy(),
    )
    np.savez(path, **replace(reference, **notes).arrays())
    return str(path)


@pytest.mark.slow
def test_any_metrics_and_a_reference_can_be_asked_for(
    digits: str, student: str, tmp_path: Path
) -> None:
    asked = {"reference": _reference(tmp_path / "real.npz"), "metrics": "recall_digits,fd_digits"}
    line = check_student(student, _config(digits, tmp_path / "run", evaluate=asked))
    assert [row.keys() - {"ratio"} for row in line["quality"]] == [
        {"generator", "steps", "images", "recall_digits", "fd_digits"}
    ] * 3
    assert line["leading"] == "fd_digits"
    held_out = check_student(student, _config(digits, tmp_path / "other"))
    assert held_out["quality"][0]["fd_digits"] < line["quality"][0]["fd_digits"]


def test_shards_that_are_not_there_or_damaged_are_passed_over(teacher: str, tmp_path: Path) -> None:
    trajectories = _write_set(teacher, tmp_path / "set", 4, count=40, shard_rows=10)
    for k, content in ((0, None), (1, b"PAR1 cut")):
        path = Path(trajectories.storage.join(trajectories.shard_name(k)))
        path.unlink()
        if content:
            path.write_bytes(content)
    name = _student(tmp_path, teacher, 1)
    line = check_student(name, _config(trajectories.uri, tmp_path / "run", evaluate_count=15))
    assert [row["images"] for row in line["quality"]] == [15, 15]
    student, model = ddray.load_student(name), ddray.load_teacher(teacher)
    parts = [trajectories.read_shard(k) for k in (2, 3)]
    label, tokens = (np.concatenate([part[i] for part in parts])[:15] for i in (1, 2))
    codes = student.generate(
        torch.from_numpy(label).long(), index=torch.arange(15), seed=1, schedule="0"
    )
    theirs = model.codebook[torch.from_numpy(tokens.astype("int64"))]
    statistics = [FeatureStatistics.from_features(code_features(x)) for x in (theirs, codes)]
    distance = statistics[0].distance(statistics[1])
    assert line["quality"][0]["fd_codes"] == pytest.approx(distance, rel=1e-5)


def test_a_student_of_captions_is_asked_for_the_captions_of_its_set(tmp_path: Path) -> None:
    teacher = write_teacher(tmp_path / "teacher", cls_token_num=LENGTH, caption_dim=WIDTH)
    random = np.random.default_rng(0)
    features = [random.normal(size=(1 + i % LENGTH, WIDTH)).astype("f4") for i in range(COUNT)]
    captions = tmp_path / "a.jsonl"
    rows = [
        {"index": i, "caption": f"a cat, {i}", "features": matrix.tolist()}
        for i, matrix in enumerate(features)
    ]
    captions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    trajectories = _write_set(teacher, tmp_path / "set", captions=str(captions))
    file = CaptionFile(str(captions), length=LENGTH, width=WIDTH)
    cut_captions(file, trajectories.storage, trajectories.plan)
    name, out = _student(tmp_path, teacher, 3), tmp_path / "run"
    config = _config(trajectories.uri, out)
    check_evaluations(config, trajectories, ddray.load_teacher(teacher, device="cpu"))
    line = check_student(name, config)
    assert [row["generator"] for row in line["quality"]] == ["student, 1 step", "student, 2 steps"]
    student, (_, _, tokens) = ddray.load_student(name), trajectories.read_shard(0)
    asked = tuple(map(torch.from_numpy, padded(features)))
    codes = student.generate(asked, index=torch.arange(COUNT), seed=1, schedule="0")
    theirs = student.codebook[torch.from_numpy(tokens.astype("int64"))]
    statistics = [FeatureStatistics.from_features(code_features(x)) for x in (theirs, codes)]
    distance = statistics[0].distance(statistics[1])
    assert line["quality"][0]["fd_codes"] == pytest.approx(distance, rel=1e-5)
    assert (out / "pictures" / "step-0000003.png").exists()
    wanted = _config(trajectories.uri, out, evaluate={"metrics": "class_accuracy"})
    with pytest.raises(ConfigError, match="does not make grey 28x28 digits"):
        check_evaluations(wanted, trajectories, student)


REFUSED: dict[str, tuple[dict[str, str], str]] = {
    "metric": ({"metrics": "fidd"}, "evaluate: metric 'fidd' is not one of fid, "),
    "no weights": ({"metrics": "fid", "inception": "none.pth"}, "none.pth does not exist"),
    "few": ({"metrics": "kd_digits"}, "kd_digits takes at least 1000 images, and there are 20"),
    "no reference": ({"metrics": "fd_efficientnet"}, "give their reference"),
    "images": ({"metrics": "fd_efficientnet", "reference": "real"}, "would be taken anew at every"),
    "other network": (
        {"metrics": "fd_efficientnet", "reference": "other.npz"},
        "was made by others",
    ),
    "only statistics": (
        {"metrics": "recall_digits", "reference": "thin.npz"},
        "cannot serve recall_digits: it holds no images",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_evaluations_that_cannot_come_out_are_refused_at_the_start(
    case: str,
    digits: str,
    digits_teacher: Teacher,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked, told = REFUSED[case]
    monkeypatch.chdir(tmp_path)
    if str(asked.get("reference")).endswith(".npz"):
        notes = {"other.npz": {"network": "others"}, "thin.npz": {"features": None}}
        _reference(tmp_path / asked["reference"], **notes[asked["reference"]])
    config = _config(digits, tmp_path / "run", evaluate=asked)
    with pytest.raises(ConfigError, match=told):
        check_evaluations(config, TrajectorySet.open(digits), digits_teacher)


def test_a_set_of_one_row_is_refused(teacher: str, tmp_path: Path) -> None:
    trajectories = _write_set(teacher, tmp_path, count=1)
    with pytest.raises(ConfigError, match="evaluate_every needs a set of at least 2 rows"):
        check_evaluations(
            _config(trajectories.uri, tmp_path), trajectories, ddray.load_teacher(teacher)
        )


def _line(leading: str, value: float) -> dict[str, Any]:
    rows = [("teacher, by transport", 5, 0.0), ("student, 1 step", 1, value)]
    quality = [{"generator": name, "steps": steps, leading: v} for name, steps, v in rows]
    return {"step": 1, "quality": quality, "leading": leading}


@pytest.mark.parametrize(
    ("leading", "values", "worse"),
    [
        ("fid", (3.0, 2.0, 2.5, 2.1), 2),
        ("fd_codes", (3.0, 2.0, 1.0), 0),
        ("inception_score", (3.0, 9.0, 8.0), 1),
        ("recall_dinov2", (0.1, 0.2, 0.3), 0),
    ],
)
def test_the_best_has_the_least_distance_or_the_highest_score(
    leading: str, values: tuple[float, ...], worse: int
) -> None:
    assert _worse_in_a_row([_line(leading, value) for value in values]) == worse


def test_evaluations_of_another_metric_or_of_an_earlier_ddray_are_no_rivals() -> None:
    earlier = {"step": 1, "fd_digits_1": 0.1, "ratio_1": 1.0, "worse_in_a_row": 0}
    lines = [earlier, _line("fid", 0.2), _line("fd_digits", 3.0), _line("fd_digits", 4.0)]
    assert _worse_in_a_row(lines[:3]) == 0
    assert _worse_in_a_row(lines) == 1


def test_a_run_that_an_earlier_ddray_began_goes_on(teacher: str, data: str, tmp_path: Path) -> None:
    earlier = json.dumps({"time": 1.0, "step": 1, "fd_codes_1": 0.0, "worse_in_a_row": 0}) + "\n"
    open_storage(str(tmp_path / "run")).write("evaluations.jsonl", earlier.encode())
    line = check_student(_student(tmp_path, teacher, 2), _config(data, tmp_path / "run"))
    assert line["worse_in_a_row"] == 0
    assert [line["step"] for line in _lines(tmp_path / "run")] == [1, 2]


def test_a_log_goes_on_with_the_lines_of_an_earlier_attempt(tmp_path: Path) -> None:
    earlier: list[dict[str, Any]] = [{"step": 1, "loss": 2.0}]
    log = TrainingLog(str(tmp_path), earlier)
    log.add({"step": 2, "loss": 1.5})
    log.close()
    lines = [json.loads(x) for x in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.5}]
    assert _events(tmp_path)["loss"] == {2}
