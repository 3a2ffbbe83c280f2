"""docs/text-to-image.md as it stands there, in small: fewer steps, and tiny models on a cluster."""

import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import ddray
from ddray.cli import main
from ddray.metrics.inception import empty_inception
from ddray.sets.trajectories.trajectory_set import TrajectorySet
from tests.chaos.ray_head import BIN, RayHead, ray_head
from tests.chaos.service import RAW, Service
from tests.core.metrics.test_networks import random_weights
from tests.core.test_text_to_image_page import PAGE, SUBMITTED
from tests.core.tiny import write_clip, write_text_encoder
from tests.loopback import free_port, is_ready
from tests.paths import ROOT
from tests.patience import PATIENCE_S, wait_until
from tests.runtime.tiny import environment, write_teacher

pytestmark = pytest.mark.chaos


def test_a_file_of_captions_becomes_a_served_student(
    serve: Callable[..., Service], tmp_path: Path
) -> None:
    part = PAGE.partition("### From a file of captions")[2]
    (script,) = re.findall(r"```console\n(printf.*?)```", part, re.DOTALL)
    *making, last = script.strip().splitlines()
    assert last == "ddray serve --student runs/mine/run/student"
    done = _typed("\n".join(making).replace("--steps 200", "--steps 20"), tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    images = [*(tmp_path / "runs/mine/images").rglob("*.png")]
    assert len(images) == 4
    assert {Image.open(file).size for file in images} == {(32, 32)}
    service = serve("--student", str(tmp_path / "runs/mine/run/student"))
    order = {"prompt": "red apple", "seed": 1, "steps": 2}
    answer = httpx.post(service.url + RAW, json=order, timeout=PATIENCE_S, trust_env=False)
    assert answer.status_code == 200, answer.text
    assert answer.content.startswith(b"\x89PNG")


# Figures and pictures of the page, and how the teacher came to be.

PROSE = [
    " ".join(line.split()) for line in re.findall(r"`((?:ddray evaluate|python \w+/)[^`]+)`", PAGE)
]
SHORT = {
    "evaluate": "--count 100 --speed-batches 1 --transport-count 0",
    "caption_sheet": "--count 12",
    "bench_serve": "--seconds 1 --overload-seconds 2",
}
SHORT_TRAINING = "--tokenizer-steps 10 --text-steps 10 --judge-steps 10 --teacher-steps 10"


def _typed(script: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """As it is typed at the top of the repository, with what it writes in another folder."""
    return subprocess.run(
        ["bash", "-ec", re.sub(r"\b(jobs|benchmarks)/", rf"{ROOT}/\1/", script)],
        env=environment(PATH=f"{BIN}:/usr/local/bin:/usr/bin:/bin"),
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=2 * PATIENCE_S,
        check=False,
    )


@pytest.mark.parametrize("line", PROSE)
def test_what_a_figure_is_of_runs(line: str, tmp_path: Path) -> None:
    (short,) = (flags for name, flags in SHORT.items() if name in line)
    done = _typed(f"{line} {short}", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


def test_python_takes_texts_as_the_page_says() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    names: dict[str, Any] = {}
    exec(code, names)
    assert names["images"].shape == (2, 3, 32, 32)


def test_the_teacher_can_be_trained_again(tmp_path: Path) -> None:
    part = PAGE.partition("### Training it again")[2]
    script = re.findall(r"```console\n(.*?)```", part, re.DOTALL)[0]
    downloads, training = script.rsplit("cd ..\n", 1)
    done = _typed(downloads, tmp_path)
    if done.returncode:
        pytest.skip(f"npm or pip brings no packages: {done.stderr.strip()[-300:]}")
    done = _typed(f"{training.strip()} {SHORT_TRAINING}", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    teacher = ddray.load_teacher(str(tmp_path / "runs/emoji/models/emoji-llamagen"), device="cpu")
    images = teacher.decode(teacher.sample(["red apple"], seed=0))
    assert images.shape == (1, 3, 32, 32)


# The cluster's part, on one node.

HERE = ("node_pool=null", "threads=1")
SMALL = {
    "sample.py": ("num_gpus=0", "workers=1", "count=8", "shard_rows=4"),
    "distill.py": ("use_gpu=false", "workers=1", "steps=4", "batch_size=4", "compile=false"),
    "evaluate.py": (
        "num_gpus=0",
        "workers=1",
        "count=8",
        "any_inception=true",
        "metrics=[fid,clip_score,retrieval_clip]",
    ),
    "serve.py": ("num_gpus=0", "replicas=1", "ingress_replicas=1"),
}


def _write_clip(folder: Path) -> None:
    """A CLIP of a few thousand random weights, which spells its captions."""
    letters = [*"abcdefghijklmnopqrstuvwxyz"]
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    write_clip(folder, len(words))
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")


@pytest.fixture
def bucket(tmp_path: Path) -> Path:
    """What the guide's bucket holds before its first command."""
    bucket = tmp_path / "bucket"
    for part in ("captions", "references", "weights", "coco/val2014"):
        (bucket / part).mkdir(parents=True)
    weights = bucket / "weights/pt_inception-2015-12-05-6726825d.pth"
    torch.save(random_weights(empty_inception()), weights)
    captions = ["a red cat on the roof"[: 5 + 2 * i] for i in range(8)]
    pq.write_table(pa.table({"caption": captions}), bucket / "captions/train.parquet")
    (bucket / "captions/coco_captions.csv").write_text("\n".join(["Prompt", *captions]))
    draws = np.random.default_rng(0)
    for i in range(8):
        pixels = draws.integers(256, size=(32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(bucket / f"coco/val2014/{i}.png")
    return bucket


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """Files in the layout of LlamaGen's, and beside them a folder of a model of such sizes."""
    sizes = {"cls_token_num": 5, "caption_dim": 3, "block_size": 256}
    folder = tmp_path / "published"
    write_teacher(folder / "sizes", seed=1, **sizes)
    teacher = ddray.load_teacher(write_teacher(folder / "others", **sizes), device="cpu")
    parts = {"t2i_XL_stage1_256.pt": teacher.model, "vq_ds16_t2i.pt": teacher.tokenizer}
    for file, part in parts.items():
        torch.save({"model": part.state_dict()}, folder / file)
    return folder


def test_the_cluster_s_commands_make_and_serve_a_student_of_small_models(
    bucket: Path, published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def here(text: str) -> str:
        """The same with this folder in place of the bucket, and of what all machines share."""
        return text.replace("s3://YOUR+BUCKET", str(bucket)).replace("/shared/", f"{tmp_path}/")

    shutil.copytree(ROOT / "jobs", tmp_path / "jobs", ignore=shutil.ignore_patterns("__pycache__"))
    for config in (tmp_path / "jobs" / "configs").glob("llamagen-t2i-xl-256-*.yaml"):
        text = here(config.read_text()).replace("# text_encoder:", "text_encoder:")
        config.write_text(text)
    write_text_encoder(tmp_path / "flan-t5-xl", 3)
    _write_clip(tmp_path / "clip-vit-base-patch32")

    (export,) = (line for line in PAGE.splitlines() if line.startswith("ddray export"))
    words = shlex.split(here(export).replace("--student llamagen-t2i-xl-256", "--student sizes"))
    names = ("sizes", "t2i_XL_stage1_256.pt", "vq_ds16_t2i.pt")
    words = [str(published / word) if word in names else word for word in words]
    assert main(words[1:]) == 0
    teacher = ddray.load_teacher(str(bucket / "models/llamagen-t2i-xl-256"), device="cpu")
    assert teacher.fingerprint in capsys.readouterr().out
    assert teacher.fingerprint == ddray.load_teacher(str(published / "others")).fingerprint

    evaluation = (tmp_path / "jobs/configs/llamagen-t2i-xl-256-evaluate.yaml").read_text()
    (reference,) = re.findall(r"#   ddray (reference .*?[^\\])\n", evaluation, re.DOTALL)
    words = shlex.split(reference.replace("\\\n#", "").replace("--size 256", "--size 32"))
    assert main([*words, "--any-inception"]) == 0

    def submit(head: RayHead, line: str, *more: str, wait: bool = True) -> str:
        script, *arguments = shlex.split(line)
        for key in (*HERE, *SMALL[script]):
            arguments += ["--set", key]
        entrypoint = ("python", script, *arguments, *more)
        job, printed = head.submit(*entrypoint, wait=wait, working_dir=tmp_path / "jobs")
        assert not wait or head.status(job) == "SUCCEEDED", printed
        return job

    port = free_port()
    with ray_head(num_cpus=4) as head:
        for line in SUBMITTED[:-1]:
            submit(head, line)
        service = submit(head, SUBMITTED[-1], "--port", str(port), wait=False)
        url = f"http://127.0.0.1:{port}"
        running = ("PENDING", "RUNNING")
        wait_until(lambda: is_ready(url), "service", lambda: head.status(service) in running)
        order = {"prompt": "a red cat", "seed": 1, "steps": 2}
        answer = httpx.post(url + RAW, json=order, timeout=PATIENCE_S, trust_env=False)
        assert answer.status_code == 200, answer.text
        assert answer.content.startswith(b"\x89PNG")
        head.job("stop", service)

    made = TrajectorySet.open(str(bucket / "sets/llamagen-t2i-xl-256"))
    assert made.verify().ok
    assert made.plan.text_encoder == str(tmp_path / "flan-t5-xl")
    summary = json.loads((bucket / "evaluations/llamagen-t2i-xl-256/summary.json").read_text())
    print(json.dumps(summary))
