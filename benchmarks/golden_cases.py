"""What the golden cases of both families share: fixtures, and a decoder that is told tokens."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ddray.method.student import Student
from ddray.method.teacher import Teacher
from ddray.storage.checkpoint import load_into

GOLDEN = Path(__file__).parents[1] / "tests" / "golden"

Tensors = dict[str, Tensor]
Pairs = Iterator[tuple[str, Tensor, Tensor]]
"""Name of a quantity, ddray's value, upstream's."""


def weights(name: str) -> Tensors:
    """A state dict of the fixtures."""
    return load_file(GOLDEN / "weights" / f"{name}.safetensors")


def some(config: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {name: config[name] for name in names}


def stages_of(tensors: Tensors, prefix: str, count: int) -> Tensor:
    """Ids of all scales, int64 [B, L]."""
    return torch.cat([tensors[f"{prefix}.{k}"] for k in range(count)], 1)


def forced(
    teacher: Teacher, cond: Any, tokens: Tensor, prefix: Tensor | None = None, **options: bool
) -> Tensor:
    """Logits of every stage of a cached decoder that is told the tokens, [B, l, V]."""
    starts = teacher.stage_starts()
    decoder = teacher.model.decoder(cond, prefix, **options)
    first = 0 if prefix is None else starts.index(prefix.shape[1])
    rows, at, stage = [], 0, first
    while at < tokens.shape[1]:
        rows.append(decoder.logits())
        decoder.append(tokens[:, at : at + teacher.stages[stage]])
        at += teacher.stages[stage]
        stage += 1
    return torch.cat(rows, 1)


def with_null(teacher: Teacher, cond: Tensor) -> Tensor:
    return torch.cat((cond, torch.full_like(cond, teacher.num_classes)))


def jumps_of(student: Student, t: Tensors, name: str, steps: list[int], split: int) -> Pairs:
    codes = student.generate(t["in/label"], noise=t["in/noise"], schedule=steps, split=split)
    yield f"{name}: codes", codes, t[f"out/{name}.{len(steps) - 1}.sequence"]
    if f"out/{name}.f_hat" in t:
        *_, latent = student.tokenizer.module.quantize.latents(codes)
        yield f"{name}: latent", latent, t[f"out/{name}.f_hat"]
    if f"out/{name}.image" in t:
        yield f"{name}: image", student.decode(codes), t[f"out/{name}.image"].clamp(0, 1)


def data_as_logits(student: Student, x: Tensor, logits: Tensor, given: Tensor) -> Tensor:
    """Upstream's logits where a token is given: 0 at the nearest id, -inf elsewhere."""
    nearest = student.tokenizer.module.nearest(x)[..., None]
    sure = torch.full_like(logits, -torch.inf).scatter(-1, nearest, 0.0)
    return torch.where(given[..., None], sure, logits)


def with_teacher(start: int, last: int) -> str:
    """The schedule in which a teacher writes stages start, ..., last - 1."""
    part = f"teacher:{start}-{last},{last}"
    return f"0,{part}" if start else part


def continued(teacher: Teacher, t: Tensors, prefix: Tensor, last: int, **settings: Any) -> Tensor:
    label = t["in/label"]
    index = torch.arange(len(label))
    return teacher.continue_from(label, prefix, last, seed=0, index=index, top_k=1, **settings)


def initialised(student: nn.Module, before: str, teacher: nn.Module, trained: str) -> Tensors:
    load_into(teacher, weights(trained), trained)
    load_into(student, weights(before), before)
    student.init_from_teacher(teacher, torch.empty(0), faithful_to_upstream=True)
    return dict(student.state_dict())
