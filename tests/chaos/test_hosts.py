"""A cluster of hosts with addresses of their own, of which one is cut off."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

import ddray
from ddray.sets.trajectories.trajectory_set import TrajectorySet
from tests.chaos.job import events, write_set
from tests.chaos.network import Network, ray_network, running, until
from tests.patience import PATIENCE_S

pytestmark = pytest.mark.chaos


@pytest.fixture
def network() -> Iterator[Network]:
    """A head without CPUs, and two hosts of one each."""
    with ray_network() as network:
        # One after the other: on one machine they choose their sockets by what is taken.
        for number, host in enumerate(network.hosts[1:], 2):
            network.add_node(host)
            network.until_nodes(number)
        yield network


def test_sampling_runs_across_hosts_and_survives_one_that_is_cut_off(
    network: Network, teacher: str, tmp_path: Path
) -> None:
    out = tmp_path / "set"
    sizes = ("--count", "160", "--shard-rows", "8", "--batch-size", "8", "--num-evals", "2400")
    where = ("--teacher", teacher, "--out", str(out), "--workers", "2", "--wait-s", "60")
    with running(network, "sample", *where, *sizes) as job:
        shards = out / "shards"
        until(job, lambda: len(list(shards.glob("*.parquet"))) >= 6)
        network.hosts[2].cut_off()
        stdout, stderr = job.communicate(timeout=PATIENCE_S)
    assert job.returncode == 0, stderr
    assert json.loads(stdout)["rows"] == 160
    assert TrajectorySet.open(str(out)).verify().ok
    addresses = {event["node"] for event in events(out, "shard")}
    assert addresses == {host.address for host in network.hosts[1:]}


def test_training_runs_across_hosts_and_goes_on_without_one_that_is_cut_off(
    network: Network, teacher: str, tmp_path: Path
) -> None:
    data, out = write_set(teacher, tmp_path / "set"), tmp_path / "run"
    where = ("--data", str(data), "--out", str(out), "--workers", "1:2", "--wait-s", "60")
    sizes = ("--batch-size", "64", "--threads", "1", "--schedule", "0,8", "--log-every", "1")
    often = ("--steps", "400", "--checkpoint-every", "25", "--step-timeout-s", "20")
    with running(network, "distill", *where, *sizes, *often) as job:
        until(job, lambda: len(list(out.glob("checkpoints-*/checkpoint_*"))) >= 1)
        network.hosts[2].cut_off()
        stdout, stderr = job.communicate(timeout=PATIENCE_S)
    assert job.returncode == 0, stderr
    lines = (out / "metrics.jsonl").read_text().splitlines()
    assert sorted({json.loads(line)["step"] for line in lines}) == list(range(1, 401))
    # It began with two workers, and went on from a checkpoint with one.
    (resumed,) = events(out, "resumed")
    assert resumed["step"] >= 25


def _mounting(*arguments: object) -> list[str]:
    """What stands before a command that is to see a disk of its own somewhere."""
    mount = " ".join(map(str, arguments))
    return ["unshare", "--mount", "sh", "-c", f'mount {mount} && exec "$@"', "sh"]


def test_what_only_the_head_has_is_named_before_any_work(teacher: str, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    shutil.copytree(teacher, mine / "teacher")
    package, older = Path(ddray.__file__).parent, tmp_path / "older"
    shutil.copytree(package, older)
    init = older / "__init__.py"
    init.write_text(init.read_text().replace(ddray.__version__, "0.0.9"))
    with ray_network() as network:
        node = network.hosts[1]
        network.add_node(node, *_mounting("-t", "tmpfs", "tmpfs", mine))
        another = f"node {node.address}: {mine}/set is another folder there than on the driver's"
        for model, out, message in (
            (teacher, mine / "set", another),
            (mine / "teacher", tmp_path / "a", f"cannot read {mine}/teacher: no model"),
        ):
            flags = ("--teacher", str(model), "--out", str(out), "--wait-s", "60")
            with running(network, "sample", *flags) as job:
                _, stderr = job.communicate(timeout=PATIENCE_S)
            assert job.returncode == 1, stderr
            assert message in stderr
            assert "Traceback" not in stderr
        other = network.hosts[2]
        network.add_node(other, *_mounting("--bind", older, package))
        wait = ("--wait-s", "60", "--workers", "2", "--out", str(tmp_path / "b"))
        with running(network, "sample", "--teacher", teacher, *wait) as job:
            _, stderr = job.communicate(timeout=PATIENCE_S)
        assert f"node {other.address}: ddray is 0.0.9 there and {ddray.__version__} here" in stderr
        with running(network, "doctor", "--uri", str(mine)) as job:
            stdout, _ = job.communicate(timeout=PATIENCE_S)
        assert job.returncode == 1
        assert f"{mine} is another folder there" in stdout
        assert "ddray is 0.0.9 there" in stdout
