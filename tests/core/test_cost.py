"""The arithmetic of costs against what torch counts: parameters, operations, bytes kept."""

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from ddray.config.distillation import DistillConfig
from ddray.config.encoding import EncodeConfig
from ddray.config.evaluation import EvaluateConfig
from ddray.config.generation import GenerateConfig
from ddray.config.sampling import SampleConfig
from ddray.config.serving import ServeConfig
from ddray.cost import (
    estimate_distill,
    estimate_encode,
    estimate_evaluate,
    estimate_generate,
    estimate_sample,
    estimate_serve,
    memory,
    mfu,
)
from ddray.distillation.losses import distillation_loss
from ddray.distillation.optimization import recompute_activations
from ddray.errors import ConfigError
from ddray.method.conditioning import Captions
from ddray.models.llamagen_dd import LlamaGenStudent, LlamaGenStudentConfig
from ddray.models.sizes import forward_flops, step_flops
from ddray.models.var_dd import VARStudent, VARStudentConfig
from ddray.models.zoo import empty_masked, empty_student
from ddray.storage.checkpoint import save_folder
from ddray.text.averaging import AveragingConfig, DeepAveraging
from ddray.text.t5 import FLAN_T5_XL, t5_config, t5_flops
from ddray.text.words import WordEncoder
from tests.core.counting import counter
from tests.core.tiny import student_config, student_state, tokenizer_state

ROWS = 4


def _llamagen(**other: Any) -> LlamaGenStudent:
    sizes = {"dim": 256, "n_layer": 3, "n_head": 4, "vocab_size": 512, "num_classes": 10}
    return LlamaGenStudent(LlamaGenStudentConfig(**{**sizes, "block_size": 64, **other}))


def _var(**other: Any) -> VARStudent:
    sizes = {"depth": 3, "embed_dim": 256, "num_heads": 4, "vocab_size": 512, "num_classes": 10}
    scales = {"patch_nums": (1, 2, 3, 4, 5), "codebook_dim": 8}
    return VARStudent(VARStudentConfig(**{**sizes, **scales, **other}))


STUDENTS = {
    "llamagen": _llamagen,
    "captions": lambda: _llamagen(cls_token_num=12, caption_dim=32),
    "var": _var,
    "var, shared": lambda: _var(shared_aln=True),
}


def _loss(student: Any) -> torch.Tensor:
    tokens, codes = sum(student.stages), torch.randn(512, 8)
    cond: Any = torch.zeros(ROWS, dtype=torch.int64)
    if student.conditioning == "text":
        cond = Captions(torch.randn(ROWS, 12, 32), torch.ones(ROWS, 12, dtype=torch.bool))
    noise, t = torch.randn(ROWS, tokens, 8), torch.zeros(ROWS, dtype=torch.int64)
    target = torch.randint(512, (ROWS, tokens))
    return distillation_loss(student, student.stages, codes, noise, target, cond, t).total


@pytest.mark.parametrize("name", STUDENTS)
def test_operations_are_those_that_torch_counts(name: str) -> None:
    student = STUDENTS[name]()
    # Attention as plain products, which the counter sees on a CPU.
    with sdpa_kernel(SDPBackend.MATH):
        with counter() as forward:
            loss = _loss(student)
        with counter() as backward:
            loss.backward()
    counted = forward.get_total_flops()
    # The layers that act on two vectors a batch, whatever its size.
    marks = sum(
        2 * 2 * layer.weight.numel() for layer in getattr(student, "layerwise_n_d_embed", ())
    )
    assert ROWS * forward_flops(student) == counted - marks
    # No gradient goes to noise or captions.
    assert step_flops(student, ROWS) == pytest.approx(
        counted + backward.get_total_flops(), rel=0.02
    )


