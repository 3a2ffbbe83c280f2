"""The image of cluster/Dockerfile, without CUDA, is built here and tried: `make image`."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.image.checks import ALONE, TOGETHER
from cluster.image.engines import ImageError, find_engine
from tests.paths import ROOT

pytestmark = pytest.mark.chaos


IMAGE = "localhost/ddray:tried-cpu"
# What a machine may be without.
LACKS = ("no CPU build of torch is to be had", "a stand-in of the base image needs")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Path]:
    """Where buildah keeps its images, until the test ends; Docker has its own place."""
    folder = tmp_path / "store"
    try:
        engine = find_engine(folder)
    except ImageError as error:
        pytest.skip(str(error))
    yield folder
    if engine.name == "docker":
        subprocess.run(["docker", "image", "rm", IMAGE], capture_output=True, check=False)
    mounts = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()]
    for mount in reversed([one for one in mounts if one.startswith(f"{folder}/")]):
        subprocess.run(["umount", mount], capture_output=True, check=False)
    shutil.rmtree(folder, ignore_errors=True)


def test_the_variant_for_cpus_is_built_and_passes_every_check(store: Path) -> None:
    command = [sys.executable, "-m", "cluster.image.build", "--variant=cpu", f"--tag={IMAGE}"]
    done = subprocess.run(
        [*command, f"--store={store}"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    last = (done.stderr.strip().splitlines() or [""])[-1]
    if done.returncode == 2 and any(lack in last for lack in LACKS):
        pytest.skip(last)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    passed = {name.strip() for name in re.findall(r"^(.{26})ok ", done.stdout, re.MULTILINE)}
    assert passed == {"size", *ALONE, *TOGETHER}
