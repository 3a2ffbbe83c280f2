"""Rows of a data set of captions: what of a renderer fits a plan, and how captions are read."""

import gc
import json
import weakref
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from ddray.config.generation import GenerateConfig
from ddray.models.zoo import load_student
from ddray.serving.rendering import ImageJob, Renderer, TextEncoders
from ddray.sets.conditions import open_captions
from ddray.sets.images.making import make_plan
from ddray.sets.images.orders import RowsOrder
from ddray.sets.images.plan import ImagePlan
from ddray.storage.checkpoint import save_folder
from ddray.text.words import WordEncoder
from tests.core.tiny import (
    DrawnEncoder,
    random_state,
    student_config,
    student_state,
    tiny_student,
    tokenizer_state,
)

TEXT = {"cls_token_num": 5, "caption_dim": 3}


def _write_student(folder: Path, **card: object) -> str:
    sizes = TEXT if "text_encoder" in card else {}
    config = {**student_config(**sizes), **card}
    save_folder(folder, config, model=student_state(**sizes), tokenizer=tokenizer_state())
    return str(folder)


def _write_encoder(folder: Path) -> str:
    vectors = random_state(torch.nn.Embedding(2, 1))["weight"]
    WordEncoder(["a", "_a"], vectors, length=5, position_width=2).save(folder)
    return str(folder)


def _plan(student: str, folder: Path, captions: bool, encoder: str | None = None) -> ImagePlan:
    """As `ddray generate` would have it, of one image."""
    (folder / "a.jsonl").write_text(json.dumps({"index": 0, "caption": "a red cat"}))
    given = {"captions": str(folder / "a.jsonl"), "text_encoder": encoder} if captions else {}
    config, model = GenerateConfig(student=student, count=1, **given), load_student(student)
    return make_plan(config, model, open_captions(config, model))


@pytest.mark.parametrize("told", [False, True])
def test_a_renderer_holds_what_a_plan_of_its_student_asks_for(told: bool, tmp_path: Path) -> None:
    """Whether a service was told the encoder of its students, or knows it from their configs."""
    words = _write_encoder(tmp_path / "words")
    named = words if not told else "no-encoder-of-this-name"
    students = {
        _write_student(tmp_path / "texts", text_encoder=named): True,
        _write_student(tmp_path / "classes"): False,
    }
    for student, of_captions in students.items():
        plan = _plan(student, tmp_path, of_captions, words if told else None)
        held = Renderer.load(student, text_encoder=words if told else None).held
        assert held == {name: getattr(plan, name) for name in held}
        assert held["text_encoder"] == (words if of_captions else "")


def test_students_of_one_encoder_hold_it_once_and_no_longer_than_they_are_there(
    tmp_path: Path,
) -> None:
    words = _write_encoder(tmp_path / "words")
    students = [_write_student(tmp_path / name, text_encoder=words) for name in "ab"]
    shared = TextEncoders()
    renderers = [Renderer.load(student, encoders=shared) for student in students]
    held = [renderer._encoder for renderer in renderers]
    assert held[0] is held[1] is shared.load(words, length=5, device="cpu")
    assert held[0] is not shared.load(words, length=4, device="cpu")
    assert held[0] is not Renderer.load(students[0])._encoder
    gone = weakref.ref(held[0])
    del held, renderers
    gc.collect()
    assert gone() is None


class SociableEncoder(DrawnEncoder):
    """Features that depend on how many captions are read together."""

    def __call__(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        features, mask = super().__call__(captions)
        return features * len(captions), mask


def test_captions_of_a_batch_are_read_in_one_call_and_those_of_requests_once_each() -> None:
    student, encoder = tiny_student(**TEXT), SociableEncoder()
    renderer = Renderer(student, encoder=encoder)
    words = ["a cat", "red", "on the roof", "a red cat on the", "a cat"]
    order = RowsOrder("tiny", np.array(words, object), np.arange(5), 7, "0", "tokens")
    codes = student.generate(SociableEncoder()(words), seed=7, index=range(5))
    expected = student.tokenizer.module.nearest(codes).numpy()
    for _ in range(2):
        np.testing.assert_array_equal(renderer.rows(order), expected)
    assert encoder.calls == [words, words]
    assert renderer.new_encodings() == 10
    renderer.images([ImageJob(word, 0, 7) for word in words], "0")
    assert sorted(encoder.calls[2:]) == sorted([word] for word in {"a photo", *words})
    assert renderer.new_encodings() == 5
