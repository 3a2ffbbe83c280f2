"""A service of captions on a real Ray Serve: what it makes of them, and what it keeps to itself."""

import contextlib
import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import ray
import torch
from ray import serve

from ddray.config.serving import ServeConfig
from ddray.errors import ConfigError
from ddray.runtime.serving.app import build_app, run
from ddray.serving.image_file import image_bytes
from ddray.serving.rendering import ImageJob, Renderer
from ddray.text.averaging import AveragingConfig, DeepAveraging
from ddray.text.words import WordEncoder
from tests.loopback import free_port
from tests.patience import PATIENCE_S, wait_until
from tests.runtime.tiny import write_student, write_teacher, write_text_student

pytestmark = pytest.mark.ray

FULL, RAW = "/v1/images/generations", "/v1/images/raw"
EXAMPLES = ["a red cat", "the roof"]
# A word that stands nowhere else.
SECRET = "a cat of my neighbour Zwiebelfisch"


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> ServeConfig:
    """Of two students, the second of which cannot be loaded."""
    folder = tmp_path_factory.mktemp("texts")
    student, encoder = write_text_student(folder, EXAMPLES)
    broken = shutil.copytree(student, folder / "broken")
    (broken / "model.safetensors").write_bytes(b"no weights")
    both = (student, str(broken))
    return ServeConfig(student=both, text_encoder=encoder, port=free_port(), models_per_replica=1)


@pytest.fixture(scope="module")
def client(ray_local: None, config: ServeConfig) -> Iterator[httpx.Client]:
    try:
        with httpx.Client(base_url=run(config), timeout=PATIENCE_S, trust_env=False) as client:
            yield client
    finally:
        serve.shutdown()


def test_images_of_a_caption_are_those_of_the_student(
    client: httpx.Client, config: ServeConfig
) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    renderer = Renderer.load(config.student[0], text_encoder=config.text_encoder)
    expected = renderer.images([ImageJob("a red cat", 0, 7)], "0,8")
    torch.set_num_threads(threads)
    for _ in range(2):
        answer = client.post(RAW, json={"prompt": "a red cat", "seed": 7, "steps": 2})
        assert answer.content == image_bytes(expected[0])


def _total(metric: str) -> float:
    """What the replica counts of its student for Prometheus."""
    address = f"http://127.0.0.1:{ray.nodes()[0]['MetricsExportPort']}/metrics"
    text = httpx.get(address, trust_env=False, timeout=PATIENCE_S).text
    lines = (line for line in text.splitlines() if line.startswith(f"ray_ddray_{metric}{{"))
    return sum(float(line.split()[-1]) for line in lines if 'model="words"' in line)


def test_a_caption_is_encoded_once(client: httpx.Client) -> None:
    for caption in ("the roof", "a cat", "the roof", "a red cat"):
        for k in range(3):
            asked = {"prompt": caption, "seed": k, "n": 4, "steps": 1 + k % 2}
            assert client.post(FULL, json=asked).status_code == 200
    wait_until(lambda: _total("images_total") >= 4 * 12, "metrics of the last image")
    # And the caption by which the student was warmed up.
    assert round(_total("captions_encoded_total")) == 4


def test_examples_and_how_long_a_caption_may_be_are_told(client: httpx.Client) -> None:
    card = client.get("/v1/models/words").json()
    assert (card["example_captions"], card["max_caption"]) == (EXAMPLES, 2000)
    answer = client.post(RAW, json={"prompt": "x" * 2001})
    assert answer.status_code == 400
    assert "takes a caption of 1 to 2000 characters on one line" in answer.text


def test_examples_that_would_be_refused_are_refused_before_the_start(
    config: ServeConfig, tmp_path: Path
) -> None:
    student = shutil.copytree(config.student[0], tmp_path / "words")
    card = json.loads((student / "config.json").read_text())
    (student / "config.json").write_text(json.dumps({**card, "example_captions": [""]}))
    changed = config.model_copy(update={"student": (str(student),)})
    with pytest.raises(ConfigError, match="example_captions has ''; it takes a caption of 1 to"):
        build_app(changed)


