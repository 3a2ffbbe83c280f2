"""Facts about scores and retrieval of captions, on embeddings made to have them."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ddray.errors import ConfigError
from ddray.metrics.caption_agreement import CHOICES, CaptionAgreement, caption_scores, retrieved
from ddray.metrics.emoji_judge import EmojiJudge, EmojiTowers
from ddray.metrics.measurement import Measurement, ShardFeatures
from ddray.metrics.network import POOL
from ddray.storage.checkpoint import save_folder
from ddray.text.words import WordEncoder


def circle(count, turn=0.0):
    """As many embeddings [count, 2], each in a direction of its own, turned on by so many steps."""
    angle = 2 * torch.pi * (torch.arange(count) - turn) / count
    return torch.stack((angle.cos(), angle.sin()), 1)


def test_what_is_nearest_to_its_own_caption_is_retrieved():
    captions = circle(150)
    own = torch.arange(150)
    assert retrieved(3 * captions, captions, own).all()
    # Of an image that is nearer to another caption it hangs on whether that is among the choices.
    found = retrieved(circle(150, turn=0.6), captions, own).double().mean()
    assert found == pytest.approx(1 - (CHOICES - 1) / 149, abs=0.12)


def test_chance_is_one_of_the_choices():
    torch.manual_seed(0)
    captions, images = torch.randn(400, 16), torch.randn(20_000, 16)
    share = float(retrieved(images, captions, torch.arange(20_000) % 400).double().mean())
    assert share == pytest.approx(1 / CHOICES, abs=4 * (0.01 * 0.99 / 20_000) ** 0.5 + 0.002)
    few = retrieved(images, captions[:5], torch.arange(20_000) % 5).double().mean()
    assert float(few) == pytest.approx(1 / 5, abs=0.02)


def test_an_image_that_fits_others_as_well_is_not_found():
    captions = circle(4)
    assert not retrieved(torch.zeros(4, 2), captions, torch.arange(4)).any()
    assert retrieved(captions[:1], captions[:1], torch.tensor([0])).all()  # of one


def test_two_spellings_of_a_caption_are_one():
    # In this order: that of the embeddings' numbers is another.
    captions, images = circle(150), circle(150, turn=0.6)
    own = torch.arange(150)
    twice = torch.cat((captions, captions[:90]))
    spelt = torch.where(own < 90, own + 150, own)
    assert torch.equal(retrieved(images, twice, spelt), retrieved(images, captions, own))
    assert retrieved(captions, twice, spelt).all()


def test_the_judge_finds_a_caption_in_another_spelling(judge):
    agreement = CaptionAgreement(judge.of_captions)
    told = ["red cat", "Red  cat", "blue cat", "RED CAT"]
    agreement.add(judge.of_captions(told).numpy(), told)
    assert agreement.results()["retrieval"] == 1


def test_parts_and_repeated_captions_are_the_whole():
    told = {"a": [1.0, 0.0], "b": [0.0, 1.0], "c": [-1.0, 0.0]}
    asked = []

    def embed(captions):
        asked.append(captions)
        return torch.tensor([told[caption] for caption in captions])

    agreement = CaptionAgreement(embed)
    agreement.add(np.array([[2.0, 0], [2, 0]], np.float32), ["a", "b"])
    agreement.add(np.array([[0, 1.0], [-1, 1]], np.float32), ["b", "a"])
    found = agreement.results()
    assert asked == [["a", "b"]]
    assert found == {"agreement": pytest.approx(100 * (1 + 0 + 1 + 0) / 4), "retrieval": 0.5}


def test_other_numbers_of_images_and_captions_are_refused():
    with pytest.raises(ConfigError, match="2 captions of 3 features do not fit 3 images"):
        caption_scores(torch.ones(3, 3), torch.ones(2, 3))


def test_a_measurement_takes_captions_shard_by_shard():
    embeddings = circle(12).numpy()
    measurement = Measurement(
        ["clip_score", "retrieval_clip"],
        12,
        embed=lambda captions: torch.from_numpy(embeddings[[int(c) for c in captions]]),
    )
    for first in (0, 5, 10):
        rows = range(first, min(first + 5, 12))
        shard = ShardFeatures(first, {POOL: embeddings[first : rows.stop]})
        measurement.add(shard, [str(row) for row in rows])
    found = measurement.results()
    assert found == {"clip_score": pytest.approx(100), "retrieval_clip": 1}
    with pytest.raises(ConfigError, match="takes the captions that images were asked for by"):
        Measurement(["clip_score"], 1, embed=lambda captions: torch.ones(1, 2)).add(
            ShardFeatures(0, {POOL: embeddings[:1]})
        )


@pytest.fixture
def judge(tmp_path):
    """A judge of random weights, and its table of three words."""
    vectors = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    words = WordEncoder(["_red", "_blue", "_cat"], vectors, length=16, position_width=2)
    words.save(tmp_path / "words")
    torch.manual_seed(0)
    card = {"family": "emoji-judge", "text_encoder": str(tmp_path / "words"), "word_width": 8}
    save_folder(tmp_path / "judge", card, model=EmojiTowers(8).state_dict())
    return EmojiJudge(tmp_path / "judge")


def test_the_judge_sees_pictures_and_captions_in_one_space(judge):
    pixels = torch.randint(256, (3, 40, 40, 3), dtype=torch.uint8)
    pictures, captions = judge(pixels)[POOL], judge.of_captions(["red cat", "blue cat"])
    for found in (pictures, captions):
        assert found.shape[1] == judge.layers[POOL]
        torch.testing.assert_close(found.norm(dim=1), torch.ones(len(found)))
    assert not torch.allclose(captions[0], captions[1])
    alone = judge.of_captions(["red cat"])
    torch.testing.assert_close(alone[0], captions[0])
    small = judge(pixels[:, :32, :32])[POOL]
    as_it_is = judge.module.pictures(pixels[:, :32, :32].movedim(3, 1).float() / 127.5 - 1)
    torch.testing.assert_close(small, F.normalize(as_it_is, dim=1))
