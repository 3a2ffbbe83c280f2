"""Facts about the text encoder, on a T5 of a few thousand random weights made on the spot."""

import shutil
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from ddray.errors import CheckpointError, ConfigError
from ddray.storage.caption_file import clean_caption
from ddray.text.t5 import (
    FLAN_T5_XL,
    T5TextEncoder,
    by_length,
    encoder_width,
    t5_config,
    t5_flops,
)
from tests.core.tiny import tiny_teacher, write_text_encoder

pytestmark = pytest.mark.slow

TEXT = {"cls_token_num": 5, "caption_dim": 3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    pytest.importorskip("transformers")
    return write_text_encoder(tmp_path_factory.mktemp("t5"), TEXT["caption_dim"])


@pytest.fixture(scope="module")
def encoder(folder):
    return T5TextEncoder(folder, length=TEXT["cls_token_num"], dtype=torch.float32)


def test_shapes_mask_and_zero_padding(encoder):
    features, mask = encoder(["a cat", "the red cat on the roof"])
    assert features.shape == (2, 5, encoder.width) and mask.tolist() == [[1] * 3 + [0] * 2, [1] * 5]
    assert torch.equal(features[0, 3:], torch.zeros(2, encoder.width))


def test_a_caption_has_the_same_features_in_any_company(encoder):
    alone, together = encoder(["a cat"])[0], encoder(["the red cat on the roof", "a cat"])[0]
    torch.testing.assert_close(alone[0], together[1])
    assert not torch.allclose(alone[0], encoder(["a roof"])[0][0])


@pytest.fixture
def passes(encoder):
    """Shapes of what the T5 is given, pass by pass."""
    shapes = []
    hook = encoder._model.register_forward_pre_hook(
        lambda _, args, kwargs: shapes.append((*kwargs["input_ids"].shape,)), with_kwargs=True
    )
    yield shapes
    hook.remove()


# Of 4, 2, 5, 3, 4 and 3 positions: the end of a text is one.
CAPTIONS = ["on the roof", "red", "a cat on the", "a roof", "a red cat", "the cat"]


def test_each_caption_is_encoded_once_in_whatever_spelling(encoder, passes):
    features, mask = encoder(["a cat", "on", "A  Cat", "on"])
    assert passes == [(2, 3)]
    assert torch.equal(features[0], features[2]) and torch.equal(features[1], features[3])
    assert mask.tolist() == [[1, 1, 1, 0, 0], [1, 1, 0, 0, 0]] * 2


def test_a_pass_is_as_long_as_its_longest_caption(encoder, passes, monkeypatch):
    monkeypatch.setattr("ddray.text.t5._ROWS_AT_ONCE", 2)
    features, mask = encoder(CAPTIONS)
    assert passes == [(2, 3), (2, 4), (2, 5)]
    assert mask.sum(1).tolist() == [4, 2, 5, 3, 4, 3]
    assert not features[mask == 0].any()


def test_features_are_those_of_a_pass_of_all_positions(encoder):
    features, mask = encoder(CAPTIONS)
    given = encoder._tokenizer(
        CAPTIONS, max_length=5, padding="max_length", truncation=True, return_tensors="pt"
    )
    with torch.no_grad():
        plain = encoder._model(given["input_ids"], given["attention_mask"]).last_hidden_state
    assert torch.equal(mask, given["attention_mask"])
    torch.testing.assert_close(features, plain * mask[..., None])


def test_who_shares_a_pass_follows_from_the_lengths_alone():
    assert by_length([5, 2, 9, 2]) == [[1, 3, 0, 2]]
    lengths = [n % 7 for n in range(80)]
    passes = by_length(lengths)
    assert [len(some) for some in passes] == [32, 32, 16]
    assert sorted(sum(passes, [])) == list(range(80))
    told = [lengths[n] for some in passes for n in some]
    assert told == sorted(told)


@pytest.mark.parametrize("kind", ["gated-gelu", "relu"])
def test_operations_are_those_that_torch_counts(kind):
    transformers = pytest.importorskip("transformers")
    sizes = {"d_model": 24, "d_kv": 4, "d_ff": 40, "num_layers": 3, "num_heads": 5}
    config = {**sizes, "feed_forward_proj": kind}
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        network = transformers.T5EncoderModel(transformers.T5Config(**config))
        network(input_ids=torch.zeros(2, 9, dtype=torch.int64))
    assert 2 * t5_flops(config, 9) == counter.get_total_flops()


def test_sizes_are_those_of_the_folder(folder):
    width, hidden = TEXT["caption_dim"], 16
    weights = 4 * width * 2 * 4 + 2 * width * hidden
    assert t5_flops(t5_config(folder), 1) == 2 * (2 * weights + 4 * 2 * 4)


def test_sizes_of_flan_t5_xl_are_known_without_a_look_at_it():
    config = t5_config(FLAN_T5_XL)
    assert (config["d_model"], config["num_layers"]) == (2048, 24)
    # 1.16 billion weights, beside the embeddings.
    assert t5_flops(config, 1) == pytest.approx(2 * 1.16e9, rel=0.01)


def test_what_it_gives_is_what_a_teacher_takes(encoder):
    teacher = tiny_teacher(**TEXT)
    tokens = teacher.sample(encoder(["a cat", "a red roof"]), cfg=2.0, seed=1)
    assert tokens.shape == (2, teacher.num_tokens)


@pytest.mark.parametrize(
    ("given", "cleaned"),
    [
        ("A  Cat\non the roof ", "a cat on the roof"),
        ("cats &amp;amp; dogs", "cats & dogs"),
        ("<b>A cat</b> https://example.org/cat.png", "a cat"),
        ("the ‘red’ «cat»", "the 'red' \"cat\""),
    ],
)
def test_cleaning(given, cleaned):
    assert clean_caption(given) == cleaned
    assert clean_caption(cleaned) == cleaned


@pytest.mark.parametrize(
    ("captions", "message"),
    [
        ("a cat", "a list of at least one string, got 'a cat'"),
        ([], "at least one string"),
        (["a cat", " <br> "], "caption 1 is empty"),
    ],
)
def test_other_captions_are_refused(encoder, captions, message):
    with pytest.raises(ConfigError, match=message):
        encoder(captions)


@pytest.mark.parametrize("load", [T5TextEncoder, encoder_width])
def test_a_folder_without_an_encoder_is_refused(load, tmp_path):
    pytest.importorskip("transformers")
    with pytest.raises(CheckpointError, match=r"cannot load the text encoder .* give a folder"):
        load(str(tmp_path))


def test_the_width_is_known_without_the_weights(folder, tmp_path):
    shutil.copy(f"{folder}/config.json", tmp_path)
    assert encoder_width(str(tmp_path)) == TEXT["caption_dim"]


@pytest.mark.parametrize("load", [T5TextEncoder, encoder_width])
def test_without_transformers_the_extra_is_named(load, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ConfigError, match=r"need the package transformers; install ddray\[text\]"):
        load("t5")


def test_a_length_below_one_is_refused(folder):
    with pytest.raises(ConfigError, match="length=0"):
        T5TextEncoder(folder, length=0)
