"""jobs/pipeline.py without a Ray."""

import subprocess
import sys

import pytest

from tests.paths import ROOT


@pytest.mark.slow
def test_a_dry_run_tells_what_training_takes_before_there_is_a_set(tmp_path):
    configs = {
        "sample": f"out: {tmp_path}/set\ncount: 200\n",
        "distill": f"data: {tmp_path}/set\nout: {tmp_path}/run\nsteps: 30\n",
        "all": "sample: sample.yaml\ndistill: distill.yaml\n",
    }
    for name, text in configs.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    command = [sys.executable, ROOT / "jobs" / "pipeline.py", "--dry-run"]
    done = subprocess.run(
        [*command, "--config", tmp_path / "all.yaml"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "# shards:" in done.stdout and "# exaflops:" in done.stdout
    assert "unknown" not in done.stdout
    assert not (tmp_path / "set").exists()
