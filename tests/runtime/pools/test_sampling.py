"""Trajectory sets made by a pool of actors on a real Ray, from a tiny teacher."""

import dataclasses
import json
import shutil
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch

import ddray
from ddray.config.base import PoolConfig
from ddray.errors import ClusterError, ConfigError, DDRayError, ShardError, StorageError
from ddray.runtime.cluster.capacity import require
from ddray.runtime.pools.device import SHARDS_AT_ONCE
from ddray.runtime.pools.pool import Crew, _explain, fill
from ddray.runtime.pools.repair import repair
from ddray.runtime.pools.sampling import TrajectoryWorker, sample
from ddray.sets.makers import maker_on
from ddray.sets.sharded_set import shard_name
from ddray.sets.trajectories.making import make_plan, sample_rows
from ddray.sets.trajectories.recompute import recompute
from ddray.sets.trajectories.trajectory_set import TrajectorySet
from ddray.storage.checkpoint import load_folder, save_folder
from tests.patience import PATIENCE_S, wait_until
from tests.runtime.tiny import contents, sampling, write_teacher

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def whole(
    ray_local: None, teacher: str, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict]:
    """A set of three shards by two actors, the last shard short, and the job's summary."""
    out = tmp_path_factory.mktemp("sets") / "whole"
    return out, sample(sampling(teacher, out, count=50, workers=(2, 2)))


@pytest.fixture
def copy(whole: tuple[Path, dict], tmp_path: Path) -> Path:
    """A copy of that set, to be damaged."""
    return Path(shutil.copytree(whole[0], tmp_path / "set"))


def test_a_finished_set_is_complete_and_verifies(whole: tuple[Path, dict]) -> None:
    out, summary = whole
    trajectories = TrajectorySet.open(str(out))
    assert trajectories.verify().ok
    index, label, tokens = trajectories.rows(0, 50)
    assert index.tolist() == list(range(50))
    assert label.tolist() == [i % 10 for i in range(50)]
    assert tokens.shape == (50, 16)
    assert len({row.tobytes() for row in tokens}) > 40  # the noise decides, not the class alone
    assert (summary["rows"], summary["rows_made"], summary["shards_made"]) == (50, 50, 3)
    assert summary["plan_hash"] == trajectories.plan.hash


def test_events_and_summary_say_who_did_what_and_how_busy_they_were(
    whole: tuple[Path, dict],
) -> None:
    out, summary = whole
    events = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
    assert [event["event"] for event in events] == ["started", *3 * ["shard"], "finished"]
    assert (events[0]["found"], events[0]["missing"], events[0]["workers"]) == (0, 3, [2, 2])
    made = events[1:-1]
    assert sorted(event["shard"] for event in made) == [0, 1, 2]
    assert {event["rows"] for event in made} == {20, 10}
    # Shards of an actor overlap.
    assert 0 < summary["actor_seconds"] <= sum(e["seconds"] for e in made) + 0.02
    assert 0 < summary["busy_share"] <= 1
    assert (summary["gpu_seconds"], summary["retries"]) == (0, 0)
    # A line now and then; on a slow machine more than the one at the end.
    *_, last = (json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines())
    assert (last["rows"], last["actors"], last["retries"]) == (
        50,
        len({event["actor"] for event in made}),
        0,
    )
    assert json.loads((out / "config.json").read_text())["count"] == 50


def test_prometheus_finds_the_actors_rows_and_shard_times(whole: tuple[Path, dict]) -> None:
    address = f"http://127.0.0.1:{ray.nodes()[0]['MetricsExportPort']}/metrics"

    def lines(name: str) -> list[str]:
        with urllib.request.urlopen(address, timeout=PATIENCE_S) as answer:
            text = answer.read().decode().splitlines()
        return [line for line in text if line.startswith(name) and 'what="trajectories"' in line]

    def rows() -> float:
        return sum(float(line.split()[-1]) for line in lines("ray_ddray_rows_total{"))

    wait_until(lambda: rows() >= 50, "total of all rows")
    assert lines("ray_ddray_shard_seconds_count{")


def test_tokens_are_those_of_a_plain_loop_in_one_process(
    whole: tuple[Path, dict], teacher: str
) -> None:
    trajectories = TrajectorySet.open(str(whole[0]))
    plan = trajectories.plan
    model = ddray.load_teacher(teacher, device="cpu")
    threads = torch.get_num_threads()
    torch.set_num_threads(plan.threads)
    try:
        for k in range(plan.num_shards):
            expected = np.concatenate([sample_rows(model, plan, b) for b in plan.batches(k)])
            np.testing.assert_array_equal(trajectories.read_shard(k)[2], expected)
    finally:
        torch.set_num_threads(threads)


