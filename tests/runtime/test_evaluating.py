"""Facts about evaluations that a pool makes: the bits of one process, and its refusals."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ddray.config.evaluation import EvaluateConfig
from ddray.errors import ConfigError
from ddray.evaluation.evaluate import evaluate
from ddray.report.image_file import encode_png
from ddray.runtime.evaluating import evaluate_on_cluster
from tests.runtime.tiny import contents

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_local")]

DIGITS: dict[str, Any] = {
    "student": "digits-var-dd",
    # Without data, the teacher's tokens by transport are made first, and counted.
    "rows": "transport,student,independent",
    "count": 8,
    "shard_rows": 4,
    "batch_size": 4,
    "speed_batches": "off",
    "transport_count": 0,
    "threads": 1,
}
IMAGES = 11


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, str]:
    draws = np.random.default_rng(0)
    for name in ("samples", "reference"):
        (tmp_path / name).mkdir()
        for i in range(IMAGES):
            image = draws.integers(0, 256, (32, 32, 3)).astype(np.uint8)
            (tmp_path / name / f"{i:06d}.png").write_bytes(encode_png(image))
    return {name: str(tmp_path / name) for name in ("samples", "reference")}


@pytest.mark.chaos
def test_two_workers_measure_the_bits_that_one_process_measures(tmp_path: Path) -> None:
    one = evaluate(EvaluateConfig(**DIGITS, out=tmp_path / "one"))
    two = evaluate_on_cluster(EvaluateConfig(**DIGITS, out=tmp_path / "two", workers=2))
    kinds = [row["kind"] for row in two.quality]
    assert kinds == ["transport", "student", "student", "independent"]
    assert two.quality == one.quality
    assert contents(tmp_path / "two", "features") == contents(tmp_path / "one", "features")


def test_a_pool_judges_the_images_of_anyone_and_refuses_as_one_process(
    folders: dict[str, str], tmp_path: Path
) -> None:
    asked = {**folders, "metrics": "fd_efficientnet,precision_efficientnet", "shard_rows": 4}
    Path(folders["samples"], "000003.png").write_bytes(b"<html>")
    config = EvaluateConfig(**asked, workers=2, out=tmp_path / "pool")
    with pytest.raises(ConfigError, match=r"1 of 11 images .* 000003.png is no image but an HTML"):
        evaluate_on_cluster(config)
    pool = evaluate_on_cluster(config.model_copy(update={"skip_broken": True}))
    assert pool.quality[0]["images"] == IMAGES - 1
    here = evaluate(EvaluateConfig(**asked, threads=1, skip_broken=True, out=tmp_path / "here"))
    assert pool.quality == here.quality
    assert contents(tmp_path / "pool", "features") == contents(tmp_path / "here", "features")
