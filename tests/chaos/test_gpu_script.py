"""The script of `make gpu` in its tiny form: every part runs, and leaves its results."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.paths import ROOT
from tests.patience import PATIENCE_S

pytestmark = [pytest.mark.chaos, pytest.mark.smoke]


def test_every_part_runs_on_a_cpu(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--tiny", "--out", tmp_path]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=4 * PATIENCE_S
    )
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads((tmp_path / "gpu-cpu.json").read_text())
    assert {part["ended"] for part in results.values()} == {"well"}
    found = {name: part["found"] for name, part in results.items()}
    assert list(found) == ["stack", "right", "bits", "transport", "step", "models", "profile"]
    assert found["right"]["failed"] == [] and found["transport"][0]["agreement"] == 1
    assert found["step"]["eager"]["rows_per_s"] > 0
    assert {row["what"] for row in found["models"]["digits-var"]["rows"]} >= {"AR", "decode"}
    assert "| student, 1 step |" in (tmp_path / "gpu-cpu.md").read_text()
