"""Facts about the LlamaGen tokenizer: upstream's numbers, and what is normalised."""

import pytest
import torch

from ddray.errors import ConfigError
from ddray.models.llamagen_vq import LlamaGenVQ, LlamaGenVQConfig
from ddray.models.zoo import load_teacher
from tests.core.tiny import (
    assert_golden,
    golden,
    golden_weights,
    teacher_config,
    teacher_state,
    tiny_teacher,
)

SIZE_NAMES = ("codebook_size", "codebook_embed_dim", "z_channels", "ch", "ch_mult")


@pytest.fixture(scope="module")
def upstream():
    config, tensors = golden("lg_vq")
    sizes = {name: config[name] for name in (*SIZE_NAMES, "num_res_blocks", "codebook_l2_norm")}
    network = {"vocab_size": 96, "block_size": 16}
    teacher = load_teacher(
        teacher_config(sizes, **network),
        checkpoint=teacher_state(**network),
        tokenizer=golden_weights("lg_vq"),
        device="cpu",
    )
    return tensors, teacher


def rows(cells):
    """[B, E, g, g] to [B, L, E] in raster order."""
    return cells.flatten(2).transpose(1, 2)


def test_the_codebook_lies_on_the_unit_sphere(upstream):
    tensors, teacher = upstream
    assert_golden(teacher.codebook, tensors["out/codebook_normalised"])
    assert teacher.codebook.dtype == torch.float32
    assert not teacher.codebook.requires_grad


def test_decoding_ids_matches_upstream(upstream):
    tensors, teacher = upstream
    ids = tensors["in/decode_code.indices"]
    assert_golden(teacher.codebook[ids], rows(tensors["out/decode_code.embeddings"]))
    with torch.inference_mode():
        raw = teacher.tokenizer.module.decode(teacher.codebook[ids])
    assert_golden(raw, tensors["out/decode_code.image"])
    assert_golden(teacher.decode(ids), (tensors["out/decode_code.image"] / 2 + 0.5).clamp(0, 1))


def test_decoding_vectors_neither_normalises_nor_snaps(upstream):
    tensors, teacher = upstream
    with torch.inference_mode():
        raw = teacher.tokenizer.module.decode(rows(tensors["in/decode.embeddings"]))
    assert_golden(raw, tensors["out/decode.image"])


def test_encoding_matches_upstream(upstream):
    tensors, teacher = upstream
    image = tensors["in/encode.image"]
    assert torch.equal(teacher.encode(image / 2 + 0.5), tensors["out/encode.indices"])
    module = teacher.tokenizer.module
    with torch.inference_mode():
        assert_golden(module.quant_conv(module.encoder(image)), tensors["out/encode.latent"])
        assert torch.equal(module.encode(image), tensors["out/encode.indices"])
    assert_golden(
        teacher.codebook[tensors["out/encode.indices"]], rows(tensors["out/encode.quant"])
    )


def test_nearest_is_the_first_code_at_the_least_distance(upstream):
    _, teacher = upstream
    x = torch.randn(3, 16, 8, generator=torch.Generator().manual_seed(2))
    distance = (x[:, :, None] - teacher.codebook).square().sum(-1)
    assert torch.equal(teacher.tokenizer.module.nearest(x), distance.argmin(-1))
    ids = torch.arange(96)[None]
    assert torch.equal(teacher.tokenizer.module.nearest(teacher.codebook[ids]), ids)


def test_without_the_norm_the_stored_codes_are_used():
    config = LlamaGenVQConfig(codebook_size=4, codebook_embed_dim=2, ch=32, codebook_l2_norm=False)
    with torch.device("meta"):
        module = LlamaGenVQ(config)
    module.quantize.embedding.weight = torch.nn.Parameter(torch.tensor([[3.0, 4.0]] * 4))
    assert module.codebook.tolist() == [[3.0, 4.0]] * 4


def test_images_lie_between_zero_and_one():
    teacher = tiny_teacher()
    teacher.tokenizer.module.decoder.conv_out.weight.mul_(100)
    images = teacher.decode(torch.randn(2, 4, 4, generator=torch.Generator().manual_seed(0)))
    assert images.shape == (2, 3, 4, 4)
    assert images.min() == 0
    assert images.max() == 1


def test_grey_images_have_one_channel():
    config = LlamaGenVQConfig(codebook_size=4, z_channels=4, ch=32, ch_mult=(1, 1), in_channels=1)
    module = LlamaGenVQ(config)
    assert module.decode(torch.zeros(1, 9, 8)).shape == (1, 1, 6, 6)
    assert module.encode(torch.zeros(1, 1, 6, 6)).shape == (1, 9)


def test_parameters_have_the_published_count():
    for ch_mult, keys, parameters in (
        ((1, 1, 2, 2, 4), 344, 71_883_403),
        ((1, 2, 2, 4), 300, 70_109_835),
    ):
        with torch.device("meta"):
            module = LlamaGenVQ(LlamaGenVQConfig(ch_mult=ch_mult))
        assert len(module.state_dict()) == keys
        assert sum(p.numel() for p in module.parameters()) == parameters


def test_a_width_that_does_not_suit_the_norm_is_refused():
    with pytest.raises(ConfigError, match=r"ch=48 must be a multiple of 32 \(GroupNorm\)"):
        LlamaGenVQConfig(ch=48)