def test_while_a_shard_is_written_the_next_one_is_sampled(
    whole: tuple[Path, dict], teacher: str, tmp_path: Path
) -> None:
    log = tmp_path / "log"

    class Held(TrajectoryWorker):
        """Two shards must meet where they are written, before either is."""

        def __init__(self, uri: str, device: str):
            super().__init__(uri, device)
            there, write, make = threading.Barrier(2), self._set.write_shard, self._device.batches

            def held(shard: int, *rows: Any) -> None:
                there.wait(PATIENCE_S)
                tell(f"written {shard}")
                write(shard, *rows)

            def told(work: Any, orders: list[range]) -> Any:
                def noted(order: range) -> Any:
                    tell(f"sampled {order.start // 20}")
                    return work(order)

                return make(noted, orders)

            def tell(line: str) -> None:
                with log.open("a") as lines:
                    lines.write(f"{line}\n")

            self._set.write_shard, self._device.batches = held, told

    config = sampling(teacher, tmp_path / "set", count=40)
    plan = make_plan(config, ddray.load_teacher(teacher, device="cpu"))
    trajectories = TrajectorySet.create(config.out, plan)
    crew = Crew(Held, {"device": "cpu"}, config.threads, shards_at_once=SHARDS_AT_ONCE)
    filled = fill("trajectories", trajectories, crew, config)
    told = log.read_text().split("\n")[:-1]
    # One shard at a time is on the device, and both are made before one is written.
    assert (told[0:3], told[3:6]) == (3 * [told[0]], 3 * [told[3]])
    assert {told[0], told[3]} == {"sampled 0", "sampled 1"}
    assert sorted(told[6:]) == ["written 0", "written 1"]
    assert (filled.shards, filled.retries) == (2, 0)
    for k in (0, 1):
        name = shard_name(k)
        shards = [TrajectorySet.open(str(out)).read_shard(k) for out in (whole[0], config.out)]
        for there, here in zip(*shards, strict=True):
            np.testing.assert_array_equal(there, here, name)


def test_a_write_that_fails_ends_the_run_with_its_error(teacher: str, tmp_path: Path) -> None:
    class Refused(TrajectoryWorker):
        def __init__(self, uri: str, device: str):
            super().__init__(uri, device)

            def refuse(shard: int, *rows: Any) -> None:
                raise StorageError("the disk is full")

            self._set.write_shard = refuse

    config = sampling(teacher, tmp_path / "set", count=60)
    plan = make_plan(config, ddray.load_teacher(teacher, device="cpu"))
    trajectories = TrajectorySet.create(config.out, plan)
    crew = Crew(Refused, {"device": "cpu"}, config.threads, shards_at_once=SHARDS_AT_ONCE)
    with pytest.raises(StorageError, match="^the disk is full$"):
        fill("trajectories", trajectories, crew, config)
    assert trajectories.missing() == [0, 1, 2]