def _kept_bytes(student: Any, precision: str) -> int:
    """Of all that autograd keeps, weights and their 16-bit copies left out."""
    weights = [*student.parameters(), *student.buffers()]
    left_out = {tensor.untyped_storage().data_ptr() for tensor in weights}
    shapes = {shape for w in weights if w.dim() == 2 for shape in (w.shape, w.T.shape)}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in left_out and tensor.shape not in shapes:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    cast = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16")
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), cast:
        _loss(student)
    return sum(kept.values())


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["llamagen", "var"])
def test_activations_are_what_autograd_keeps_and_the_gradient_of_the_logits(
    name: str, precision: str
) -> None:
    student = STUDENTS[name]()
    config = DistillConfig(batch_size=ROWS, precision=precision)  # type: ignore[arg-type]
    assert 1.0 < memory(student, config, 1).activations / _kept_bytes(student, precision) < 1.25


def test_a_block_that_is_computed_again_keeps_its_input() -> None:
    shallow, deep = _llamagen(n_layer=2), _llamagen(n_layer=6)
    for student in (shallow, deep):
        recompute_activations(student)
    config = DistillConfig(batch_size=ROWS, activation_checkpointing=True)
    estimated = [memory(student, config, 1).activations for student in (shallow, deep)]
    kept = [_kept_bytes(student, "float32") for student in (shallow, deep)]
    assert estimated[1] - estimated[0] == kept[1] - kept[0] == 4 * ROWS * 65 * 256 * 4


def test_states_are_parted_by_the_stages_of_zero() -> None:
    student = empty_student("llamagen-b-256")
    whole = 4 * 98_321_672  # bytes of the published student in float32
    held = {}
    for zero in (0, 1, 2, 3):
        needed = memory(student, DistillConfig(batch_size=64, zero=zero), 8)
        held[zero] = (needed.on_device - needed.activations) / whole
        assert needed.offloaded == 0
    # Weights, gradients, two moments, average; parted ones an eighth; masters from stage 1 on.
    assert held == pytest.approx({0: 5, 1: 2 + 5 / 8, 2: 1 + 5 / 8, 3: 6 / 8})
    on_cpu = memory(student, DistillConfig(batch_size=64, zero=2, offload_optimizer=True), 8)
    assert on_cpu.offloaded == pytest.approx(whole * 4 / 8)


def test_utilisation_is_a_share_of_the_peak_of_known_devices() -> None:
    assert mfu(989e12, 2.0, "NVIDIA H100 80GB HBM3", 1) == 0.5
    assert mfu(8 * 312e12, 4.0, "NVIDIA A100-SXM4-80GB", 8) == 0.25
    assert mfu(756e12, 1.0, "NVIDIA H100 PCIe", 1) == 1.0
    assert mfu(1e12, 1.0, "cpu", 1) is None


def test_a_masked_model_is_priced_by_its_own_sizes() -> None:
    masked = empty_masked("llamagen-b-256")
    tokens = torch.zeros(2, 256, dtype=torch.int64, device="meta")
    with sdpa_kernel(SDPBackend.MATH), counter() as counted:
        masked(tokens, tokens[:, 0])
    assert 2 * forward_flops(masked) == counted.get_total_flops()
    config = DistillConfig(objective="masked", teacher="llamagen-b-256", data="none")
    millions = sum(p.numel() for p in masked.parameters()) / 1e6
    assert estimate_distill(config)["student"] == f"{millions:.1f} million parameters"


def test_an_estimate_needs_no_weights_and_no_set() -> None:
    job = {"data": "/nowhere", "use_gpu": True, "batch_size": 256, "precision": "bfloat16"}
    told = estimate_distill(DistillConfig(teacher="var-d16", workers=8, **job))  # type: ignore[arg-type]
    assert told["student"] == "328.2 million parameters"
    # Three times the forward pass of 256 rows, 1000 steps, at 0.4 x 989 teraflops.
    hours = 3 * 256 * forward_flops(empty_student("var-d16")) * 1000 / (0.4 * 989e12) / 3600
    assert told["gpu_hours"].startswith(f"{hours:.3g} of H100s")
    unknown = estimate_distill(DistillConfig(**job))  # type: ignore[arg-type]
    assert unknown["cost"].startswith("unknown without set or teacher: ")
    with pytest.raises(ConfigError, match="no student is known for family 'var-dd'"):
        estimate_distill(DistillConfig(teacher="digits-var-dd", **job))  # type: ignore[arg-type]


