"""Distillation on a real Ray Train with DeepSpeed: workers, ZeRO, what is refused and kept."""

import json
import math
import shutil
import urllib.request
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import ray
import torch

import ddray
from ddray.config.distillation import DistillConfig
from ddray.distillation.optimization import (
    MovingAverage,
    batch_loss,
    learning_rate,
    parameter_groups,
    set_learning_rate,
)
from ddray.distillation.stream import TrajectoryStream
from ddray.errors import ConfigError, DDRayError, ShardError, StorageError, TrainingError
from ddray.models.families import empty_network, empty_tokenizer
from ddray.models.zoo import load_masked, new_student
from ddray.runtime.training.driver import _validation, distill, read_history
from ddray.runtime.training.metrics import TrainingMetrics
from ddray.sets.sharded_set import shard_name
from ddray.sets.trajectories.making import make_plan, sample_rows
from ddray.sets.trajectories.trajectory_set import TrajectorySet
from ddray.storage import open_storage
from ddray.storage.checkpoint import load_folder, save_folder
from ddray.storage.lease import Lease
from ddray.storage.run_folder import EVALUATIONS_FILE, read_lines
from tests.core.tiny import VAR_SIZES, random_state
from tests.patience import PATIENCE_S, wait_until
from tests.runtime.tiny import contents, distilling, sampling, write_teacher

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Any:
    """What is computed in this process is compared with workers of one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def data(teacher: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set of 60 trajectories in three shards, made in this process."""
    return _write_set(teacher, tmp_path_factory.mktemp("sets") / "whole")


def _write_set(teacher: str, out: Path, shards: int = 3) -> Path:
    model = ddray.load_teacher(teacher, device="cpu")
    trajectories = TrajectorySet.create(str(out), make_plan(sampling(teacher, out), model))
    plan = trajectories.plan
    for k in range(shards):
        index = torch.as_tensor(plan.shard_range(k)).numpy()
        tokens = sample_rows(model, plan, plan.shard_range(k))
        trajectories.write_shard(k, index, plan.label(index), tokens)
    return out


@pytest.fixture(scope="module")
def single(ray_local: None, data: Path, tmp_path_factory: pytest.TempPathFactory) -> DistillConfig:
    """A finished run of one worker."""
    config = distilling(data, tmp_path_factory.mktemp("runs") / "single")
    distill(config)
    return config


def _losses(out: str) -> list[float]:
    return [line["loss"] for line in read_history(out)]


def test_a_run_leaves_a_student_that_loads_and_generates(
    single: DistillConfig, teacher: str
) -> None:
    folder = Path(single.out) / "student"
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.safetensors",
    ]
    student, model = ddray.load_student(folder), ddray.load_teacher(teacher)
    assert student.config["schedule"] == [0, 8]
    assert student.config["step"] == 12
    assert student.config["teacher"] == teacher
    assert student.config["teacher_fingerprint"] == model.fingerprint
    assert student.code_precision == 8.0
    assert student.tokenizer.fingerprint == model.tokenizer.fingerprint
    images = student.decode(student.generate([0, 1, 2], seed=1, schedule="0,8"))
    assert images.shape == (3, 1, 8, 8)


def test_every_logged_step_is_there_and_the_loss_falls(single: DistillConfig) -> None:
    history = read_history(single.out)
    assert [line["step"] for line in history] == list(range(1, 13))
    losses = [line["loss"] for line in history]
    assert sum(losses[-4:]) < sum(losses[:4])
    summary = json.loads((Path(single.out) / "summary.json").read_text())
    assert (summary["steps"], summary["rows"]) == (12, 60)
    assert summary["loss"] == losses[-1]


