"""Tiny models, golden fixtures and the chi-square test that the core tests share."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ddray.distillation.losses import distillation_loss
from ddray.distillation.optimization import compile_blocks
from ddray.method.masked_decoding import Masked
from ddray.method.seeding import noise
from ddray.method.student import Student
from ddray.method.teacher import Teacher
from ddray.models.families import empty_network, empty_tokenizer
from ddray.models.llamagen import LlamaGen, LlamaGenConfig
from ddray.models.llamagen_dd import LlamaGenStudent, LlamaGenStudentConfig
from ddray.models.llamagen_vq import LlamaGenVQ, LlamaGenVQConfig
from ddray.models.var_dd import VARStudent
from ddray.models.zoo import load_masked, load_student, load_teacher, new_masked
from tests.paths import GOLDEN

SIZES = {
    "dim": 16,
    "n_layer": 1,
    "n_head": 2,
    "vocab_size": 8,
    "num_classes": 3,
    "block_size": 4,
    "multiple_of": 16,
}
VQ_SIZES = {
    "codebook_size": 8,
    "codebook_embed_dim": 4,
    "z_channels": 4,
    "ch": 32,
    "ch_mult": [1, 1],
    "num_res_blocks": 1,
}


def golden(case: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Sizes and tensors of a golden case."""
    config = json.loads((GOLDEN / "meta" / f"{case}.json").read_text())["config"]
    return config, load_file(GOLDEN / "io" / f"{case}.safetensors")


def golden_weights(name: str) -> dict[str, Tensor]:
    return load_file(GOLDEN / "weights" / f"{name}.safetensors")


def assert_golden(actual: Tensor, expected: Tensor) -> None:
    """The pass rule of the fixtures: upstream moves by 1.4e-5 itself, a mistake by far more."""
    torch.testing.assert_close(actual, expected, atol=2e-4, rtol=1e-4)


class LargestTensor(TorchDispatchMode):
    """Watches every operation for the largest tensor that it returns."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


def teacher_state(seed: int = 0, **sizes: Any) -> dict[str, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return dict(LlamaGen(LlamaGenConfig(**{**SIZES, **sizes})).state_dict())


def tokenizer_state(seed: int = 1, **sizes: Any) -> dict[str, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return dict(LlamaGenVQ(LlamaGenVQConfig(**{**VQ_SIZES, **sizes})).state_dict())


def student_state(seed: int = 2, **sizes: Any) -> dict[str, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = LlamaGenStudentConfig(**{**SIZES, "codebook_dim": 4, **sizes})
        return dict(LlamaGenStudent(config).state_dict())


def teacher_config(vq: Mapping[str, Any] | None = None, **sizes: Any) -> dict[str, Any]:
    size = sizes.get("vocab_size", SIZES["vocab_size"])
    tokenizer = {**VQ_SIZES, "codebook_size": size, **(vq or {})}
    return {"family": "llamagen", **SIZES, **sizes, "tokenizer": tokenizer}


def student_config(vq: Mapping[str, Any] | None = None, **sizes: Any) -> dict[str, Any]:
    return {**teacher_config(vq, **sizes), "family": "llamagen-dd", "codebook_dim": 4}


def tiny_teacher(seed: int = 0, **sizes: Any) -> Teacher:
    """A random teacher of 4 tokens, 8 codes of width 4 and 3 classes, or of other `sizes`."""
    config = teacher_config(**sizes)
    codec = tokenizer_state(codebook_size=config["vocab_size"])
    return load_teacher(config, checkpoint=teacher_state(seed, **sizes), tokenizer=codec)


def tiny_student(seed: int = 2, **sizes: Any) -> Student:
    """A random student with the tokenizer of `tiny_teacher`."""
    config = student_config(**sizes)
    codec = tokenizer_state(codebook_size=config["vocab_size"])
    return load_student(config, checkpoint=student_state(seed, **sizes), tokenizer=codec)


def tiny_masked(teacher: Teacher, card: Mapping[str, Any] | None = None) -> Masked:
    """A random model of masked decoding for a teacher's tokens."""
    network, config = new_masked(teacher)
    return load_masked(
        {**config, **(card or {})},
        checkpoint=random_state(network, 3),
        tokenizer=teacher.tokenizer.state_dict(),
        device="cpu",
    )


