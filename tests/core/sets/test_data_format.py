"""docs/data-format.md is enough to read a set: its code does, where ddray cannot be imported."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np

import ddray
from ddray.sets.sharded_set import shard_name
from ddray.sets.trajectories.trajectory_set import TrajectorySet
from tests.core.sets.trajectories.test_trajectory_set import fill, plan_of, rewrite, tokens_of

PAGE = Path(ddray.__file__).parents[1] / "docs" / "data-format.md"

BLOCK_DDRAY = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("ddray", "torch", "pandas"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocker())
"""

# Reads the sets that it is told in turn, and says what it has read, or why it has not.
STORE = """
import json, traceback

for folder, out in json.loads(sys.argv[1]):
    try:
        plan, index, second, tokens = read_set(folder)
    except Exception as error:
        print(json.dumps(traceback.format_exc()))
    else:
        np.savez(out, index=index, second=second.astype(str), tokens=tokens)
        print(json.dumps(None))
assert "ddray" not in sys.modules
"""


def _read(folders: list[str], tmp_path: Path) -> list[dict[str, np.ndarray] | str]:
    """Run the page's code in another process: what it has read of each, or its traceback."""
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    script = tmp_path / "read.py"
    script.write_text(BLOCK_DDRAY + code + STORE)
    outs = [str(tmp_path / f"{k}.npz") for k in range(len(folders))]
    done = subprocess.run(
        [sys.executable, str(script), json.dumps([*zip(folders, outs, strict=True)])],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    said = [json.loads(line) for line in done.stdout.splitlines()]
    return [refusal or dict(np.load(out)) for refusal, out in zip(said, outs, strict=True)]


def test_the_page_reads_every_row(tmp_path: Path) -> None:
    plans = {
        "uint16": plan_of(),
        "uint32": plan_of(vocab_size=70_000, cfg=None),
        "captions": plan_of(conditioning="text", num_classes=0),
    }
    index, captions = range(25), [f"Nº {i}: “grün”, \\ \n" for i in range(25)]
    for name, plan in plans.items():
        trajectories = TrajectorySet.create(str(tmp_path / name), plan)
        for k in range(3):
            rows = plan.shard_range(k)
            is_text = plan.conditioning == "text"
            second = captions[rows.start : rows.stop] if is_text else plan.label(rows)
            trajectories.write_shard(k, rows, second, tokens_of(plan, rows))
    every = _read([str(tmp_path / name) for name in plans], tmp_path)
    for read, plan in zip(every, plans.values(), strict=True):
        assert isinstance(read, dict), read
        np.testing.assert_array_equal(read["index"], index)
        expected = captions if plan.conditioning == "text" else plan.label(index).astype(str)
        np.testing.assert_array_equal(read["second"], expected)
        np.testing.assert_array_equal(read["tokens"], tokens_of(plan, index))
        assert read["tokens"].dtype == plan.token_dtype


def test_the_page_notices_what_is_wrong(tmp_path: Path) -> None:
    def made(name: str, seed: int = 7) -> TrajectorySet:
        trajectories = TrajectorySet.create(str(tmp_path / name), plan_of(seed=seed))
        fill(trajectories)
        return trajectories

    other = made("other", seed=8)
    extended, altered, foreign, absent = (made(f"set{k}") for k in range(4))
    TrajectorySet.create(extended.uri, plan_of(count=30))
    rewrite(tmp_path / "set1" / shard_name(1), altered.read_shard(1)[2] ^ 1)
    foreign.storage.write(shard_name(1), other.storage.read(shard_name(1)))
    absent.storage.delete(shard_name(1))
    told = (
        "assert index.tolist() == list(range(start, stop))",
        'assert metadata[b"ddray.rows_sha256"]',
        'assert metadata[b"ddray.plan_hash"]',
        "FileNotFoundError",
    )
    sets = (extended, altered, foreign, absent)
    for refusal, reason in zip(_read([each.uri for each in sets], tmp_path), told, strict=True):
        assert isinstance(refusal, str) and reason in refusal
