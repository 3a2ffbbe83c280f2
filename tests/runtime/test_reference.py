"""Facts about statistics of real images that a pool makes."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ddray.config.reference import ReferenceConfig
from ddray.errors import ConfigError
from ddray.metrics.reference import Reference
from ddray.report.image_file import encode_png
from ddray.runtime.referencing import reference

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_local")]

COUNT = 14


@pytest.fixture
def source(tmp_path: Path) -> str:
    draws = np.random.default_rng(0)
    for i in range(COUNT):
        path = tmp_path / "real" / str(i % 2) / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode_png(draws.integers(0, 256, (32, 32, 3)).astype(np.uint8)))
    return str(tmp_path / "real")


def config_of(source: str, out: str, **other: Any) -> ReferenceConfig:
    values = {"network": "efficientnet", "shard_rows": 3, "images": 5}
    return ReferenceConfig(source=source, out=out, **{**values, **other})


def test_a_pool_writes_the_bytes_that_one_process_writes(source: str, tmp_path: Path) -> None:
    one = reference(config_of(source, f"{tmp_path}/one.npz"))
    two = reference(config_of(source, f"{tmp_path}/two.npz", workers=2))
    assert (tmp_path / "one.npz").read_bytes() == (tmp_path / "two.npz").read_bytes()
    assert {**one, "out": "", "seconds": 0} == {**two, "out": "", "seconds": 0}
    assert (two["images"], two["images_in_file"], two["layers"]) == (COUNT, 5, {"pool": 1280})
    found = Reference.load(f"{tmp_path}/two.npz")
    assert (found.network, found.num_images) == ("efficientnet", 5)
    assert not (tmp_path / "two.npz.parts").exists()


def test_what_an_actor_refuses_is_told_as_here(source: str, tmp_path: Path) -> None:
    (tmp_path / "real/0/04.png").write_bytes(b"<html>")
    config = config_of(source, f"{tmp_path}/out.npz", workers=2)
    with pytest.raises(ConfigError, match=r"1 of 14 images .* 0/04.png is no image but an HTML"):
        reference(config)
    left_out = reference(config.model_copy(update={"skip_broken": True}))
    assert (left_out["images"], left_out["images_left_out"]) == (COUNT - 1, 1)