def _log_files() -> list[Path]:
    about = ray.get_runtime_context()
    logs = Path(about.get_temp_dir(), about.get_session_name(), "logs")
    return [file for file in logs.rglob("*") if file.is_file()]


def _texts() -> str:
    return "\n".join(file.read_text("utf-8", "replace") for file in _log_files())


def _logged(request_id: str) -> dict[str, Any]:
    """The line of the access log with an id, once it is there."""
    mark = f'{{"request_id": "{request_id}"'
    wait_until(lambda: mark in _texts(), "line of the log")
    (line,) = (line for line in _texts().splitlines() if mark in line)
    return dict(json.loads(line[line.index(mark) :]))


def _ask_in_every_way(client: httpx.Client) -> None:
    """Ask for the caption so that it is made, refused, failed at and left."""
    asked: dict[str, Any] = {"prompt": SECRET, "seed": 1}
    made = client.post(FULL, json={**asked, "n": 4}, headers={"x-request-id": "made"})
    assert made.status_code == 200, made.text
    for field in ("model", "n", "size", "seed", "steps", "output_format", SECRET):
        assert client.post(FULL, json={**asked, field: SECRET}).status_code in (400, 404), field
    assert client.post(FULL, json={"prompt": f"{SECRET}\a"}).status_code == 400
    assert client.post(FULL, content=f'{{"prompt": "{SECRET}').status_code in (400, 415)
    assert client.get(f"/v1/models?prompt={SECRET}").status_code == 200
    failed = client.post(RAW, json={**asked, "model": "broken"}, headers={"x-request-id": "failed"})
    assert failed.status_code == 500, failed.text
    with contextlib.suppress(httpx.ReadTimeout):
        client.post(FULL, json={**asked, "n": 16}, timeout=0.001)


def test_no_log_holds_a_caption_unless_asked(client: httpx.Client, config: ServeConfig) -> None:
    _ask_in_every_way(client)
    digest = hashlib.sha256(SECRET.encode()).hexdigest()[:12]
    for request_id in ("made", "failed"):
        line = _logged(request_id)
        assert (line["prompt_length"], line["prompt_sha256"]) == (len(SECRET), digest)
        assert "prompt" not in line
    # The failure is there, with its traceback, in the logs of the front and of the replica.
    wait_until(lambda: _texts().count("CheckpointError: ") > 1, "traceback")
    assert [file for file in _log_files() if b"Zwiebelfisch" in file.read_bytes()] == []

    run(config.model_copy(update={"log_prompts": True}))
    asked = {"prompt": SECRET, "seed": 1}
    client.post(RAW, json=asked, headers={"x-request-id": "in-full"})
    assert _logged("in-full")["prompt"] == SECRET


def _replicas_version(config: ServeConfig) -> str:
    """The version by which Serve tells whether replicas that run may stay."""
    replicas = build_app(config)._bound_deployment.init_args[0]
    version: str = replicas._bound_deployment.version
    return version


@pytest.mark.parametrize("is_told", [False, True])
def test_an_encoder_that_is_trained_anew_in_its_folder_replaces_replicas(
    is_told: bool, tmp_path: Path
) -> None:
    teacher = write_teacher(tmp_path / "teacher", cls_token_num=5, caption_dim=3)
    student, table, encoder = (tmp_path / name for name in ("student", "table", "encoder"))
    card = Path(write_student(student, teacher), "config.json")
    told = {} if is_told else {"text_encoder": str(encoder)}
    card.write_text(json.dumps({**json.loads(card.read_text()), **told}))
    sizes = {"max_words": 5, "word_width": 4, "hidden": 2, "width": 3}
    network = DeepAveraging(AveragingConfig(words=str(table), **sizes))
    network.save(encoder)
    WordEncoder(["a"], torch.ones(1, 2), length=5, position_width=2).save(table)
    given = str(encoder) if is_told else None
    config = ServeConfig(student=(str(student),), text_encoder=given)
    versions = [_replicas_version(config), _replicas_version(config)]
    assert versions[0] == versions[1]
    network.word.bias.data.add_(1)
    network.save(encoder)
    versions.append(_replicas_version(config))
    WordEncoder(["a"], torch.zeros(1, 2), length=5, position_width=2).save(table)
    versions.append(_replicas_version(config))
    assert len(set(versions)) == 3
