"""A caption is encoded once while it is in use, and what is kept is what the encoder gave."""

import gc
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import Tensor

from ddray.serving import rendering
from ddray.serving.rendering import ImageJob, Renderer
from tests.core.tiny import DrawnEncoder, tiny_student, tiny_teacher

TEXT = {"cls_token_num": 5, "caption_dim": 3}


def test_a_caption_is_encoded_once_whatever_is_asked_of_it() -> None:
    student, encoder = tiny_student(**TEXT), DrawnEncoder()
    renderer = Renderer(student, encoder=encoder, rows=2)
    assert renderer.new_encodings() == 0
    jobs = [ImageJob("a red cat", k % 4, k) for k in range(5)]
    images = renderer.images(jobs, "0")
    assert renderer.new_encodings() == 2  # and one to see which passes agree
    assert np.array_equal(renderer.images(jobs[::-1], "0"), images[::-1])
    assert renderer.new_encodings() == 0
    another = Renderer(student, encoder=encoder, rows=2)
    assert np.array_equal(another.images(jobs[:1], "0"), images[:1])


def test_what_is_kept_is_to_the_bit_what_the_encoder_gave() -> None:
    encoder = DrawnEncoder()
    renderer = Renderer(tiny_student(**TEXT), tiny_teacher(**TEXT), encoder)
    for _ in range(2):
        for schedule in ("0", "teacher"):
            renderer.images([ImageJob("a red cat", 0, 0)], schedule)
        kept = renderer._condition(["a red cat"])
        assert all(map(torch.equal, kept, encoder(["a red cat"])))
        kept[0].fill_(0.0)  # as whoever is given it may
    assert encoder.calls.count(["a red cat"]) == 1 + 2


def test_the_least_recently_used_captions_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendering, "_KEPT_CAPTIONS", 2)
    encoder = DrawnEncoder()
    renderer = Renderer(tiny_student(**TEXT), encoder=encoder)
    for caption in ("a", "b", "a", "c", "a", "b"):  # c takes the place of b
        renderer._condition([caption])
    assert encoder.calls == [["a"], ["b"], ["c"], ["b"]]


def test_a_caption_that_failed_is_asked_for_again() -> None:
    calls = []

    def encoder(captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        calls.append(captions)
        if len(calls) == 1:
            raise RuntimeError("out of memory")
        return DrawnEncoder()(captions)

    renderer = Renderer(tiny_student(**TEXT), encoder=encoder)
    with pytest.raises(RuntimeError):
        renderer._condition(["a cat"])
    assert renderer._condition(["a cat"])[0].shape == (1, 5, 3)


def test_threads_may_share_what_is_kept() -> None:
    encoder, captions = DrawnEncoder(), [f"cat {k}" for k in range(40)]
    renderer = Renderer(tiny_student(**TEXT), encoder=encoder)
    alone = [encoder([caption])[0] for caption in captions]
    with ThreadPoolExecutor(8) as threads:
        for features, _ in threads.map(renderer._condition, [captions] * 16):
            assert torch.equal(features, torch.cat(alone))
    assert renderer.new_encodings() >= 40


def test_a_renderer_that_is_dropped_leaves_its_memory_at_once() -> None:
    renderer = Renderer(tiny_student(**TEXT), encoder=DrawnEncoder())
    renderer._condition(["a cat"])
    gone = weakref.ref(renderer)
    gc.disable()
    try:
        del renderer
        assert gone() is None
    finally:
        gc.enable()
