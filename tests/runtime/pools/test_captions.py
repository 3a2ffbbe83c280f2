"""A set and a student of a tiny teacher of captions, on a real Ray."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import torch

import ddray
from ddray.config.distillation import DistillConfig
from ddray.config.encoding import EncodeConfig
from ddray.distillation.stream import open_stream
from ddray.errors import CheckpointError, ConfigError, ShardError
from ddray.runtime.pools.encoding import encode
from ddray.runtime.pools.sampling import TrajectoryWorker, sample
from ddray.runtime.training.driver import distill, read_history
from ddray.sets.captions import captions_name, cut_captions, padded
from ddray.sets.conditions import open_captions
from ddray.sets.inspection import verify
from ddray.sets.trajectories.making import make_plan, sample_rows
from ddray.sets.trajectories.recompute import recompute
from ddray.sets.trajectories.trajectory_set import TrajectorySet
from ddray.storage import open_storage
from ddray.storage.run_folder import read_summary
from ddray.text.t5 import T5TextEncoder
from tests.core.tiny import write_text_encoder
from tests.runtime.tiny import contents, distilling, sampling, write_teacher

pytestmark = pytest.mark.ray

LENGTH, WIDTH, COUNT = 5, 3, 50


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("teacher")
    return write_teacher(folder, cls_token_num=LENGTH, caption_dim=WIDTH)


@pytest.fixture(scope="module")
def features() -> list[np.ndarray]:
    """Features of every row, of 1 to 5 positions."""
    random = np.random.default_rng(0)
    return [random.normal(size=(1 + i % LENGTH, WIDTH)).astype(np.float32) for i in range(70)]


@pytest.fixture(scope="module")
def files(features: list[np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The same captions in both formats."""
    folder = tmp_path_factory.mktemp("captions")
    rows: list[dict[str, Any]] = [
        {"index": i, "caption": f"a cat, {i}", "features": matrix.tolist()}
        for i, matrix in enumerate(features)
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "a.parquet")
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"parquet": str(folder / "a.parquet"), "jsonl": str(folder / "a.jsonl")}


