"""The laptop's part of docs/text-to-image.md, as it stands there, in fewer steps."""

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from PIL import Image

from tests.chaos.ray_head import BIN
from tests.chaos.service import RAW, Service
from tests.core.test_text_to_image_page import PAGE
from tests.patience import PATIENCE_S
from tests.runtime.tiny import environment

pytestmark = pytest.mark.chaos


def test_a_file_of_captions_becomes_a_served_student(
    serve: Callable[..., Service], tmp_path: Path
) -> None:
    part = PAGE.partition("### From a file of captions")[2]
    (script,) = re.findall(r"```console\n(printf.*?)```", part, re.DOTALL)
    *making, last = script.strip().splitlines()
    assert last == "ddray serve --student runs/mine/run/student"
    done = subprocess.run(
        ["bash", "-ec", "\n".join(making).replace("--steps 200", "--steps 20")],
        env=environment(PATH=f"{BIN}:/usr/bin:/bin"),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    images = [*(tmp_path / "runs/mine/images").rglob("*.png")]
    assert len(images) == 4
    assert {Image.open(file).size for file in images} == {(32, 32)}
    service = serve("--student", str(tmp_path / "runs/mine/run/student"))
    order = {"prompt": "red apple", "seed": 1, "steps": 2}
    answer = httpx.post(service.url + RAW, json=order, timeout=PATIENCE_S, trust_env=False)
    assert answer.status_code == 200, answer.text
    assert answer.content.startswith(b"\x89PNG")