def test_prometheus_finds_a_trainings_step_samples_and_loss(ray_local: None) -> None:
    address = f"http://127.0.0.1:{ray.nodes()[0]['MetricsExportPort']}/metrics"
    metrics = TrainingMetrics("s3://bucket/runs/one")

    def found() -> dict[str, float]:
        with urllib.request.urlopen(address, timeout=PATIENCE_S) as answer:
            lines = answer.read().decode().splitlines()
        ours = [line for line in lines if 'run="s3://bucket/runs/one"' in line]
        return {line.partition("{")[0]: float(line.split()[-1]) for line in ours}

    # A skipped step before the log's first line, and one more.
    metrics.moved(4, 0, [])
    metrics.moved(5, 64, [{"step": 4, "loss": 2.5}, {"step": 5, "loss": 1.25}])
    wanted = {"step": 5, "samples_total": 64, "loss": 1.25}

    def told() -> bool:
        # As steps do. Ray forgets a gauge, and keeps what a counter has counted.
        metrics.moved(5, 0, [{"step": 5, "loss": 1.25}])
        return found() == {f"ray_ddray_train_{name}": value for name, value in wanted.items()}

    wait_until(told, "metric of every name")


def test_losses_and_average_are_those_of_a_plain_loop(single: DistillConfig) -> None:
    trajectories = TrajectorySet.open(single.data)
    plan = trajectories.plan
    model = ddray.load_teacher(plan.teacher, device="cpu")
    width = model.codebook.shape[1]
    stream = TrajectoryStream(
        trajectories, batch_size=single.batch_size, seed=single.seed, code_width=width
    )
    torch.manual_seed(single.seed)
    network, _ = new_student(model)
    groups = parameter_groups(network, model.codebook, single.weight_decay)
    optimizer = torch.optim.AdamW(groups, single.lr, betas=(0.9, 0.95))
    average = MovingAverage(network.parameters(), single.ema_decay)
    losses = []
    for step, batch in enumerate(islice(stream.batches(), single.steps)):
        rate = learning_rate(step, single.steps, single.lr, single.warmup, single.decay)
        set_learning_rate(optimizer, rate)
        loss = batch_loss(
            network,
            batch,
            model.stages,
            model.codebook,
            first=step,
            schedule=single.schedule,
            logits_weight=single.logits_weight,
            code_weight=single.code_weight,
        ).total
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), single.grad_clip)
        optimizer.step()
        average.update(network.parameters(), step)
        losses.append(loss.item())
    stream.close()
    # One worker and one process compute the same; only sums over a tensor may be cut elsewhere.
    assert _losses(single.out) == pytest.approx(losses, rel=1e-4)
    _, state, _ = load_folder(f"{single.out}/student")
    for (name, _), mean in zip(network.named_parameters(), average.average, strict=True):
        torch.testing.assert_close(state[name], mean, atol=1e-4, rtol=1e-3, msg=name)


@pytest.mark.chaos  # a minute of C++
@pytest.mark.parametrize("zero", [0, 2])
def test_two_workers_with_compiled_blocks_learn_what_one_learns_without(
    single: DistillConfig, data: Path, tmp_path: Path, zero: int
) -> None:
    config = distilling(data, tmp_path / "compiled", workers=2, zero=zero, compile=True)
    distill(config)
    assert _losses(config.out) == pytest.approx(_losses(single.out), rel=1e-3)


@pytest.mark.chaos
def test_two_workers_with_parted_weights_learn_what_one_learns(
    single: DistillConfig, data: Path, tmp_path: Path
) -> None:
    config = distilling(data, tmp_path / "run", workers=2, zero=3)
    distill(config)
    # Rows at t = 0 ask for 16 tokens and at t = 8 for 8; as they alternate, both halves of every
    # batch ask for as many, so the mean over workers is the mean over the batch. What is left is
    # the order of float32 sums, which 12 steps of Adam amplify.
    assert _losses(config.out) == pytest.approx(_losses(single.out), rel=2e-3)
    _, one, _ = load_folder(f"{single.out}/student")
    _, two, _ = load_folder(f"{config.out}/student")
    assert one.keys() == two.keys()
    moved = math.sqrt(sum(float((one[k] - two[k]).square().sum()) for k in one))
    size = math.sqrt(sum(float(one[k].square().sum()) for k in one))
    assert moved < 5e-3 * size
    student = ddray.load_student(f"{config.out}/student")
    assert student.generate([0, 1], seed=1).shape == (2, 16, 4)


