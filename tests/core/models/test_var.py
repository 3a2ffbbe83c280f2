"""Facts about VAR: cached decoding = plain forward, guidance, prefixes, its tokenizer."""

import pytest
import torch

from ddray.errors import ConfigError
from ddray.models.var_vq import VARVQ, VARVQConfig, phi_of_scale
from ddray.models.zoo import new_student
from tests.core.tiny import tiny_var

SIZES = [
    {},
    {"patch_nums": [2, 3]},
    {"patch_nums": [1, 3, 4], "shared_aln": True},
    {"attn_l2_norm": False, "mlp_ratio": 2.0},
]


def tokens_of(teacher, rows=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 8, (rows, teacher.num_tokens), generator=generator)


def told(teacher, cond, tokens, prefix=None, **options):
    """Logits of a cached decoder that is told the tokens of every stage."""
    starts = teacher.stage_starts()
    decoder, rows = teacher.model.decoder(cond, prefix, **options), []
    first = 0 if prefix is None else starts.index(prefix.shape[1])
    with torch.inference_mode():
        for stage in range(first, len(teacher.stages)):
            rows.append(decoder.logits())
            decoder.append(tokens[:, starts[stage] : starts[stage + 1]])
    return torch.cat(rows, 1)


@pytest.mark.parametrize("sizes", SIZES)
def test_cached_decoding_is_the_masked_forward(sizes):
    teacher = tiny_var(**sizes)
    tokens, cond = tokens_of(teacher), torch.tensor([0, 2, 3])
    plain = teacher.guided_logits(cond, tokens)
    torch.testing.assert_close(told(teacher, cond, tokens), plain, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("sizes", SIZES)
def test_a_masked_prefix_changes_nothing_and_an_unmasked_one_does(sizes):
    teacher = tiny_var(**sizes)
    tokens, cond = tokens_of(teacher), torch.tensor([0, 2, 3])
    cut = teacher.stages[0]
    plain = teacher.guided_logits(cond, tokens)[:, cut:]
    masked = told(teacher, cond, tokens, tokens[:, :cut])
    torch.testing.assert_close(masked, plain, atol=1e-5, rtol=1e-5)
    unmasked = told(teacher, cond, tokens, tokens[:, :cut], unmasked_prefix=True)
    assert (unmasked - plain).abs().max() > 1e-3


def test_a_scale_sees_itself_and_earlier_scales_only():
    teacher = tiny_var()
    tokens = tokens_of(teacher, rows=1)
    before = teacher.guided_logits([0], tokens)
    for stage, start in enumerate(teacher.stage_starts()[:-1]):
        changed = tokens.clone()
        changed[:, start : start + teacher.stages[stage]] += 1
        after = teacher.guided_logits([0], changed % 8)
        stop = start + teacher.stages[stage]
        assert torch.equal(after[:, :stop], before[:, :stop])
        assert stop == teacher.num_tokens or not torch.allclose(after[:, stop:], before[:, stop:])


def test_guidance_grows_from_nothing_at_the_first_scale_to_all_at_the_last():
    teacher = tiny_var()
    tokens = tokens_of(teacher)
    cond, null = torch.tensor([0, 1, 2]), torch.full((3,), 3)
    c, u = (teacher.guided_logits(asked, tokens) for asked in (cond, null))
    guided = teacher.guided_logits(cond, tokens, 3.0)
    starts = teacher.stage_starts()
    for stage, t in enumerate((0.0, 1.5, 3.0)):
        part = slice(starts[stage], starts[stage + 1])
        expected = (1 + t) * c[:, part] - t * u[:, part]
        torch.testing.assert_close(guided[:, part], expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(teacher.guided_logits(cond, tokens, 0.0), c)


def test_greedy_sampling_follows_the_guided_logits():
    teacher = tiny_var()
    greedy = teacher.sample([0, 1, 2], cfg=2.0, top_k=1)
    assert torch.equal(teacher.guided_logits([0, 1, 2], greedy, 2.0).argmax(-1), greedy)


def test_trajectories_do_not_depend_on_company():
    teacher = tiny_var()
    cond, index = torch.tensor([0, 1, 2, 0]), torch.tensor([5, 6, 7, 8])
    whole = teacher.trajectories(cond, index, seed=3, cfg=1.5)
    parts = [
        teacher.trajectories(c, i, seed=3, cfg=1.5)
        for c, i in zip(cond.split(1), index.split(1), strict=True)
    ]
    assert torch.equal(whole, torch.cat(parts))
    assert whole.unique().numel() > 1


def test_every_official_number_of_scales_has_its_phis():
    assert phi_of_scale(4, 4) == [0, 1, 2, 3]
    assert phi_of_scale(5, 4) == [0, 1, 2, 2, 3]
    assert phi_of_scale(6, 4) == [0, 0, 1, 2, 3, 3]
    assert phi_of_scale(10, 4) == [0, 0, 1, 1, 1, 2, 2, 3, 3, 3]
    assert phi_of_scale(1, 4) == [0]


def test_the_tokenizer_reads_grey_images_and_sums_its_scales():
    config = VARVQConfig(
        vocab_size=8, z_channels=4, ch=32, ch_mult=(1, 1), patch_nums=(1, 2, 4), in_channels=1
    )
    torch.manual_seed(0)
    vq = VARVQ(config)
    images = torch.rand(2, 1, 8, 8) * 2 - 1
    tokens = vq.encode(images)
    assert tokens.shape == (2, 21)
    assert vq.decode(vq.codebook[tokens]).shape == images.shape
    latents = [*vq.quantize.latents(vq.codebook[tokens])]
    assert len(latents) == 3
    # Each further scale takes up what the ones before it left.
    target = vq.quant_conv(vq.encoder(images))
    assert torch.equal(vq.quantize.encode(target), tokens)


def test_codes_searched_by_angle_ignore_their_length():
    torch.manual_seed(0)
    vq = VARVQ(VARVQConfig(vocab_size=8, z_channels=4, ch=32, ch_mult=(1,), using_znorm=True))
    codes = vq.codebook.detach()
    assert torch.equal(vq.quantize.nearest(codes * 5), torch.arange(8))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"patch_nums": [2, 1]}, r"patch_nums=\[2, 1\] must be positive integers that increase"),
        ({"patch_nums": []}, "must be positive integers that increase"),
        ({"num_heads": 3}, "embed_dim=16 must be a multiple of num_heads=3"),
        ({"depth": 0}, "depth=0 must be a positive integer"),
        ({"vocab_size": 9}, "vocab_size=9, but its tokenizer has vocab_size=8"),
        ({"codebook_dim": 5}, "codebook_dim=5, but its tokenizer has codebook_dim=4"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(sizes, message):
    with pytest.raises(ConfigError, match=message):
        tiny_var(**sizes)


@pytest.mark.parametrize("family", ["var", "var-dd"])
def test_scales_must_be_those_of_the_tokenizer(family):
    tokenizer = {"vocab_size": 8, "z_channels": 4, "ch": 32, "patch_nums": [1, 2]}
    with pytest.raises(ConfigError, match=r"patch_nums=\(1, 2, 3\), but its tokenizer has"):
        tiny_var(family, tokenizer=tokenizer)


def test_a_student_token_sees_itself_and_earlier_scales():
    student = tiny_var("var-dd")
    x = torch.randn(1, 14, 4, generator=torch.Generator().manual_seed(0))
    t = torch.zeros(1)
    before = student.predict(x, [0], t)[0]
    changed = x.clone()
    changed[:, 2] += 1  # of the second scale: tokens 1 to 4
    after = student.predict(changed, [0], t)[0]
    moved = (after != before).any(-1)[0]
    assert moved.tolist() == [False, False, True, False, False, *[True] * 9]


@pytest.mark.parametrize("flags", [(True, True), (True, False), (False, False)])
def test_a_student_tells_data_from_noise_as_far_as_its_config_says(flags):
    enabled, layerwise = flags
    student = tiny_var("var-dd", n_d_embed_enable=enabled, layerwise_n_d_embed=layerwise)
    x = torch.randn(2, 14, 4, generator=torch.Generator().manual_seed(0))
    logits = [student.predict(x, [0, 1], torch.full((2,), t))[0] for t in (0, 1, 3)]
    assert torch.equal(logits[0], logits[1]) is not enabled
    assert torch.equal(logits[1], logits[2]) is not enabled


def test_a_new_student_starts_from_its_teacher():
    teacher = tiny_var()
    torch.manual_seed(0)
    network, config = new_student(teacher)
    theirs, ours = teacher.model.state_dict(), network.state_dict()
    for name in ("class_emb.weight", "blocks.1.ffn.fc1.weight", "head.bias", "word_embed.weight"):
        assert torch.equal(ours[name], theirs[name])
    assert torch.equal(ours["lvl_embed.weight"][2:], theirs["lvl_embed.weight"][1:])
    assert torch.equal(ours["pos_1LC"][:, 2:], theirs["pos_1LC"][:, 1:])
    assert config["family"] == "var-dd"
    assert config["patch_nums"] == (1, 2, 3)
    # At first data and noise differ at the input alone.
    assert not any(layer.weight.any() for layer in network.layerwise_n_d_embed)


def test_an_upstream_quirk_is_no_setting_of_llamagen():
    from tests.core.tiny import tiny_student, tiny_teacher

    teacher = tiny_teacher()
    with pytest.raises(ConfigError, match="quirk of VAR's published code"):
        tiny_student().generate(
            [0], schedule="0,teacher:1-2,2", teacher=teacher, unmasked_prefix=True
        )
