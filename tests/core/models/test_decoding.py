"""Facts about the decoder: the pixels of its plain operations, and what it may do without them."""

import copy

import pytest
import torch

from benchmarks.plain_decoder import plain_decode
from ddray.errors import ConfigError
from ddray.method.model import Tokenizer
from ddray.models import autoencoder
from ddray.models.llamagen_vq import LlamaGenVQ, LlamaGenVQConfig
from ddray.models.var_vq import VARVQ, VARVQConfig
from ddray.models.zoo import load_student, load_teacher
from tests.core.tiny import LargestTensor, teacher_config, teacher_state, tokenizer_state

SIZES = {"ch": 32, "ch_mult": (1, 1, 2), "num_res_blocks": 1, "z_channels": 8}
SIDE = 8


@pytest.fixture(params=["llamagen", "var"])
def module(request):
    """A tokenizer without trained weights: fused attention or not, levels in either order."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if request.param == "llamagen":
            codec = LlamaGenVQ(LlamaGenVQConfig(codebook_size=16, **SIZES))
        else:
            codec = VARVQ(VARVQConfig(vocab_size=16, patch_nums=(1, 3, SIDE), **SIZES))
    return codec.requires_grad_(False).eval()


def codes_of(module, batch):
    count = sum(p * p for p in getattr(module.config, "patch_nums", (SIDE,)))
    tokens = torch.randint(16, (batch, count), generator=torch.Generator().manual_seed(1))
    return module.codebook[tokens]


def plain_pixels(module, codes):
    with torch.no_grad():
        raw = plain_decode(module.decoder, module.post_quant_conv(module.decoder_input(codes)))
    return raw.add(1).div(2).clamp(0, 1)


def test_pixels_are_those_of_plain_operations(module):
    codes = codes_of(module, 3)
    images = Tokenizer(module).decode(codes)
    expected = plain_pixels(module, codes)
    assert images.dtype == torch.float32 and images.is_contiguous()
    assert images.shape == (3, 3, 4 * SIDE, 4 * SIDE) and images.std() > 0.05
    # Far within one level of 255: only sums are taken in another order.
    torch.testing.assert_close(images, expected, atol=1e-5, rtol=0)


def test_what_is_differentiated_is_the_same_too(module):
    latent = module.post_quant_conv(module.decoder_input(codes_of(module, 2)))
    weights = torch.randn(2, 3, 4 * SIDE, 4 * SIDE, generator=torch.Generator().manual_seed(2))
    kernel = next(m for m in module.decoder.modules() if isinstance(m, autoencoder.Upsample)).conv
    kernel.requires_grad_(True)
    found = []
    for decode in (module.decoder, lambda x: plain_decode(module.decoder, x)):
        x = latent.clone().requires_grad_(True)
        out = (decode(x) * weights).sum()
        found.append(torch.autograd.grad(out, (x, kernel.weight)))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4 * theirs.abs().max(), rtol=0)


@pytest.mark.parametrize("name", ["digits-llamagen-dd", "digits-var-dd"])
def test_in_bfloat16_pixels_stay_close(name):
    student = load_student(name, device="cpu")
    codes = student.generate([3, 7])
    rounded = Tokenizer(student.tokenizer.module, decode_dtype=torch.bfloat16).decode(codes)
    error = (rounded - student.decode(codes)).square().mean()
    assert rounded.dtype == torch.float32
    assert 45 <= -10 * torch.log10(error) < 100


def test_in_bfloat16_only_the_higher_resolutions_are(module):
    before = copy.deepcopy(module.state_dict())
    tokenizer = Tokenizer(module, decode_dtype=torch.bfloat16)
    fingerprint = Tokenizer(module).fingerprint
    tokenizer.decode(codes_of(module, 1))
    assert tokenizer.codebook.dtype == torch.float32
    assert tokenizer.fingerprint == fingerprint
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    lowered = module.decoder.lowered(torch.bfloat16)
    assert lowered.conv_out.weight.dtype == torch.bfloat16
    assert lowered.conv_in is module.decoder.conv_in and lowered.mid is module.decoder.mid
    assert module.decoder.lowered(torch.float32) is module.decoder


def test_the_loaders_take_the_decoders_dtype():
    def load(**options):
        weights = {"checkpoint": teacher_state(), "tokenizer": tokenizer_state()}
        return load_teacher(teacher_config(), **weights, **options)

    assert load().tokenizer.decode_dtype == torch.float32
    teacher = load(decode_dtype="bfloat16")
    assert teacher.tokenizer.decode_dtype == torch.bfloat16
    assert teacher.fingerprint == load().fingerprint
    with pytest.raises(ConfigError, match="decode_dtype=float16 overflows in a decoder"):
        load(decode_dtype="float16")


def test_no_activation_holds_more_images_than_a_pass(module, monkeypatch):
    codes = codes_of(module, 3)
    expected = Tokenizer(module).decode(codes)
    one = SIZES["ch"] * (4 * SIDE) ** 2
    monkeypatch.setattr(autoencoder, "_PASS_BYTES", 2 * 4 * one)
    with LargestTensor() as watch:
        images = Tokenizer(module).decode(codes)
    assert watch.elements == 2 * one
    torch.testing.assert_close(images, expected, atol=1e-5, rtol=0)