def test_the_encoder_of_captions_is_told_beside_the_model() -> None:
    teacher = SampleConfig(teacher="llamagen-t2i-xl-256", captions="captions.parquet")
    told = estimate_sample(teacher)["text_encoder"]
    found = re.fullmatch(r"google/flan-t5-xl, ([\d.]+)% of all .* has 15 positions; .*", told)
    assert found
    share = float(found[1])
    own = t5_flops(t5_config(FLAN_T5_XL), 15)
    model = 2 * forward_flops(empty_student("llamagen-t2i-xl-256"))
    assert share == pytest.approx(100 * own / (own + model), abs=0.05)
    assert share <= 5


@pytest.fixture
def text_student(tmp_path: Path) -> str:
    """A student of captions of a few kilobytes, which is its own teacher."""
    sizes, folder = {"cls_token_num": 5, "caption_dim": 3}, str(tmp_path / "student")
    config = {**student_config(**sizes), "teacher": folder}
    save_folder(folder, config, model=student_state(**sizes), tokenizer=tokenizer_state())
    return folder


def _held(student: str, encoder: str | None) -> list[str]:
    """What each job says that it holds."""
    given = {"text_encoder": encoder}
    # As every replica holds the encoder once, two students need no more.
    served = ServeConfig(student=(student, student), models_per_replica=2, teacher=False, **given)
    evaluated = EvaluateConfig(student=student, teacher=student, **given)
    return [
        estimate_generate(GenerateConfig(student=student, **given))["gigabytes_an_actor"],
        estimate_serve(served)["gigabytes_a_replica"],
        estimate_evaluate(evaluated)["gigabytes"],
    ]


def test_the_encoder_is_counted_in_memory(text_student: str, tmp_path: Path) -> None:
    # 1 223 million numbers in bfloat16, as the published encoder has.
    for told in _held(text_student, None):
        assert re.fullmatch(r"2\.45 of weights, 2\.45 of these of google/flan-t5-xl", told)
    words, encoder = str(tmp_path / "words"), str(tmp_path / "encoder")
    pieces = [f"a{n}" for n in range(20000)]
    WordEncoder(pieces, torch.ones(len(pieces), 50), length=5, position_width=2).save(words)
    sizes = {"max_words": 5, "word_width": 52, "hidden": 256, "width": 3}
    DeepAveraging(AveragingConfig(words=words, **sizes)).save(encoder)
    # A million numbers of the table and a third of one above it, each in float32.
    for told in _held(text_student, encoder):
        found = re.fullmatch(rf"([\d.]+) of weights, ([\d.]+) of these of {encoder}", told)
        assert found
        assert float(found[2]) == pytest.approx(4 * 1.28e6 / 1e9, rel=0.1)
        assert float(found[1]) > float(found[2])


def test_an_encoder_that_is_not_there_is_not_counted(
    monkeypatch: pytest.MonkeyPatch, text_student: str
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    job = SampleConfig(teacher="llamagen-t2i-xl-256", text_encoder="/nowhere")
    told = estimate_sample(job)["text_encoder"]
    assert told.startswith("/nowhere; not counted: captions as text need the package transformers")
    for told in _held(text_student, "/nowhere"):
        assert "of weights, without the text encoder: captions as text need the package" in told
    told = estimate_encode(EncodeConfig(text_encoder="/nowhere"))["cost"]
    assert told.startswith("unknown without the encoder: captions as text need the package")


def test_features_are_priced_as_they_are_stored_and_as_they_would_be_padded() -> None:
    told = estimate_encode(EncodeConfig(count=10**6, num_gpus=1))
    assert told["gigabytes"] == (
        "61.4 where a caption has 15 positions; padded to 120, as they are not, 492"
    )
    hours = 10**6 * t5_flops(t5_config(FLAN_T5_XL), 15) / (0.4 * 989e12) / 3600
    assert told["gpu_hours"].startswith(f"{hours:.3g} of H100s")
