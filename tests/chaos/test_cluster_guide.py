"""The laptop's part of docs/cluster.md, as a newcomer would type it."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

import ddray
from ddray.sets.images.image_set import ImageSet
from ddray.sets.trajectories.trajectory_set import TrajectorySet
from tests.chaos.ray_head import BIN, ROOT, ray_head
from tests.loopback import free_port
from tests.patience import PATIENCE_S

pytestmark = pytest.mark.chaos

_OUT = "/tmp/ddray"


def _blocks() -> list[list[str]]:
    text = (ROOT / "docs" / "cluster.md").read_text()
    part = text.partition("## On a laptop")[2].partition("\n## ")[0]
    return [block.splitlines() for block in re.findall(r"```console\n(.*?)```", part, re.DOTALL)]


def test_from_a_head_to_a_served_student_by_submitted_jobs_alone(tmp_path: Path) -> None:
    (*_, head), jobs, asking = _blocks()
    assert head == "ray start --head --block --num-cpus=4 --dashboard-host=127.0.0.1"
    # Others may use this machine: another port, another folder, a token of its own.
    shutil.copytree(ROOT / "jobs", tmp_path / "jobs", ignore=shutil.ignore_patterns("__pycache__"))
    out, port = tmp_path / "ddray", str(free_port())
    for config in (tmp_path / "jobs" / "configs").glob("digits-*.yaml"):
        config.write_text(config.read_text().replace(_OUT, str(out)))
    script = "\n".join([*jobs, *asking]).replace(_OUT, str(out)).replace("8000", port)
    with ray_head(num_cpus=4) as running:
        script = script.replace("http://127.0.0.1:8265", running.dashboard)
        script = script.replace("source .venv/bin/activate", f'export PATH="{BIN}:$PATH"')
        done = subprocess.run(
            ["bash", "-exc", script],
            env={**running.environment, "RAY_ADDRESS": ""},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=3 * PATIENCE_S,  # of half a dozen jobs
            check=False,
        )
        printed = done.stdout + done.stderr
        assert done.returncode == 0, printed
        assert running.status("digits") == "STOPPED"
        unpacked = running.folder.glob("session_latest/runtime_resources/working_dir_files/*/**/*")
        assert 1e3 < sum(file.stat().st_size for file in unpacked) < 1e6
    assert "all is well" in printed
    assert len(re.findall(r"Job '\w+' succeeded", printed)) == 5
    assert f"ddray {ddray.__version__} from " in printed
    assert TrajectorySet.open(f"{out}/digits/trajectories").verify().ok
    assert ImageSet.open(f"{out}/digits/images").verify().ok
    assert (out / "digits" / "evaluation" / "report.html").is_file()
    assert (tmp_path / "seven.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(os.listdir(out)) == ["digits"]
