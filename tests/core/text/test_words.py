"""Facts about the table of words, on one of six pieces."""

import pytest
import torch

from ddray.errors import CheckpointError, ConfigError
from ddray.storage.checkpoint import save_folder
from ddray.text.encoder import TimedEncoder
from ddray.text.loading import (
    caption_cost,
    check_text_encoder,
    load_text_encoder,
    own_encoder,
)
from ddray.text.words import WordEncoder, positions, words
from tests.core.tiny import tiny_teacher

PIECES = ("_", "_red", "_cat", "cat", "fish", "s")
LENGTH, WIDTH, PLACE = 4, 3, 2


@pytest.fixture(scope="module")
def encoder():
    vectors = torch.arange(len(PIECES) * WIDTH).float().view(-1, WIDTH)
    return WordEncoder(PIECES, vectors, length=LENGTH, position_width=PLACE)


@pytest.fixture
def folder(encoder, tmp_path):
    encoder.save(tmp_path / "words")
    return str(tmp_path / "words")


@pytest.mark.parametrize(
    ("caption", "found"),
    [
        ("A red apple, 3d!", ["a", "red", "apple", "3d"]),
        ("Café CRÈME", ["cafe", "creme"]),
        ("the cat's hat", ["the", "cats", "hat"]),
        ("苹果", []),
        ("a\u200bb", ["ab"]),  # a space of no width divides no word
        ("co\u00adop e\u0301t", ["coop", "et"]),  # nor does a soft hyphen, nor a mark
        # All else that is not ASCII does.
        ("carrot\u2014flat en\u2013dash", ["carrot", "flat", "en", "dash"]),
        ("sky\u2011blue", ["sky", "blue"]),
        ("cat\U0001f408dog", ["cat", "dog"]),
        ("red\u2022blue\u2026green", ["red", "blue", "green"]),
        ("red\u82f9\u679capple", ["red", "apple"]),
        ("5½ apples", ["5", "1", "2", "apples"]),
        ("1\u20442 apple", ["1", "2", "apple"]),
        ("the cat\u2019s, Hawai\u02bbi", ["the", "cats", "hawaii"]),
        ("Straße \ufb01sh m²", ["strasse", "fish", "m2"]),
    ],
)
def test_words_are_runs_of_plain_letters(caption, found):
    assert words(caption) == found


def test_a_word_is_the_mean_of_its_longest_pieces(encoder):
    (features_TD,), (mask_T,) = encoder(["red catfish"])
    table = encoder.vectors_PW
    torch.testing.assert_close(features_TD[0, :WIDTH], table[PIECES.index("_red")])
    pieces = [PIECES.index("_cat"), PIECES.index("fish")]
    torch.testing.assert_close(features_TD[1, :WIDTH], table[pieces].mean(0))
    assert mask_T.tolist() == [1, 1, 0, 0]
    assert not features_TD[2:].any()


def test_where_a_word_stands_is_told(encoder):
    one, other = encoder(["red cat", "cat red"])[0]
    assert torch.equal(one[0, :WIDTH], other[1, :WIDTH])
    assert torch.equal(one[:2, WIDTH:], other[:2, WIDTH:])
    assert len(positions(64, 16).unique(dim=0)) == 64


def test_a_caption_has_the_same_features_in_any_company(encoder):
    alone = encoder(["red cat"])[0][0]
    assert torch.equal(alone, encoder(["fish", "red cat"])[0][1])
    assert torch.equal(alone, encoder(["  RED   Cat"])[0][0])


def test_what_has_no_known_word_is_a_caption_too(encoder):
    features, mask = encoder(["苹果", "q"])
    assert mask.sum(1).tolist() == [1, 1]
    assert not features[0, :, :WIDTH].any()
    torch.testing.assert_close(features[1, 0, :WIDTH], encoder.vectors_PW[0])  # the begin of a word


def test_a_long_caption_is_cut(encoder):
    features, mask = encoder(["red " * 1000, "red " * LENGTH])
    assert mask.sum(1).tolist() == [LENGTH, LENGTH]
    assert torch.equal(*features)


@pytest.mark.parametrize(
    ("captions", "message"),
    [("cat", "must be a list"), ([], "must be a list"), (["cat", " "], "caption 1 is empty")],
)
def test_what_is_no_caption_is_refused(encoder, captions, message):
    with pytest.raises(ConfigError, match=message):
        encoder(captions)


def test_a_folder_is_the_table(encoder, folder):
    again = load_text_encoder(folder, length=LENGTH)
    for mine, theirs in zip(again(["red cats"]), encoder(["red cats"]), strict=True):
        assert torch.equal(mine, theirs)
    assert again.width == encoder.width == WIDTH + PLACE


def test_an_encoder_of_another_width_is_refused_before_it_is_loaded(folder):
    check_text_encoder(folder, "the teacher", WIDTH + PLACE)
    with pytest.raises(ConfigError, match="makes features of width 5; the teacher takes 2048"):
        check_text_encoder(folder, "the teacher", 2048)


def test_a_damaged_table_is_named(tmp_path):
    config = {"family": "words", "position_width": 2}
    vectors, pieces = torch.zeros(3, 2), torch.frombuffer(bytearray(b"a\nb"), dtype=torch.uint8)
    save_folder(tmp_path, config, model={"vectors": vectors, "pieces": pieces})
    with pytest.raises(CheckpointError, match=r"no table of words \(2 pieces, but 3 vectors\)"):
        WordEncoder.load(tmp_path, length=4)
    save_folder(tmp_path, {"family": "var"}, model={"vectors": vectors})
    with pytest.raises(CheckpointError, match="no table of words .*family='var'"):
        WordEncoder.load(tmp_path, length=4)


def test_what_it_gives_is_what_a_teacher_takes(encoder):
    teacher = tiny_teacher(cls_token_num=LENGTH, caption_dim=WIDTH + PLACE)
    tokens = teacher.sample(encoder(["a cat", "a red fish"]), cfg=2.0, seed=1)
    assert tokens.shape == (2, teacher.num_tokens)


def test_a_model_says_which_encoder_it_was_trained_with():
    assert own_encoder({"text_encoder": "emoji-words"}) == "emoji-words"
    assert own_encoder({}) == "google/flan-t5-xl"


def test_an_encoder_can_be_timed(encoder):
    timed = TimedEncoder(encoder)
    assert timed.seconds == 0
    assert torch.equal(timed(["red cat"])[0], encoder(["red cat"])[0])
    first = timed.seconds
    timed(["cat"] * 100)
    assert 0 < first < timed.seconds


def test_a_table_computes_nothing(folder):
    assert caption_cost(folder, 15) == (0, 15 * (WIDTH + PLACE))


class CountedText(str):
    """A text that knows how much of it was copied."""

    copied = 0

    def __getitem__(self, place):
        part = super().__getitem__(place)
        CountedText.copied += len(part)
        return CountedText(part)


def test_cutting_a_word_copies_no_more_of_it_for_a_longer_one(encoder):
    copied = []
    for length in (100, 800):
        CountedText.copied = 0
        assert len(encoder._pieces(CountedText("_" + "s" * length))) == 1 + length
        copied.append(CountedText.copied / length)
    assert 0 < copied[1] <= 1.1 * copied[0]
