"""Facts about the bundled pictures by names: captions are found in what is made of them.

The bars are below what docs/text-to-image.md prints, which thousands of images measure.
"""

from pathlib import Path

import pytest
import torch

import ddray
from ddray.locations import BUNDLED
from ddray.metrics.caption_agreement import CaptionAgreement
from ddray.metrics.emoji_judge import EmojiJudge
from ddray.metrics.network import POOL
from ddray.metrics.pixels import eight_bit
from ddray.models.zoo import EMOJI_JUDGE
from ddray.text.loading import own_captions

pytestmark = pytest.mark.slow
COUNT = 100
# Share of images that the judge finds by their caption among a hundred; blind choice finds 0.01.
SEEN, HELD_OUT = 0.8, 0.6


@pytest.fixture(scope="module")
def teacher():
    return ddray.load_teacher("emoji-llamagen", device="cpu")


@pytest.fixture(scope="module")
def judge():
    return EmojiJudge(EMOJI_JUDGE)


def captions_of(model, held_out):
    """Different captions."""
    lines = Path(own_captions(model.config, held_out=held_out)).read_text().splitlines()
    return [*dict.fromkeys(lines)][:COUNT]


def found(judge, images, captions):
    agreement = CaptionAgreement(judge.of_captions)
    agreement.add(judge(eight_bit(images))[POOL].numpy(), captions)
    return agreement.results()["retrieval"]


@pytest.mark.parametrize(("held_out", "least"), [(False, SEEN), (True, HELD_OUT)])
def test_the_teacher_paints_what_it_is_asked_for(teacher, judge, held_out, least):
    captions = captions_of(teacher, held_out)
    tokens = teacher.sample(captions, cfg=teacher.default_cfg, top_p=teacher.default_top_p, seed=0)
    assert found(judge, teacher.decode(tokens), captions) > least


@pytest.mark.parametrize("schedule", ["0", "0,24"])
@pytest.mark.parametrize(("held_out", "least"), [(False, SEEN), (True, HELD_OUT)])
def test_its_student_does_in_a_step_or_two(judge, held_out, least, schedule):
    student = ddray.load_student("emoji-llamagen-dd", device="cpu")
    captions = captions_of(student, held_out)
    images = student.decode(student.generate(captions, seed=0, schedule=schedule))
    assert found(judge, images, captions) > least


def test_words_that_no_caption_had_are_taken_too(teacher):
    images = teacher.decode(teacher.sample(["a zeppelin, please", "苹果"], cfg=2.0, seed=0))
    assert images.shape == (2, 3, 32, 32)
    assert torch.isfinite(images).all()


def test_files_are_as_small_as_a_package_should_have_them():
    def mebibytes(*names):
        files = [file for name in names for file in (BUNDLED / name).glob("*.safetensors")]
        assert {file.parent.name for file in files} == {*names}
        return sum(file.stat().st_size for file in files) / 2**20

    assert mebibytes("emoji-llamagen", "emoji-text", "emoji-words") <= 14
    assert mebibytes("emoji-llamagen-dd") <= 8
