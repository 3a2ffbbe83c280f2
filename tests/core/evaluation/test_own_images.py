"""Facts about images of ours as others are handed them: a folder, an array, a set, alike."""

from pathlib import Path

import numpy as np
import pytest

from ddray.config.evaluation import EvaluateConfig
from ddray.evaluation.evaluate import evaluate
from ddray.sets.images.image_set import SAMPLES
from tests.core.sets.images.test_image_set import pixels_of, write

pytestmark = pytest.mark.slow


def test_a_flat_folder_an_array_and_a_set_of_the_same_images_are_the_same_bits(
    tmp_path: Path,
) -> None:
    pixels = pixels_of(colour=True)
    for encoding in ("flat", "npz", "parquet", "webdataset"):
        write(tmp_path / encoding, pixels, encoding=encoding)
    real = np.random.default_rng(1).integers(0, 256, (9, 4, 6, 3)).astype(np.uint8)
    np.savez(tmp_path / "real.npz", arr_0=real)
    places = ("flat/images", "flat", f"npz/{SAMPLES}", "npz", "parquet", "webdataset")
    found = []
    for number, place in enumerate(places):
        config = EvaluateConfig(
            samples=tmp_path / place,
            reference=tmp_path / "real.npz",
            metrics="fd_efficientnet,density_efficientnet",
            threads=1,
            out=tmp_path / f"out-{number}",
        )
        (row,) = evaluate(config).quality
        found.append((row["images"], row["fd_efficientnet"], row["density_efficientnet"]))
    assert found[0][0] == len(pixels)
    assert len({*found}) == 1
