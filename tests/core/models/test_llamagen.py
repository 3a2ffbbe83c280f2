"""Facts about the teacher's network: upstream's numbers, cached decoding = plain forward."""

import pytest
import torch
import torch.nn.functional as F

from ddray.errors import ConfigError
from ddray.models.llamagen import LlamaGen, LlamaGenConfig, rope_table
from ddray.models.zoo import load_teacher
from tests.core.tiny import assert_golden, golden, golden_weights, tiny_teacher

SIZE_NAMES = ("dim", "n_layer", "n_head", "multiple_of", "vocab_size", "num_classes", "block_size")


@pytest.fixture(scope="module")
def upstream():
    config, tensors = golden("lg_c2i")
    sizes = {name: config[name] for name in (*SIZE_NAMES, "norm_eps", "rope_base")}
    spec = {"family": "llamagen", **sizes, "tokenizer": None}
    return config, tensors, load_teacher(spec, checkpoint=golden_weights("lg_c2i"), device="cpu")


def test_training_logits_and_loss_match_upstream(upstream):
    _, tensors, teacher = upstream
    codes = tensors["in/train.codes"]
    # The last row has the null class.
    logits = teacher.guided_logits(tensors["in/train.cond"], codes)
    assert_golden(logits, tensors["out/train.logits"])
    loss = F.cross_entropy(logits.flatten(0, 1), codes.flatten())
    assert_golden(loss[None], tensors["out/train.loss"])


def test_the_rotary_table_matches_upstream(upstream):
    _, tensors, teacher = upstream
    table = rope_table(teacher.model.config, torch.device("cpu"))
    assert_golden(table, tensors["out/freqs_cis"])
    assert not table[0].any()


@pytest.mark.parametrize(("name", "guided"), [("full", True), ("nocfg", False)])
def test_every_decoding_step_matches_upstream(upstream, name, guided):
    _, tensors, teacher = upstream
    cond, tokens = tensors["in/gen.cond"], tensors[f"out/gen.{name}.tokens"]
    if guided:
        cond = torch.cat((cond, torch.full_like(cond, teacher.num_classes)))
        tokens = tokens.repeat(2, 1)
    decoder, rows = teacher.model.decoder(cond), []
    with torch.inference_mode():
        for token in tokens.split(1, dim=1):
            rows.append(decoder.logits())
            decoder.append(token)
    assert_golden(torch.cat(rows, 1), tensors[f"out/gen.{name}.raw_logits"])


def test_guided_logits_match_upstream(upstream):
    config, tensors, teacher = upstream
    for name in ("full", "nocfg"):
        cfg = config["gen"][name]["cfg_scale"]
        logits = teacher.guided_logits(
            tensors["in/gen.cond"], tensors[f"out/gen.{name}.tokens"], cfg
        )
        assert_golden(logits, tensors[f"out/gen.{name}.combined_logits"])


def test_guidance_on_an_interval_matches_upstream(upstream):
    config, tensors, teacher = upstream
    cond, tokens = tensors["in/gen.cond"], tensors["out/gen.interval.tokens"]
    settings = config["gen"]["interval"]
    last = settings["cfg_interval"] + 2
    expected = tensors["out/gen.interval.combined_logits"]
    guided = teacher.guided_logits(cond, tokens, settings["cfg_scale"])
    assert_golden(guided[:, :last], expected[:, :last])
    assert_golden(teacher.guided_logits(cond, tokens)[:, last:], expected[:, last:])


@pytest.mark.parametrize("name", ["full", "interval", "nocfg"])
def test_greedy_tokens_match_upstream(upstream, name):
    config, tensors, teacher = upstream
    settings = config["gen"][name]
    tokens = teacher.sample(
        tensors["in/gen.cond"],
        cfg=settings["cfg_scale"],
        cfg_interval=settings["cfg_interval"],
        top_k=1,
    )
    assert torch.equal(tokens, tensors[f"out/gen.{name}.tokens"])