@pytest.fixture(scope="module")
def masked(ray_local: None, data: Path, tmp_path_factory: pytest.TempPathFactory) -> DistillConfig:
    """A finished run of masked decoding."""
    config = _masking(data, tmp_path_factory.mktemp("masked") / "single")
    distill(config)
    return config


def _masking(data: Path, out: Path, **other: Any) -> DistillConfig:
    return distilling(data, out, **{"objective": "masked", "schedule": None, "lr": 1e-2, **other})


def test_masked_decoding_leaves_a_model_that_loads_and_generates(
    masked: DistillConfig, teacher: str
) -> None:
    model = load_masked(f"{masked.out}/student", device="cpu")
    assert (model.config["family"], model.config["step"]) == ("masked", 12)
    assert model.config["teacher"] == teacher
    assert model.config["teacher_fingerprint"] == ddray.load_teacher(teacher).fingerprint
    assert "schedule" not in model.config
    assert model.generate([0, 1, 2], steps=4, seed=1).shape == (3, 16)
    with pytest.raises(ConfigError, match="is of family 'masked', which is no student"):
        ddray.load_student(f"{masked.out}/student")
    losses = _losses(masked.out)
    assert sum(losses[-4:]) < sum(losses[:4])
    assert {"cross_entropy", "token_accuracy"} <= {*read_history(masked.out)[0]}


@pytest.mark.chaos
def test_masks_are_the_same_for_any_number_of_workers(
    masked: DistillConfig, data: Path, tmp_path: Path
) -> None:
    config = _masking(data, tmp_path / "run", workers=2, zero=2, accumulation=2)
    distill(config)
    assert _losses(config.out) == pytest.approx(_losses(masked.out), rel=2e-3)


def test_a_finished_run_is_not_run_again(single: DistillConfig) -> None:
    before = contents(Path(single.out), "student")
    changed = Path(single.out) / "student" / "model.safetensors"
    time = changed.stat().st_mtime_ns
    summary = distill(single)
    assert summary == json.loads((Path(single.out) / "summary.json").read_text())
    assert contents(Path(single.out), "student") == before
    assert changed.stat().st_mtime_ns == time


def test_other_settings_at_the_folder_are_refused_with_what_differs(
    single: DistillConfig,
) -> None:
    other = single.model_copy(update={"lr": 0.5, "steps": 13})
    with pytest.raises(ConfigError, match=r"other settings \(steps: 12 then, 13 now; lr: 0.004"):
        distill(other)
    # Where and how often it is written down is no other run.
    distill(single.model_copy(update={"log_every": 3, "max_failures": 0}))


def test_students_are_evaluated_beside_the_training(
    ray_local: None, data: Path, tmp_path: Path
) -> None:
    told = {"evaluate_every": 6, "evaluate_count": 20, "patience": 5}
    config = distilling(data, tmp_path / "run", **told)
    assert distill(config)["steps"] == 12
    lines = read_lines(open_storage(config.out), EVALUATIONS_FILE)
    assert [line["step"] for line in lines] == [6, 12]
    for line in lines:
        assert line["leading"] == "fd_codes"
        shown = [(row["generator"], row["images"]) for row in line["quality"]]
        assert shown == [("student, 1 step", 20), ("student, 2 steps", 20)]
    best = lines[-1 - lines[-1]["worse_in_a_row"]]["step"]
    assert ddray.load_student(f"{config.out}/student-best").config["step"] == best
    # How it is evaluated may differ from run to run.
    changed = {**told, "evaluate_every": 12, "evaluate": {"metrics": "fd_codes"}, "patience": 0}
    assert distill(distilling(data, tmp_path / "run", **changed))["steps"] == 12


