"""Facts about the bundled judge of emoji, its words, its captions and its real pictures."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from ddray.metrics.emoji_judge import EmojiJudge
from ddray.metrics.network import POOL
from ddray.metrics.reference import Reference
from ddray.models.zoo import EMOJI_JUDGE, EMOJI_REFERENCE
from ddray.text.loading import check_text_encoder, own_captions

SHAPES = ("circle", "square")
COLOURS = {"red": "#dd2e44", "blue": "#55acee", "green": "#78b159", "brown": "#c1694f"}


def drawn(shape: str, colour: str) -> np.ndarray:
    """A plain shape, uint8 [32, 32, 3]."""
    image = Image.new("RGB", (32, 32), "white")
    draw = ImageDraw.Draw(image)
    (draw.ellipse if shape == "circle" else draw.rectangle)((1, 1, 30, 30), fill=colour)
    return np.asarray(image)


def test_the_judge_tells_shapes_and_colours_apart():
    asked = [(colour, shape) for colour in COLOURS for shape in SHAPES]
    pixels = np.stack([drawn(shape, COLOURS[colour]) for colour, shape in asked])
    judge = EmojiJudge(EMOJI_JUDGE)
    found = judge(torch.from_numpy(pixels))[POOL]
    captions = [*map(" ".join, asked), "rocket", "red heart", "woman dark skin tone"]
    nearest = (found @ judge.of_captions(captions).T).argmax(1)
    assert (nearest == torch.arange(len(asked))).sum() >= len(asked) - 1


def test_captions_of_training_and_of_judging_are_others():
    config = {"images": "emoji"}
    learnt, unseen = (
        Path(own_captions(config, held_out=held_out)).read_text().splitlines()
        for held_out in (False, True)
    )
    assert (len(learnt), len(unseen)) == (20_000, 5_000)
    assert not {*learnt} & {*unseen}
    # The words of emoji are anybody's; a model that reads them need not paint emoji.
    assert own_captions({"text_encoder": "emoji-words"}) is None


def test_the_reference_is_of_the_held_out_pictures():
    reference = Reference.load(str(EMOJI_REFERENCE))
    assert reference.network == "efficientnet"
    assert reference.statistics[POOL].count == len(reference.features) == 1663


def test_the_words_fit_a_teacher_of_their_width_alone():
    check_text_encoder("emoji-words", "the teacher", 128)
    with pytest.raises(ValueError, match="makes features of width 128; the teacher takes 64"):
        check_text_encoder("emoji-words", "the teacher", 64)