@pytest.fixture(scope="module")
def whole(
    ray_local: None, teacher: str, files: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A set of three shards, the last one short, from the Parquet file."""
    out = tmp_path_factory.mktemp("sets") / "whole"
    config = sampling(teacher, out, count=COUNT, captions=files["parquet"], workers=(2, 2))
    assert sample(config)["rows_made"] == COUNT
    return out


def test_tokens_are_those_of_a_plain_loop_over_the_features(
    whole: Path, teacher: str, features: list[np.ndarray]
) -> None:
    trajectories = TrajectorySet.open(str(whole))
    plan = trajectories.plan
    assert (plan.conditioning, plan.text_encoder) == ("text", "")
    model = ddray.load_teacher(teacher, device="cpu")
    threads = torch.get_num_threads()
    torch.set_num_threads(plan.threads)
    try:
        for k in range(plan.num_shards):
            tokens = []
            for rows in plan.batches(k):
                cond = tuple(map(torch.from_numpy, padded([features[i] for i in rows])))
                tokens.append(sample_rows(model, plan, rows, cond))
            index, caption, read = trajectories.read_shard(k)
            np.testing.assert_array_equal(read, np.concatenate(tokens))
            assert caption.tolist() == [f"a cat, {i}" for i in index]
    finally:
        torch.set_num_threads(threads)


def test_json_lines_give_the_same_set_byte_for_byte_without_their_broken_rows(
    whole: Path, teacher: str, files: dict[str, str], tmp_path: Path
) -> None:
    rows = [json.loads(line) for line in Path(files["jsonl"]).read_text().splitlines()]
    for place in (30, 7):
        rows.insert(place, {**rows[0], "features": [[0.0]]})
    lines = [json.dumps(row | {"index": index}) for index, row in enumerate(rows)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    given = {"captions": str(tmp_path / "a.jsonl"), "skip_bad_captions": True}
    summary = sample(sampling(teacher, tmp_path / "set", count=COUNT, **given))
    assert summary["captions_left_out"] == 2
    assert read_summary(open_storage(str(tmp_path / "set")))["captions_left_out"] == 2
    for part in ("shards", "captions"):
        assert contents(tmp_path / "set", part) == contents(whole, part)


def test_a_rerun_makes_nothing(whole: Path, teacher: str, files: dict[str, str]) -> None:
    times = {path: path.stat().st_mtime_ns for path in whole.glob("*/*.parquet")}
    assert len(times) == 6
    summary = sample(sampling(teacher, whole, count=COUNT, captions=files["jsonl"]))
    assert (summary["shards_made"], summary["rows_made"]) == (0, 0)
    assert times == {path: path.stat().st_mtime_ns for path in times}


def test_an_extension_takes_the_captions_that_were_left(
    whole: Path, teacher: str, files: dict[str, str], tmp_path: Path
) -> None:
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    assert sample(sampling(teacher, tmp_path, count=70, captions=files["parquet"]))["rows"] == 70
    trajectories = TrajectorySet.open(str(tmp_path))
    assert trajectories.verify().ok
    np.testing.assert_array_equal(
        trajectories.rows(0, 48)[2], TrajectorySet.open(str(whole)).rows(0, 48)[2]
    )
    assert trajectories.rows(69, 70)[1].tolist() == ["a cat, 69"]


def test_what_does_not_fit_is_refused_before_anything_is_written_or_started(
    teacher: str, files: dict[str, str], tmp_path: Path
) -> None:
    was_running = ray.is_initialized()
    lines = Path(files["jsonl"]).read_text().splitlines()
    double = tmp_path / "double.jsonl"
    double.write_text("\n".join([*lines[:8], lines[7], *lines[9:]]))
    plain = tmp_path / "plain.jsonl"
    plain.write_text("".join(f'{{"index": {i}, "caption": "a cat"}}\n' for i in range(70)))
    for captions, encoder, message in (
        (None, None, "is conditioned on captions; give --captions FILE"),
        (str(double), None, "index 7 twice at row 8"),
        (files["parquet"], None, "70 rows, but count=71"),
        (files["parquet"], str(tmp_path), "a.parquet has features already"),
        (str(plain), str(tmp_path), "cannot load the text encoder|need the package transformers"),
    ):
        config = sampling(
            teacher, tmp_path / "set", count=71, captions=captions, text_encoder=encoder
        )
        with pytest.raises((ConfigError, CheckpointError), match=message) as refusal:
            sample(config)
        assert "\n" not in str(refusal.value)
    assert not (tmp_path / "set").exists()
    assert ray.is_initialized() == was_running


def test_other_captions_of_a_shard_are_refused(
    whole: Path, teacher: str, files: dict[str, str], tmp_path: Path
) -> None:
    before = contents(whole)
    text = Path(files["jsonl"]).read_text().replace("a cat, 23", "a dog, 23")
    (tmp_path / "a.jsonl").write_text(text)
    with pytest.raises(ConfigError, match="captions of shard 1 differ from those that the set"):
        sample(sampling(teacher, whole, count=COUNT, captions=str(tmp_path / "a.jsonl")))
    with pytest.raises(ConfigError, match="captions of shard 1 differ from those that the set"):
        sample(sampling(teacher, whole, count=70, captions=str(tmp_path / "a.jsonl")))
    assert contents(whole) == before


def test_captions_without_features_are_encoded_by_the_worker(teacher: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    source = write_text_encoder(tmp_path / "t5", WIDTH)
    words = ["a red cat", "the roof", "a cat on the roof", "on"]
    (tmp_path / "a.jsonl").write_text(
        "".join(f'{{"index": {i}, "caption": "{words[i % 4]}"}}\n' for i in range(20))
    )
    given = {"captions": str(tmp_path / "a.jsonl"), "text_encoder": source, "count": 20}
    config = sampling(teacher, tmp_path / "set", **given)
    model = ddray.load_teacher(teacher, device="cpu")
    captions = open_captions(config, model)
    assert captions is not None
    plan = make_plan(config, model, captions)
    assert plan.text_encoder == source
    trajectories = TrajectorySet.create(config.out, plan)
    cut_captions(captions, trajectories.storage, plan)
    worker = TrajectoryWorker(config.out, "cpu")
    assert (worker.encoding_s, worker.do(0)) == (0, 20)
    assert worker.encoding_s > 0
    encode = T5TextEncoder(source, length=LENGTH)
    expected = [
        sample_rows(model, plan, rows, encode([words[i % 4] for i in rows]))
        for rows in plan.batches(0)
    ]
    np.testing.assert_array_equal(trajectories.read_shard(0)[2], np.concatenate(expected))
    # A student is shown what its teacher was shown.
    run = distilling(tmp_path / "set", tmp_path / "run")
    with open_stream(trajectories, model, run) as stream:
        batch = next(stream.batches())
    shown = batch.cond_B
    asked = model.condition(encode([words[int(i) % 4] for i in batch.index_B]))
    assert torch.equal(shown.features_BTD, asked.features_BTD)
    assert torch.equal(shown.mask_BT, asked.mask_BT)


def test_features_that_were_stored_make_a_set(
    ray_local: None, teacher: str, tmp_path: Path
) -> None:
    pytest.importorskip("transformers")
    source = write_text_encoder(tmp_path / "t5", WIDTH)
    words = ["a red cat", "the roof", "a cat on the roof", "on"]
    (tmp_path / "a.txt").write_text("".join(f"{words[i % 4]}\n" for i in range(20)))
    given = {"captions": str(tmp_path / "a.txt"), "text_encoder": source, "length": LENGTH}
    job = EncodeConfig(
        **given, out=str(tmp_path / "out"), count=20, shard_rows=8, batch_size=3, workers=(1, 1)
    )
    made = encode(job)
    assert (made["rows_made"], made["shards_made"], made["captions"]) == (
        20,
        3,
        f"{job.out}/shards",
    )
    (tmp_path / "out" / "shards" / "shard-00001.parquet").unlink()
    assert encode(job)["rows_made"] == 8
    stored = sampling(teacher, tmp_path / "set", count=20, captions=made["captions"])
    assert sample(stored)["rows_made"] == 20
    trajectories = TrajectorySet.open(stored.out)
    assert trajectories.plan.text_encoder == ""
    assert trajectories.rows(0, 4)[1].tolist() == words
    with pytest.raises(ConfigError, match="shards has features already"):
        encode(job.model_copy(update={"captions": made["captions"]}))
    with pytest.raises(ConfigError, match="there is nothing to encode; give --captions FILE"):
        encode(EncodeConfig())


@pytest.fixture(scope="module")
def student(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> DistillConfig:
    config = distilling(whole, tmp_path_factory.mktemp("runs") / "one")
    distill(config)
    return config


def test_a_student_of_captions_learns_from_the_set_alone(
    student: DistillConfig, teacher: str, features: list[np.ndarray]
) -> None:
    losses = [line["loss"] for line in read_history(student.out)]
    assert sum(losses[-4:]) < sum(losses[:4])
    made = ddray.load_student(f"{student.out}/student", device="cpu")
    assert made.conditioning == "text"
    # The null caption of guidance is no weight, but a part of the model.
    stored = made.model.state_dict()["cls_embedding.uncond_embedding"]
    model = ddray.load_teacher(teacher, device="cpu").model
    assert torch.equal(stored, model.cls_embedding.uncond_embedding)
    cond = tuple(map(torch.from_numpy, padded(features[:4])))
    images = made.decode(made.generate(cond, seed=1, schedule="0,8"))
    assert images.shape == (4, 1, 8, 8)


@pytest.mark.chaos
def test_two_workers_with_parted_weights_learn_what_one_learns(
    student: DistillConfig, whole: Path, tmp_path: Path
) -> None:
    config = distilling(whole, tmp_path / "run", workers=2, zero=3)
    distill(config)
    one, two = ([line["loss"] for line in read_history(run.out)] for run in (student, config))
    assert two == pytest.approx(one, rel=2e-3)
    assert ddray.load_student(f"{config.out}/student", device="cpu").conditioning == "text"


def test_captions_that_are_gone_are_told_by_verify_and_by_recomputation(
    whole: Path, tmp_path: Path
) -> None:
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    assert verify(str(tmp_path)) == []
    assert recompute(str(tmp_path), COUNT).ok
    (tmp_path / captions_name(1)).unlink()
    (told,) = verify(str(tmp_path))
    assert told.startswith("captions of shard 1: ") and "is missing; run `ddray sample`" in told
    with pytest.raises(ShardError, match=r"captions-00001\.parquet is missing"):
        recompute(str(tmp_path), COUNT)


def test_captions_that_were_exchanged_are_noticed(
    whole: Path, teacher: str, tmp_path: Path
) -> None:
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    (tmp_path / captions_name(0)).write_bytes((whole / captions_name(1)).read_bytes())
    trajectories = TrajectorySet.open(str(tmp_path))
    model = ddray.load_teacher(teacher, device="cpu")
    stream = open_stream(trajectories, model, distilling(tmp_path, tmp_path))
    with stream, pytest.raises(ShardError, match="was sampled from other captions than it holds"):
        next(stream.batches())