class DrawnEncoder:
    """Draws the features of a caption from its letters: 5 positions of width 3."""

    def __init__(self) -> None:
        self.calls: list[list[str]] = []

    def __call__(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        self.calls.append([*captions])
        features, masks = zip(*map(self._drawn, captions), strict=True)
        return torch.stack(features), torch.stack(masks)

    def _drawn(self, caption: str) -> tuple[Tensor, Tensor]:
        drawn = torch.Generator().manual_seed(sum(map(ord, caption)))
        mask = torch.arange(5) < len(caption.split())
        return torch.randn(5, 3, generator=drawn) * mask[:, None], mask


def write_text_encoder(folder: Path, width: int) -> str:
    """Write a T5 of a few thousand random weights, which knows nine words, and return its name."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    names = ("<pad>", "</s>", "<unk>", "a", "red", "cat", "on", "the", "roof")
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(names)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", names.index("</s>"))]
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    sizes = {"d_kv": 4, "d_ff": 16, "num_layers": 2, "num_heads": 2, "vocab_size": len(names)}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.T5EncoderModel(transformers.T5Config(d_model=width, **sizes))
    model.save_pretrained(folder)
    return str(folder)


def write_clip(folder: Path, vocab_size: int) -> Any:
    """Write a CLIP of a few thousand random weights, without a tokenizer, and return the model.

    The first two words of its vocabulary are beginning and end.
    """
    import transformers

    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 32}
    words = {"vocab_size": vocab_size, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    config = transformers.CLIPConfig(
        text_config={**sizes, **words, "max_position_embeddings": 8},
        vision_config={**sizes, "image_size": 28, "patch_size": 14},
        projection_dim=12,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.CLIPModel(config).eval()
    model.save_pretrained(folder)
    return model


def gradient_errors(name: str, device: str, *, compiled: bool = False) -> dict[str, float]:
    """How far a bundled student's gradients in bfloat16 are from those in float32, relative.

    Args:
        name: of the student.
        device: of it.
        compiled: those in bfloat16 are of compiled blocks, by tiles where there are.
    """
    student = load_student(name, device=device)
    network, codebook, rows = student.model.train().requires_grad_(True), student.codebook, 64
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(len(codebook), (rows, student.num_tokens), generator=generator)
    start = noise(3, range(rows), (student.num_tokens, codebook.shape[1]), device)
    index = torch.arange(rows, device=device)
    t_B = torch.tensor(student.config["schedule"], device=device)[index % 2]

    def gradients(in_bfloat16: bool) -> dict[str, Tensor]:
        network.zero_grad()
        with torch.autocast(device, torch.bfloat16, enabled=in_bfloat16):
            losses = distillation_loss(
                network, student.stages, codebook, start, tokens.to(device), index % 10, t_B
            )
        losses.total.backward()
        return {k: p.grad.clone() for k, p in network.named_parameters() if p.grad is not None}

    exact = gradients(False)
    if compiled:
        if isinstance(network, VARStudent):
            network.skip_masked_tiles(torch.bfloat16)
            assert network._block_mask is not None
        compile_blocks(network)
    rounded = gradients(True)
    return {k: float((rounded[k] - g).norm() / g.norm()) for k, g in exact.items()}


def chi_square_p_value(counts: Tensor, probabilities: Tensor) -> float:
    """Pearson's test: the chance of counts at least this far from the probabilities.

    Cells without mass must be empty; the others must expect 5 counts each, for the approximation.
    """
    assert not counts[probabilities == 0].any()
    counts, expected = counts[probabilities > 0].double(), probabilities[probabilities > 0].double()
    expected = expected / expected.sum() * counts.sum()
    assert expected.min() >= 5
    statistic = ((counts - expected).square() / expected).sum()
    freedom = torch.tensor((len(counts) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom, statistic / 2))


VAR_TOKENIZER = {"vocab_size": 8, "z_channels": 4, "ch": 32, "ch_mult": [1, 1], "num_res_blocks": 1}
VAR_SIZES = {
    "depth": 2,
    "embed_dim": 16,
    "num_heads": 2,
    "num_classes": 3,
    "patch_nums": [1, 2, 3],
    "tokenizer": VAR_TOKENIZER,
}


def random_state(module: Any, seed: int = 0) -> dict[str, Tensor]:
    """Values for a module on the meta device; what follows from the sizes stays away."""
    generator = torch.Generator().manual_seed(seed)
    constants = getattr(module, "constants", dict)()
    return {
        name: torch.randn(tensor.shape, generator=generator) / 4
        for name, tensor in module.state_dict().items()
        if name not in constants
    }


def tiny_var(family: str = "var", seed: int = 0, **sizes: Any) -> Any:
    """A random VAR teacher of scales 1, 2 and 3, or its student, or one of other `sizes`."""
    config = {"family": family, **VAR_SIZES, **sizes}
    load = load_student if family == "var-dd" else load_teacher
    return load(
        config,
        checkpoint=random_state(empty_network(config), seed),
        tokenizer=random_state(empty_tokenizer(config), 1),
        device="cpu",
    )


def random_images(count: int, channels: int = 1, size: int = 8) -> np.ndarray:
    """Float images [count, channels, size, size] in [0, 1]."""
    return np.random.default_rng(count).random((count, channels, size, size), np.float32)