@pytest.mark.parametrize(
    ("told", "refusal"),
    [
        (
            {"evaluate": {"metrics": "fid", "inception": "/nowhere.pth"}},
            "evaluate: inception=/nowhere.pth",
        ),
        (
            {"evaluate_gpus": 0.5},
            "asks for 1 workers of 1 CPUs and 0 GPUs beside one of 1 CPUs and 0.5 GPUs, but the "
            "cluster has room for 0",
        ),
        ({"evaluate_gpus": 0.5, "workers": (1, 2)}, "asks for 2 workers of .* beside one of"),
    ],
)
def test_evaluations_that_there_cannot_be_are_refused_at_the_start(
    ray_local: None, data: Path, tmp_path: Path, told: dict[str, Any], refusal: str
) -> None:
    config = distilling(data, tmp_path / "run", evaluate_every=6, evaluate_count=20, **told)
    with pytest.raises(DDRayError, match=refusal):
        distill(config)
    assert not (tmp_path / "run" / "config.json").exists()


def test_a_gpu_is_reserved_for_evaluations_where_one_is_asked_for(data: Path) -> None:
    for gpus in (0, 0.5):
        config = distilling(data, Path("run"), evaluate_every=6, evaluate_gpus=gpus)
        assert _validation(config, None).ray_remote_kwargs["num_gpus"] == gpus


@pytest.fixture(scope="module")
def restarted(
    single: DistillConfig, teacher: str, tmp_path_factory: pytest.TempPathFactory
) -> DistillConfig:
    """Two steps from a student, on a set that lacks a shard, where an earlier run has finished."""
    folder = tmp_path_factory.mktemp("restarted")
    out = folder / "run"
    for name, content in contents(Path(single.out), "student").items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_bytes(content)
    for name in ("config.json", "summary.json", "metrics.jsonl"):
        (out / name).write_bytes((Path(single.out) / name).read_bytes())
    (out / "notes.txt").write_text("mine")
    part = _write_set(teacher, folder / "set", shards=2)
    told = {"fresh": True, "allow_partial": True, "init": f"{single.out}/student"}
    config = distilling(part, out, steps=2, **told)
    assert distill(config)["steps"] == 2
    return config


def test_fresh_starts_over_and_deletes_nothing_else(restarted: DistillConfig) -> None:
    out = Path(restarted.out)
    assert [line["step"] for line in read_history(restarted.out)] == [1, 2]
    assert ddray.load_student(out / "student").config["step"] == 2
    assert (out / "notes.txt").read_text() == "mine"


