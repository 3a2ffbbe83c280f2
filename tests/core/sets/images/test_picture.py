"""A picture of random rows of an image set, in every format."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ddray.cli import main
from ddray.errors import ConfigError, ShardError
from ddray.models.zoo import load_student
from ddray.report.image_file import encode_png
from ddray.sets.images.image_set import ImageSet
from ddray.sets.images.picture import write_picture
from tests.core.sets.images.test_image_set import ALL_FORMATS, images_like, pixels_of, write


def _picture(uri: str, path: Path) -> np.ndarray:
    assert main(["inspect", uri, "--picture", str(path)]) == 0
    return np.asarray(Image.open(path))


def test_every_format_gives_the_same_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    drawn = {}
    for encoding in ALL_FORMATS:
        uri = str(tmp_path / encoding)
        write(Path(uri), pixels_of(), encoding=encoding, num_classes=3, count=20)
        # Which rows these are is drawn by the plan hash, which differs: so all of them are drawn.
        drawn[encoding] = _picture(uri, tmp_path / f"{encoding}.png")
    capsys.readouterr()
    shapes = {picture.shape for picture in drawn.values()}
    assert len(shapes) == 1
    # Three lines of six images of 6 x 4 pixels, drawn 16-fold, and their titles.
    assert drawn["parquet"].shape[0] > 3 * 64 and drawn["parquet"].shape[1] > 6 * 96


def test_classes_stand_by_their_names(tmp_path: Path) -> None:
    grey = np.full((1, 8, 8), 128, np.uint8)
    named = {"a": ("cat", "dog"), "b": ("cat", "dog"), "c": ()}
    for folder, names in named.items():
        write(tmp_path / folder, grey, num_classes=2, class_names=names)
        write_picture(str(tmp_path / folder), str(tmp_path / f"{folder}.png"))
    drawn = [np.asarray(Image.open(tmp_path / f"{folder}.png")) for folder in named]
    np.testing.assert_array_equal(drawn[0], drawn[1])
    assert drawn[0].shape != drawn[2].shape


def test_a_set_of_captions_has_a_line_for_each_row(tmp_path: Path) -> None:
    plan = images_like(conditioning="text", num_classes=0, text_encoder="t5", count=2)
    images = ImageSet.create(str(tmp_path / "set"), plan)
    images.write_shard(0, np.array(["a cat", "a dog"], object), [encode_png(pixels_of()[0])] * 2)
    assert _picture(images.uri, tmp_path / "rows.png").shape[0] > 2 * 64


def test_tokens_are_decoded_by_the_student_of_the_plan(tmp_path: Path) -> None:
    name = "digits-llamagen-dd"
    student = load_student(name, device="cpu")
    weights = {
        "student_fingerprint": student.fingerprint,
        "tokenizer_fingerprint": student.tokenizer.fingerprint,
    }
    sizes = {"num_classes": 2, "count": 2, "stages": student.stages}
    plan = images_like(student=name, content="tokens", **weights, **sizes)
    images = ImageSet.create(str(tmp_path / "tokens"), plan)
    tokens = np.arange(2 * len(student.stages)).reshape(2, -1)
    images.write_shard(0, plan.label([0, 1]), tokens)
    drawn = _picture(images.uri, tmp_path / "tokens.png")
    assert drawn.shape[0] > 2 * 84 and drawn.std() > 10


def test_what_cannot_be_drawn_is_refused(tmp_path: Path) -> None:
    images = ImageSet.create(str(tmp_path / "set"), images_like())
    with pytest.raises(ConfigError, match=r"--picture 'rows.jpg': only PNG is written"):
        write_picture(images.uri, "rows.jpg")
    with pytest.raises(ShardError, match="holds no sound shard, so there is nothing to show"):
        write_picture(images.uri, str(tmp_path / "rows.png"))
