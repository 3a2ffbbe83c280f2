"""A teacher of random weights and short job settings, for the tests that run whole jobs."""

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ddray.config.distillation import DistillConfig
from ddray.config.generation import GenerateConfig
from ddray.config.sampling import SampleConfig
from ddray.models.zoo import load_teacher, new_student
from ddray.storage.base import TEMPORARY
from ddray.storage.checkpoint import save_folder
from tests.core.tiny import teacher_config, teacher_state, tokenizer_state, write_text_encoder

SIZES: Mapping[str, Any] = {
    "dim": 32,
    "n_head": 4,
    "vocab_size": 32,
    "num_classes": 10,
    "block_size": 16,
    "multiple_of": 32,
}
# 16 tokens of 2x2 pixels: grey images of 8x8.
VQ: Mapping[str, Any] = {"ch_mult": [1, 2], "z_channels": 32, "in_channels": 1}


def write_teacher(folder: Path, seed: int = 0, **sizes: Any) -> str:
    """Write a teacher's folder and return its name."""
    sizes = {**SIZES, **sizes}
    config = {**teacher_config(VQ, **sizes), "default_cfg": 1.5}
    state = teacher_state(seed, **sizes)
    # Fresh weights give nearly uniform tokens; larger ones make the tokens depend on the context.
    state = {
        name: w * 8 if name.endswith("weight") and w.dim() > 1 else w for name, w in state.items()
    }
    tokenizer = tokenizer_state(**{**VQ, "codebook_size": SIZES["vocab_size"]})
    save_folder(folder, config, model=state, tokenizer=tokenizer)
    return str(folder)


def write_student(folder: Path, teacher: str) -> str:
    """Write a student as it is before the first step, and return its name."""
    model = load_teacher(teacher, device="cpu")
    network, card = new_student(model)
    tokenizer = model.tokenizer.state_dict()
    save_folder(
        folder, {**card, "schedule": [0, 8]}, model=network.state_dict(), tokenizer=tokenizer
    )
    return str(folder)


def write_text_student(folder: Path, examples: Sequence[str]) -> tuple[str, str]:
    """Write a student of captions, its teacher and its encoder; return student and encoder.

    The encoder knows nine words, of which "a red cat on the roof" is made.
    """
    teacher = write_teacher(folder / "teacher", cls_token_num=5, caption_dim=3)
    student = write_student(folder / "words", teacher)
    card = Path(student, "config.json")
    said = {"teacher": teacher, "example_captions": [*examples]}
    card.write_text(json.dumps({**json.loads(card.read_text()), **said}))
    return student, write_text_encoder(folder / "encoder", 3)


def sampling(teacher: str, out: Path, **other: Any) -> SampleConfig:
    values = {"count": 60, "shard_rows": 20, "batch_size": 8, "workers": 1, "num_evals": 6}
    return SampleConfig(**{"teacher": teacher, "out": str(out), **values, **other})


def distilling(data: Path, out: Path, **other: Any) -> DistillConfig:
    values = {"steps": 12, "batch_size": 8, "schedule": (0, 8), "threads": 1, "checkpoint_every": 6}
    more = {"log_every": 1, "ema_decay": 0.9, "seed": 3}
    return DistillConfig(**{"data": str(data), "out": str(out), **values, **more, **other})


def generating(student: str, out: Path, **other: Any) -> GenerateConfig:
    values = {"count": 25, "shard_rows": 10, "batch_size": 4, "workers": 1}
    return GenerateConfig(**{"student": student, "out": str(out), **values, **other})


def contents(folder: Path, *names: str) -> dict[str, bytes]:
    """Bytes of all files below a folder, or of those below the named parts of it.

    What a killed writer left half-written is no reader's data, so it is not among them.
    """
    files = [file for name in names or ("",) for file in sorted((folder / name).rglob("*"))]
    whole = [file for file in files if file.is_file() and not file.name.startswith(TEMPORARY)]
    return {str(file.relative_to(folder)): file.read_bytes() for file in whole}


def command(*arguments: str) -> list[str]:
    """The command line `ddray ...` of this interpreter."""
    return [sys.executable, "-m", "ddray.cli", *arguments]


def environment(**other: str) -> dict[str, str]:
    """Environment of a command that starts a Ray of its own."""
    return {**os.environ, "OMP_NUM_THREADS": "1", **other}
