"""Facts about the encoder that summarises a caption, on a network of a few numbers."""

import pytest
import torch

from ddray.errors import CheckpointError, ConfigError
from ddray.storage.checkpoint import save_folder
from ddray.text.averaging import AveragingConfig, AveragingEncoder, DeepAveraging, read_averaging
from ddray.text.loading import caption_cost, check_text_encoder, load_text_encoder
from ddray.text.words import WordEncoder
from tests.core.tiny import tiny_teacher

PIECES = ("_red", "_cat", "_fish", "_a")
WORDS, WIDTH, LENGTH = 5, 6, 3


@pytest.fixture
def table(tmp_path):
    vectors = torch.randn(len(PIECES), 4, generator=torch.Generator().manual_seed(1))
    words = WordEncoder(PIECES, vectors, length=WORDS, position_width=2)
    words.save(tmp_path / "words")
    return words


@pytest.fixture
def network(table, tmp_path):
    torch.manual_seed(0)
    return DeepAveraging(
        AveragingConfig(
            words=str(tmp_path / "words"),
            max_words=WORDS,
            word_width=table.width,
            hidden=8,
            width=WIDTH,
        )
    )


@pytest.fixture
def folder(network, tmp_path):
    network.save(tmp_path / "text")
    return str(tmp_path / "text")


def test_every_position_is_the_same_standardised_summary(network, table):
    features, mask = AveragingEncoder(network, table, length=LENGTH)(["cat", "a red fish"])
    assert features.shape == (2, LENGTH, WIDTH)
    assert mask.tolist() == [[1] * LENGTH] * 2
    assert torch.equal(features[:, 0], features[:, 2])
    torch.testing.assert_close(features.mean(-1), torch.zeros(2, LENGTH), atol=1e-6, rtol=0)
    assert not torch.allclose(*features)


def test_padding_and_company_change_nothing(network, table):
    encode = AveragingEncoder(network, table, length=LENGTH)
    alone = encode(["red cat"])[0][0]
    torch.testing.assert_close(alone, encode(["a red fish a red", "red cat"])[0][1])


def test_the_order_of_words_is_told(network, table):
    one, other = AveragingEncoder(network, table, length=LENGTH)(["red cat", "cat red"])[0]
    assert not torch.allclose(one, other)


def test_a_folder_is_the_encoder(folder, network, table):
    again = load_text_encoder(folder, length=LENGTH)
    network.half().float()  # as weights travel
    table = WordEncoder(PIECES, table.vectors_PW.half(), length=WORDS, position_width=2)
    here = AveragingEncoder(network, table, length=LENGTH)
    for mine, theirs in zip(again(["red cats"]), here(["red cats"]), strict=True):
        torch.testing.assert_close(mine, theirs)
    check_text_encoder(folder, "the teacher", WIDTH)
    with pytest.raises(ConfigError, match="makes features of width 6; the teacher takes 2048"):
        check_text_encoder(folder, "the teacher", 2048)


def test_its_cost_is_that_of_its_products(folder, network, table):
    products = [layer for layer in network.modules() if isinstance(layer, torch.nn.Linear)]
    numbers = [2 * layer.weight.numel() for layer in products]
    numbers[0] *= WORDS
    assert caption_cost(folder, 15) == (sum(numbers), 15 * WIDTH)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"family": "var"}, "is no deep averaging network .*family='var'"),
        ({"family": "averaging", "hidden": 8}, "is no deep averaging network .*word_width"),
    ],
)
def test_what_is_no_such_network_is_named(tmp_path, config, message):
    save_folder(tmp_path, config, model={"x": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=message):
        read_averaging(tmp_path)


def test_words_of_another_width_are_named(folder, tmp_path):
    WordEncoder(PIECES, torch.zeros(4, 9), length=WORDS, position_width=2).save(tmp_path / "words")
    with pytest.raises(CheckpointError, match="has words of width 11, not 6"):
        load_text_encoder(folder, length=LENGTH)


def test_what_it_gives_is_what_a_teacher_takes(network, table):
    teacher = tiny_teacher(cls_token_num=LENGTH, caption_dim=WIDTH)
    encode = AveragingEncoder(network, table, length=LENGTH)
    tokens = teacher.sample(encode(["a cat", "a red fish"]), cfg=2.0, seed=1)
    assert tokens.shape == (2, teacher.num_tokens)
