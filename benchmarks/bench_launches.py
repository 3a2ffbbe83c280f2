"""Kernels that a GPU is asked for, and waits of its host, counted without a GPU.

    python benchmarks/bench_launches.py --json benchmarks/results/launches.json

Published sizes on a device that is not here (benchmarks/fake_device.py): every operation that
reaches torch's dispatcher and is no view is one launch. A launch costs the host some five
microseconds, whatever it computes: at small batches this is what a model's speed is made of. Of
compiled blocks the launches of the program are counted that Inductor writes for an H100
(benchmarks/fake_compiler.py). What a CUDA graph would make of it is not counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from fake_compiler import launches
from fake_device import FakeDevice, Meter
from frame import Figure, about, arguments, stop_if_missed, tell, write
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ddray.config.distillation import DistillConfig
from ddray.distillation.losses import judged
from ddray.distillation.optimization import MovingAverage, batch_loss, blocks
from ddray.distillation.stream import Batch
from ddray.method.model import Tokenizer
from ddray.method.seeding import standard_normal
from ddray.method.student import Student
from ddray.method.teacher import Teacher
from ddray.models.families import empty_network, empty_tokenizer
from ddray.models.zoo import empty_student, resolve
from ddray.report.table import Column

LLAMAGEN, VAR = "llamagen-l-256", "var-d16"
CFG = {LLAMAGEN: 2.0, VAR: 4.0}
# Counted in the same way at cce412a, before anything was fused or hoisted; of a whole training step
# by reading, at 047246d.
BEFORE = {
    "LlamaGen-L, a token: kernels": 565,
    "VAR-d16, a scale: kernels": 541,
    "LlamaGen-L student, a jump: kernels": 813,
    "VAR-d16 student, a jump: kernels": 824,
    "noise of a batch: kernels": 240,
    "VAR-d16 student, a training step, compiled: kernels": 4480,
}
# Half of what a step took at 047246d, its noise, clipping, reduction and update included.
COMPILED_STEP = 2240
# Of a GPU in the configs of 8 GPUs.
ROWS = 32
COLUMNS = (
    Column("what", "what"),
    Column("before", "before", "", ".0f"),
    Column("value", "now", "", ".0f"),
    Column("bar", "bar"),
    Column("met", "met"),
)


def teacher_of(gpu: FakeDevice, name: str, dtype: torch.dtype | None = torch.bfloat16) -> Teacher:
    """A published teacher without weights on the device."""
    config = resolve(name)
    assert isinstance(config, dict)
    network, codec = empty_network(config), empty_tokenizer(config)
    if hasattr(network, "use_quantizer"):
        network.use_quantizer(codec.quantize)
    return gpu.model(Teacher(network, Tokenizer(codec), config, name), dtype=dtype)


def student_of(gpu: FakeDevice, name: str, dtype: torch.dtype | None = torch.bfloat16) -> Student:
    """Its student, likewise."""
    config = resolve(name)
    assert isinstance(config, dict)
    codec = empty_tokenizer(config)
    return gpu.model(Student(empty_student(name), Tokenizer(codec), config, name), dtype=dtype)


def of_a_stage(name: str) -> tuple[Counter[str], int]:
    """Kernels of a guided stage of trajectories, as all but the first have, and waits of some."""
    gpu = FakeDevice()
    teacher = teacher_of(gpu, name)
    counts, waits, stages = [], 0, teacher.stages
    for stop in (2, 3):
        teacher.stages = stages[:stop]
        with gpu.here() as meter:
            teacher.trajectories([1, 2], [0, 1], seed=1, cfg=CFG[name])
        counts.append(meter.kernels)
        waits = meter.waits
    return counts[1] - counts[0], waits


def of_a_call(name: str) -> Meter:
    """One jump of a student, noise and reading included, pixels not."""
    gpu = FakeDevice()
    student = student_of(gpu, name)
    with gpu.here() as meter:
        student.generate([1, 2], seed=1)
    return meter


def of_a_training_step(name: str, *, without_compiled: bool = False) -> Meter:
    """Forward and backward pass in float32, loss included, optimizer not.

    Args:
        name: of the teacher.
        without_compiled: leave out what happens inside blocks and loss.
    """
    gpu = FakeDevice("meta")
    teacher, student = teacher_of(gpu, name, None), student_of(gpu, name, None)
    config, rows = DistillConfig(), 4
    network = student.model.requires_grad_(True).train()
    for block in blocks(network) if without_compiled else ():
        block.forward = _Nothing.apply  # type: ignore[method-assign, assignment]
    with gpu.here() as meter:
        index = torch.arange(rows, device="meta")
        shape = (rows, teacher.num_tokens, teacher.codebook.shape[1])
        tokens = torch.zeros(shape[:2], dtype=torch.long, device="meta")
        batch = Batch(torch.randn(shape, device="meta"), tokens, index, index)
        meter.kernels.clear()
        losses = batch_loss(
            *(network, batch, teacher.stages, teacher.codebook),
            first=0,
            schedule=(0, 1),
            logits_weight=config.logits_weight,
            code_weight=config.code_weight,
            judge=_nothing_judged if without_compiled else None,
        )
        losses.total.backward()
    return meter


class _Nothing(torch.autograd.Function):
    """A block that launches nothing, with gradients for all that it was given."""

    @staticmethod
    def forward(ctx: Any, *given: Any) -> Tensor:
        ctx.given = given
        return torch.empty_like(given[0])

    @staticmethod
    def backward(ctx: Any, *_: Any) -> tuple[Tensor | None, ...]:
        needed = zip(ctx.given, ctx.needs_input_grad, strict=True)
        return tuple(torch.empty_like(given) if needs else None for given, needs in needed)


class _NoLoss(_Nothing):
    """A loss that launches nothing."""

    @staticmethod
    def forward(ctx: Any, *given: Any) -> Tensor:
        ctx.given = given
        return torch.empty_like(given[0][0, 0, 0])


def _nothing_judged(logits: Tensor, codes: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return (_NoLoss.apply(logits, codes),) * 5


def of_the_compiled_loss(name: str) -> Counter[str]:
    """Forward and backward pass of what judges both heads."""
    student = empty_student(name)
    sizes, length = student.config, sum(student.stages)

    def inputs() -> list[Any]:
        logits = torch.empty(ROWS, length, sizes.vocab_size, requires_grad=True)
        codes = torch.empty(ROWS, length, sizes.codebook_dim, requires_grad=True)
        tokens = torch.empty(ROWS, length, dtype=torch.long)
        asked = torch.empty(ROWS, length, dtype=torch.bool)
        return [
            logits,
            codes,
            torch.empty_like(codes).detach(),
            tokens,
            asked,
            1.0,
            torch.empty(()),
        ]

    return Counter(launches(judged, inputs))


def of_compiled_blocks(name: str) -> tuple[Counter[str], int]:
    """Forward and backward pass of a block with the rows of a GPU, and how many there are."""
    student = empty_student(name)
    length, width = sum(student.stages), student.config.embed_dim

    def inputs() -> list[Any]:
        x, condition = torch.empty(ROWS, length + 1, width), torch.empty(ROWS, width)
        mark, mask = torch.empty(2, width), torch.empty(1, 1, length + 1, length + 1)
        is_data = torch.empty(ROWS, length + 1, 1, dtype=torch.bool)
        for tensor in (x, condition, mark):
            tensor.requires_grad_(True)
        return [x, condition, is_data, mark, mask]

    with FakeTensorMode():
        block = type(student.blocks[0])(student.config)
    return Counter(launches(block, inputs)), len(student.blocks)


def of_a_compiled_step(name: str) -> Counter[str]:
    """As `of_a_training_step`, with compiled blocks and a compiled loss."""
    of_block, number = of_compiled_blocks(name)
    rest = of_a_training_step(name, without_compiled=True).kernels
    of_loss = of_the_compiled_loss(name)
    return rest + Counter({key: number * n + of_loss[key] for key, n in of_block.items()})


def of_an_update(name: str) -> Meter:
    """Clipping, AdamW and the moving average of a student, over all its parameters."""
    gpu = FakeDevice()
    student = student_of(gpu, name, None)
    weights = [*student.model.requires_grad_(True).parameters()]
    with gpu.here() as meter:
        for weight in weights:
            weight.grad = torch.empty_like(weight)
        optimizer = torch.optim.AdamW(weights, fused=True)
        average = MovingAverage(weights, 0.99)
        optimizer.step()  # makes the moments
        meter.kernels.clear()
        nn.utils.clip_grad_norm_(weights, 1.0, foreach=True)  # as it chooses on a GPU
        optimizer.step()
        average.update(weights, 0)
    return meter


def of_noise() -> Meter:
    """The noise of a batch on the device."""
    gpu = FakeDevice()
    with gpu.here() as meter:
        index = torch.arange(64, device="cuda")
        meter.kernels.clear()
        standard_normal(1, index, (680, 32))
    return meter


def measured() -> tuple[list[Figure], dict[str, Any]]:
    """All figures, and what each count consists of."""
    kinds: dict[str, Any] = {}
    figures = []
    for what, name, bar in (("LlamaGen-L, a token", LLAMAGEN, 380), ("VAR-d16, a scale", VAR, 340)):
        kernels, waits = of_a_stage(name)
        kinds[what] = dict(kernels.most_common())
        figures += [
            Figure(f"{what}: kernels", kernels.total(), most=bar),
            Figure(f"{what.split(',')[0]}: waits of a batch of trajectories", waits, most=1),
        ]
    counted: dict[str, Callable[[], Meter]] = {
        "LlamaGen-L student, a jump": lambda: of_a_call(LLAMAGEN),
        "VAR-d16 student, a jump": lambda: of_a_call(VAR),
        "VAR-d16 student, forward and backward": lambda: of_a_training_step(VAR),
        "VAR-d16 student, clipping, AdamW and average": lambda: of_an_update(VAR),
        "noise of a batch": of_noise,
    }
    for what, count in counted.items():
        meter = count()
        kinds[what] = dict(meter.kernels.most_common())
        figures.append(Figure(f"{what}: kernels", meter.kernels.total()))
        if "jump" in what:
            figures.append(Figure(f"{what}: waits", meter.waits, most=1))
    what = "VAR-d16 student, a training step, compiled"
    step = of_a_compiled_step(VAR) + of_an_update(VAR).kernels + of_noise().kernels
    kinds[what] = dict(step.most_common())
    figures.append(Figure(f"{what}: kernels", step.total(), most=COMPILED_STEP))
    return figures, kinds


def main() -> None:
    """Count, print, write; exit status 1 if a bar is missed."""
    assert __doc__
    args = arguments(__doc__).parse_args()
    result = about("torch")
    figures, kinds = measured()
    rows = [figure.row() | {"before": BEFORE.get(figure.what)} for figure in figures]
    result |= {"figures": rows, "kernels": kinds}
    tell(result, "Launches", (rows, COLUMNS))
    write(args.json, result)
    stop_if_missed(figures)


if __name__ == "__main__":
    main()