def test_a_rerun_makes_nothing(
    whole: tuple[Path, dict], teacher: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(whole[0], "shards")
    summary = sample(sampling(teacher, whole[0], count=50, workers=(2, 2)))
    assert (summary["shards_made"], summary["rows_made"]) == (0, 0)
    assert summary["devices"] == ["cpu"]
    found = "found 3 of 3 shards (50 of 50 rows); nothing to make\n"
    assert capsys.readouterr().err == found
    assert contents(whole[0], "shards") == before


def test_two_deleted_shards_come_back_byte_for_byte(
    whole: tuple[Path, dict], copy: Path, teacher: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for k in (0, 2):
        (copy / shard_name(k)).unlink()
    assert sample(sampling(teacher, copy, count=50))["shards_made"] == 2
    assert contents(copy, "shards") == contents(whole[0], "shards")
    found = capsys.readouterr().err.splitlines()[0]
    assert found == "found 1 of 3 shards (20 of 50 rows); 2 to make"


def test_repair_moves_what_is_bad_aside_and_refills_byte_for_byte(
    whole: tuple[Path, dict], copy: Path
) -> None:
    whole_shard = (copy / shard_name(1)).read_bytes()
    (copy / shard_name(0)).unlink()
    (copy / shard_name(1)).write_bytes(whole_shard[:-9])
    (copy / "shards" / "copy.parquet").write_bytes(whole_shard)
    assert repair(str(copy), PoolConfig(workers=(1, 1), threads=7)) == [
        "shards/shard-00001.parquet moved to quarantine/shard-00001.parquet.bad",
        "shards/copy.parquet moved to quarantine/copy.parquet.bad",
        "refilled 2 shards (40 rows)",
    ]
    assert contents(copy, "shards") == contents(whole[0], "shards")
    assert (copy / "quarantine" / "copy.parquet.bad").read_bytes() == whole_shard
    assert repair(str(copy), PoolConfig()) == ["nothing to mend"]


def test_a_repair_that_is_refused_moves_nothing(copy: Path) -> None:
    (copy / shard_name(1)).write_bytes((copy / shard_name(1)).read_bytes()[:-9])
    before = contents(copy)
    refused: tuple[dict[str, Any], ...] = ({"num_gpus": 1}, {"node_pool": "nowhere"})
    for other in refused:
        with pytest.raises(ClusterError, match="repair asks for"):
            repair(str(copy), PoolConfig(**{"workers": (1, 1), **other}))
        assert contents(copy) == before


def test_a_recomputation_finds_the_rows_as_the_actors_wrote_them(
    whole: tuple[Path, dict],
) -> None:
    outcome = recompute(str(whole[0]), 50)
    name = outcome.here.device
    assert outcome.lines() == [
        f"recomputed 50 rows (8 batches) on {name}: all as written (made on {name})"
    ]


def test_a_summary_names_what_made_the_bits_and_another_model_is_judged_by_most_of_them(
    whole: tuple[Path, dict], copy: Path, teacher: str
) -> None:
    here = maker_on(torch.device("cpu"))
    written = json.loads((copy / "summary.json").read_text())
    assert written["made_by"] == whole[1]["made_by"] == [dataclasses.asdict(here)]
    assert (written["devices"], here.torch) == (["cpu"], torch.__version__)
    events = [json.loads(line) for line in (copy / "events.jsonl").read_text().splitlines()]
    assert {e["device"] for e in events if e["event"] == "shard"} == {here.device}
    written["made_by"][0]["device"] = "NVIDIA H100 80GB HBM3"
    (copy / "summary.json").write_text(json.dumps(written))
    # One token of one row, as another GPU may round it.
    trajectories = TrajectorySet.open(str(copy))
    index, label, tokens = trajectories.read_shard(0)
    tokens = tokens.copy()
    tokens[3, 15] ^= 1
    trajectories.write_shard(0, index, label, tokens)
    outcome = recompute(str(copy), 50)
    assert outcome.ok and not outcome.comparable and outcome.parted == {15: 1}
    # A run that goes on adds its own to those that are known, before it is done.
    (copy / shard_name(2)).unlink()
    summary = sample(sampling(teacher, copy, count=50))
    devices = [maker["device"] for maker in summary["made_by"]]
    assert sorted(devices) == sorted(["NVIDIA H100 80GB HBM3", here.device])


def test_an_extension_leaves_full_shards_alone(
    whole: tuple[Path, dict], copy: Path, teacher: str
) -> None:
    old = {name: (copy / name).stat().st_mtime_ns for name in map(shard_name, (0, 1))}
    summary = sample(sampling(teacher, copy, count=70))
    trajectories = TrajectorySet.open(str(copy))
    assert trajectories.verify().ok
    # The third shard was short, the fourth is new.
    assert (summary["shards_made"], trajectories.plan.count) == (2, 70)
    assert old == {name: (copy / name).stat().st_mtime_ns for name in old}
    for here, there in zip(
        trajectories.rows(0, 48), TrajectorySet.open(str(whole[0])).rows(0, 48), strict=True
    ):
        np.testing.assert_array_equal(here, there)


def test_another_plan_at_the_uri_is_refused_with_what_differs(
    whole: tuple[Path, dict], teacher: str
) -> None:
    before = contents(whole[0])
    with pytest.raises(ConfigError, match="another plan: seed is 0 there and 9 here; top_k is 0"):
        sample(sampling(teacher, whole[0], count=50, seed=9, top_k=5))
    with pytest.raises(ConfigError, match="count=20 is below the 50 rows"):
        sample(sampling(teacher, whole[0], count=20))
    assert contents(whole[0]) == before


def test_a_teacher_of_the_same_name_and_other_weights_is_refused(
    whole: tuple[Path, dict], copy: Path, tmp_path: Path, teacher: str
) -> None:
    config, model, tokenizer = load_folder(teacher)
    folder = tmp_path / "teacher"
    save_folder(folder, config, model=model, tokenizer=tokenizer)
    out = tmp_path / "set-of-it"
    sample(sampling(str(folder), out, count=20))
    changed = {name: tensor + 0.01 for name, tensor in model.items()}
    save_folder(folder, config, model=changed, tokenizer=tokenizer)
    with pytest.raises(ConfigError, match="another plan: teacher_fingerprint is"):
        sample(sampling(str(folder), out, count=40))


def test_a_worker_whose_teacher_has_other_weights_fails_the_run(
    ray_local: None, tmp_path: Path
) -> None:
    folder = write_teacher(tmp_path / "teacher")
    plan = make_plan(sampling(folder, tmp_path / "set"), ddray.load_teacher(folder, device="cpu"))
    TrajectorySet.create(str(tmp_path / "set"), plan)
    write_teacher(tmp_path / "teacher", seed=5)
    with pytest.raises(ShardError, match="has another network here"):
        TrajectoryWorker(str(tmp_path / "set"), "cpu")


def test_an_out_that_cannot_be_written_is_refused_before_ray_starts(
    tmp_path: Path, teacher: str
) -> None:
    (tmp_path / "file").write_text("in the way")
    was_running = ray.is_initialized()
    with pytest.raises(StorageError, match="not a directory"):
        sample(sampling(teacher, tmp_path / "file" / "set"))
    assert ray.is_initialized() == was_running


def test_more_than_the_cluster_has_is_refused_in_one_line(
    ray_local: None, teacher: str, tmp_path: Path
) -> None:
    with pytest.raises(
        ClusterError, match="2 workers of 1 CPUs and 1 GPUs, but .* 0 GPUs"
    ) as refusal:
        sample(sampling(teacher, tmp_path / "a", num_gpus=1, workers=(2, 3)))
    assert "\n" not in str(refusal.value)
    with pytest.raises(ClusterError, match="1 workers of 64 CPUs .* has room for 0"):
        sample(sampling(teacher, tmp_path / "b", threads=64))
    started = time.monotonic()
    with pytest.raises(ClusterError, match="1 workers of 1 CPUs and 1 GPUs"):
        sample(sampling(teacher, tmp_path / "c", num_gpus=1, wait_s=3))
    assert time.monotonic() - started >= 3


def test_what_another_run_makes_meanwhile_is_no_error(
    ray_local: None, copy: Path, teacher: str
) -> None:
    trajectories = TrajectorySet.open(str(copy))
    shard = copy / shard_name(1)
    content = shard.read_bytes()
    shard.unlink()
    config = sampling(teacher, copy, count=50)
    # As an actor does that a killed driver has left behind.
    filled = fill(
        "trajectories",
        trajectories,
        Crew(TrajectoryWorker, {"device": "cpu"}, config.threads),
        config,
        lambda: None if shard.write_bytes(content) else None,
    )
    assert (filled.shards, filled.rows, filled.actor_s) == (1, 20, 0)


def test_a_worker_has_to_fit_on_one_node(ray_local: None) -> None:
    require("this", 4, 1, 0)
    with pytest.raises(ClusterError, match="asks for 3 workers of 2 CPUs .* has room for 2"):
        require("this", 3, 2, 0)


def test_a_process_of_another_size_has_to_fit_beside_the_workers(ray_local: None) -> None:
    require("this", 3, 1, 0, beside=(1, 0))
    require("this", 1, 3, 0, beside=(1, 0))
    with pytest.raises(ClusterError, match="beside one of 1 CPUs and 0 GPUs, .* has room for 1"):
        require("this", 2, 2, 0, beside=(1, 0))
    with pytest.raises(ClusterError, match="beside one of 1 CPUs and 0.5 GPUs, .* room for 0"):
        require("this", 1, 1, 0, beside=(1, 0.5))


@pytest.mark.parametrize(
    ("raised", "kind"),
    [
        ("ddray.errors.ShardError", ShardError),
        ("ddray.storage.base.NotFoundError", DDRayError),
    ],
)
def test_an_error_of_ours_is_known_in_what_an_actor_has_raised(raised: str, kind: type) -> None:
    told = f"ray::MapWorker() (pid=1)\n  File x, line 1\n{raised}: shard 3 is gone"
    found = _explain(RuntimeError(told), PoolConfig())
    assert (type(found), str(found)) == (kind, "shard 3 is gone")
