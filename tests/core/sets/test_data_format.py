"""docs/data-format.md is enough to read a set: its code does, where ddray cannot be imported."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

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

STORE = """
plan, index, second, tokens = read_set(sys.argv[1])
assert "ddray" not in sys.modules
np.savez(sys.argv[2], index=index, second=second.astype(str), tokens=tokens)
"""


def _read(folder: str, out: Path) -> subprocess.CompletedProcess[str]:
    """Run the page's code in another process, and leave what it has read in `out`."""
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    script = out.with_name("read.py")
    script.write_text(BLOCK_DDRAY + code + STORE)
    return subprocess.run(
        [sys.executable, str(script), folder, str(out)],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=out.parent,
        check=False,
    )


@pytest.mark.parametrize(
    "changes",
    [{}, {"vocab_size": 70_000, "cfg": None}, {"conditioning": "text", "num_classes": 0}],
    ids=["uint16", "uint32", "captions"],
)
def test_the_page_reads_every_row(changes: dict[str, Any], tmp_path: Path) -> None:
    plan = plan_of(**changes)
    trajectories = TrajectorySet.create(str(tmp_path / "set"), plan)
    index, captions = range(25), [f"Nº {i}: “grün”, \\ \n" for i in range(25)]
    is_text = plan.conditioning == "text"
    for k in range(3):
        rows = plan.shard_range(k)
        second = captions[rows.start : rows.stop] if is_text else plan.label(rows)
        trajectories.write_shard(k, rows, second, tokens_of(plan, rows))
    done = _read(trajectories.uri, tmp_path / "rows.npz")
    assert done.returncode == 0, done.stderr
    with np.load(tmp_path / "rows.npz") as read:
        np.testing.assert_array_equal(read["index"], index)
        expected = captions if is_text else plan.label(index).astype(str)
        np.testing.assert_array_equal(read["second"], expected)
        np.testing.assert_array_equal(read["tokens"], tokens_of(plan, index))
        assert read["tokens"].dtype == plan.token_dtype


def test_the_page_notices_what_is_wrong(tmp_path: Path) -> None:
    trajectories = TrajectorySet.create(str(tmp_path / "set"), plan_of())
    fill(trajectories)
    other = TrajectorySet.create(str(tmp_path / "other"), plan_of(seed=8))
    fill(other)

    def refusal() -> str:
        return _read(trajectories.uri, tmp_path / "rows.npz").stderr

    TrajectorySet.create(trajectories.uri, plan_of(count=30))
    assert "assert index.tolist() == list(range(start, stop))" in refusal()
    rewrite(tmp_path / "set" / shard_name(1), trajectories.read_shard(1)[2] ^ 1)
    assert 'assert metadata[b"ddray.rows_sha256"]' in refusal()
    trajectories.storage.write(shard_name(1), other.storage.read(shard_name(1)))
    assert 'assert metadata[b"ddray.plan_hash"]' in refusal()
    trajectories.storage.delete(shard_name(1))
    assert "FileNotFoundError" in refusal()