def test_a_changed_weight_changes_the_logits(upstream):
    # What the tolerance of the golden tests is worth: each tensor matters by more than it.
    _, tensors, teacher = upstream
    state, config = golden_weights("lg_c2i"), {**teacher.config}
    for name in ("layers.1.attention.wo.weight", "layers.2.ffn_norm.weight", "norm.weight"):
        wrong = load_teacher(config, checkpoint={**state, name: state[name] * 0.9}, device="cpu")
        logits = wrong.guided_logits(tensors["in/train.cond"], tensors["in/train.codes"])
        assert not torch.allclose(logits, tensors["out/train.logits"], atol=2e-4, rtol=1e-4)


@pytest.fixture(scope="module")
def other():
    """Another random size than the fixtures': 9 tokens, 3 layers, heads of width 12."""
    teacher = tiny_teacher(7, dim=36, n_head=3, n_layer=3, block_size=9, vocab_size=20)
    generator = torch.Generator().manual_seed(0)
    cond = torch.tensor([0, 2, 3, 1])
    return teacher, cond, torch.randint(20, (4, 9), generator=generator)


def test_cached_decoding_equals_the_teacher_forced_forward(other):
    teacher, cond, tokens = other
    decoder, rows = teacher.model.decoder(cond), []
    for token in tokens.split(1, dim=1):
        rows.append(decoder.logits())
        decoder.append(token)
    # 1e-4: products of other shapes round differently; a wrong position would show at 0.1.
    torch.testing.assert_close(
        torch.cat(rows, 1), teacher.model(cond, tokens), atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("length", [0, 1, 4, 8])
def test_decoding_behind_a_prefix_equals_token_by_token(other, length):
    teacher, cond, tokens = other
    full = teacher.model(cond, tokens)
    decoder = teacher.model.decoder(cond, tokens[:, :length])
    for position in range(length, 9):
        expected = full[:, position : position + 1]
        torch.testing.assert_close(decoder.logits(), expected, atol=1e-4, rtol=1e-4)
        decoder.append(tokens[:, position : position + 1])


def test_a_row_of_logits_sees_only_the_tokens_before_it(other):
    teacher, cond, tokens = other
    changed = tokens.clone()
    changed[:, 5] = (changed[:, 5] + 1) % 20
    before, after = teacher.model(cond, tokens), teacher.model(cond, changed)
    assert torch.equal(before[:, :6], after[:, :6])
    assert (before[:, 6:] != after[:, 6:]).any(-1).all()


def test_guidance_up_to_one_is_off(other):
    teacher, cond, tokens = other
    plain = teacher.guided_logits(cond, tokens)
    for cfg in (None, 0.0, 1.0):
        assert torch.equal(teacher.guided_logits(cond, tokens, cfg), plain)
    null = teacher.guided_logits(torch.full_like(cond, teacher.num_classes), tokens)
    expected = null + 2.5 * (plain - null)
    guided = teacher.guided_logits(cond, tokens, 2.5)
    torch.testing.assert_close(guided, expected, atol=1e-5, rtol=1e-5)


def test_parameters_have_the_published_names_and_count():
    with torch.device("meta"):
        model = LlamaGen(LlamaGenConfig(dim=768, n_layer=12, n_head=12))
    assert len(model.state_dict()) == 88
    assert sum(p.numel() for p in model.parameters()) == 110_888_448


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"dim": 18, "n_head": 4}, "dim=18 with n_head=4: the head width .* multiple of 4"),
        ({"dim": 24, "n_head": 4}, "dim=24 with n_head=4: the head width .* multiple of 4"),
        ({"dim": 16, "n_head": 2, "block_size": 10}, "block_size=10 is not a square number"),
        ({"dim": 16, "n_head": 2, "cls_token_num": 120}, "cls_token_num=120"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(sizes, message):
    with pytest.raises(ConfigError, match=message):
        LlamaGenConfig(**{"n_layer": 1, **sizes})