def test_fresh_touches_nothing_where_anything_refuses(
    restarted: DistillConfig, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    shutil.copytree(restarted.out, out)
    shutil.copytree(out / "student", out / "checkpoints-0" / "step-2" / "student")
    before = contents(out)
    config = restarted.model_copy(update={"out": str(out)})
    refused: tuple[tuple[dict[str, Any], str], ...] = (
        ({"workers": (8, 8), "threads": 2}, "8 workers of 2 CPUs"),
        ({"use_gpu": True}, "1 GPUs"),
        ({"node_pool": "nowhere"}, "ddray.io/node-pool=nowhere"),
        ({"allow_partial": False}, "--allow-partial"),
        ({"schedule": (0, 16)}, "stages must be below 16"),
        ({"init": f"{out}/student"}, "lies in the run that --fresh replaces"),
        ({"init": f"{out}/checkpoints-0/step-2/student"}, "lies in the run that --fresh replaces"),
        ({"teacher": str(tmp_path / "none")}, "no model"),
        ({"data": str(tmp_path / "none")}, "no trajectory set"),
    )
    for other, message in refused:
        with pytest.raises(DDRayError, match=message):
            distill(config.model_copy(update=other))
        assert contents(out) == before, other
    with Lease(open_storage(str(out))), pytest.raises(StorageError, match="is in use by process"):
        distill(config)
    assert contents(out) == before


def test_a_run_can_begin_with_a_student(
    restarted: DistillConfig, single: DistillConfig, tmp_path: Path
) -> None:
    assert _losses(restarted.out)[0] < 0.95 * _losses(single.out)[0]
    other = write_teacher(tmp_path / "teacher", seed=5)
    theirs = _write_set(other, tmp_path / "set")
    with pytest.raises(ConfigError, match="init=.* was distilled from .*, not from"):
        distill(distilling(theirs, tmp_path / "other", init=f"{single.out}/student"))
    assert not (tmp_path / "other").exists()


def test_an_incomplete_set_is_refused_unless_it_is_allowed(
    restarted: DistillConfig, tmp_path: Path
) -> None:
    with pytest.raises(ShardError, match="lacks 1 of 3 shards; .*--allow-partial"):
        distill(distilling(Path(restarted.data), tmp_path / "run"))
    assert not (tmp_path / "run").exists()
    assert len(read_history(restarted.out)) == 2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_set_of_another_teacher_is_refused(teacher: str, tmp_path: Path, dtype: str) -> None:
    data, other = tmp_path / "set", write_teacher(tmp_path / "teacher", seed=5)
    model = ddray.load_teacher(teacher, device="cpu", dtype=dtype)
    TrajectorySet.create(str(data), make_plan(sampling(teacher, data, dtype=dtype), model))
    with pytest.raises(ConfigError, match="was sampled from another teacher"):
        distill(distilling(data, tmp_path / "run", teacher=other))
    assert not (tmp_path / "run").exists()
    with pytest.raises(ShardError, match="lacks 3 of 3 shards"):
        distill(distilling(data, tmp_path / "run"))


def test_a_schedule_beyond_the_stages_is_refused(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="stages must be below 16"):
        distill(distilling(data, tmp_path / "run", schedule=(0, 16)))


def test_a_damaged_shard_is_named(ray_local: None, data: Path, tmp_path: Path) -> None:
    for name, content in contents(data).items():
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "set" / name).write_bytes(content)
    shard = tmp_path / "set" / shard_name(1)
    shard.write_bytes(shard.read_bytes()[:-40])
    with pytest.raises((ShardError, TrainingError), match="shard-00001.parquet") as failure:
        distill(distilling(tmp_path / "set", tmp_path / "run", max_failures=0))
    assert "\n" not in str(failure.value)


def test_a_loss_that_is_not_finite_ends_the_run_in_one_line(
    ray_local: None, data: Path, tmp_path: Path
) -> None:
    limits = {"max_bad_steps": 2, "max_failures": 0}
    config = distilling(data, tmp_path / "run", lr=1e30, steps=40, **limits)
    with pytest.raises(
        TrainingError, match=r"\(here nan\) in 3 steps in a row, .*; lower lr \(now 1e\+30\)"
    ) as end:
        distill(config)
    assert "\n" not in str(end.value)
    named = sorted((tmp_path / "run" / "bad-steps").iterdir())
    assert len(named) == 3
    rows = json.loads(named[0].read_text())
    assert len({*rows["index"]}) == len(rows["index"]) == config.batch_size
    # A checkpoint of weights that may be what is wrong is not made.
    assert not list((tmp_path / "run").glob("checkpoints-*/step-*"))


def test_a_teacher_of_scales_is_distilled_like_one_of_tokens(
    ray_local: None, tmp_path: Path
) -> None:
    config = {"family": "var", **VAR_SIZES}
    save_folder(
        tmp_path / "teacher",
        config,
        model=random_state(empty_network(config)),
        tokenizer=random_state(empty_tokenizer(config), 1),
    )
    data = _write_set(str(tmp_path / "teacher"), tmp_path / "set")
    run = distilling(data, tmp_path / "run", schedule=None, steps=4, checkpoint_every=4)
    summary = distill(run)
    assert summary["loss"] < 10
    student = ddray.load_student(summary["student"], device="cpu")
    assert student.config["family"] == "var-dd"
    assert student.code_precision == 0.0
    assert student.config["schedule"] == [0, 1]
    assert student.stages == (1, 4, 9)
    assert student.decode(student.generate([0, 1], schedule="0,1")).isfinite().all()
