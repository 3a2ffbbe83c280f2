"""What an earlier ddray began goes on: a set with a gap, a run with a checkpoint.

tests/golden/begun/047246d.tar.xz was written by that commit, before packages and nested keys.
"""

import json
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from ddray.config.distillation import DistillConfig
from ddray.config.sampling import SampleConfig
from ddray.errors import ConfigError
from ddray.models.zoo import load_student
from ddray.runtime.pools.sampling import sample
from ddray.runtime.training.driver import distill
from ddray.sets.inspection import verify
from tests.paths import GOLDEN
from tests.runtime.tiny import contents

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_local")]

# Plans and lists of checkpoints name files by their whole path, hence the one at which it was made.
HOME = Path("/tmp/ddray-begun")
BEGUN_AT = 18


@pytest.fixture(scope="module")
def begun() -> Iterator[Path]:
    shutil.rmtree(HOME, ignore_errors=True)
    with tarfile.open(GOLDEN / "begun" / "047246d.tar.xz") as archive:
        archive.extractall(HOME, filter="data")
    yield HOME
    shutil.rmtree(HOME)


def sampling(home: Path) -> SampleConfig:
    sizes = {"count": 60, "shard_rows": 20, "batch_size": 8, "num_evals": 6}
    return SampleConfig(teacher=str(home / "teacher"), out=str(home / "set"), workers=1, **sizes)


def distilling(home: Path, **other: object) -> DistillConfig:
    rates = {"steps": 300, "batch_size": 8, "schedule": "0,8", "ema_decay": 0.9, "seed": 3}
    notes = {"checkpoint_every": 200, "log_every": 1, "threads": 1}
    places = {"data": str(home / "set"), "out": str(home / "run")}
    score = {"score": {"weight": 0.5, "start": 2}}
    return DistillConfig(**{**places, **rates, **notes, **score, **other})


def test_a_gap_in_a_set_is_filled_with_the_same_bytes(begun):
    shards = contents(begun / "set", "shards")
    (begun / "set" / "shards" / "shard-00002.parquet").unlink()
    made = sample(sampling(begun))
    assert (made["shards_made"], verify(str(begun / "set"))) == (1, [])
    assert contents(begun / "set", "shards") == shards


@pytest.mark.chaos
def test_a_run_goes_on_from_its_checkpoint(begun):
    before = (begun / "run" / "metrics.jsonl").read_text().splitlines()
    identity = json.loads((begun / "run" / "config.json").read_text())["identity"]
    with pytest.raises(ConfigError, match=r"settings \(score.weight: 0.5 then, 0.25 now\)"):
        distill(distilling(begun, score={"weight": 0.25, "start": 2}))
    assert distill(distilling(begun))["steps"] == 300
    after = (begun / "run" / "metrics.jsonl").read_text().splitlines()
    assert (len(before), len(after)) == (BEGUN_AT, 300)
    assert after[:BEGUN_AT] == before
    assert json.loads((begun / "run" / "config.json").read_text())["identity"] == identity
    assert load_student(str(begun / "run" / "student")).config["step"] == 300
