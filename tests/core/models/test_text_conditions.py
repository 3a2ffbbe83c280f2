"""Facts about text models that are asked for by texts: they bring the encoder of their training."""

import pytest
import torch

from ddray.errors import ConfigError
from ddray.models.zoo import load_student, load_teacher
from ddray.text.words import WordEncoder
from tests.core.tiny import (
    student_config,
    student_state,
    teacher_config,
    teacher_state,
    tiny_teacher,
)

SIZES = {"cls_token_num": 4, "caption_dim": 5}
TEXTS = ["a cat", "red cat"]


@pytest.fixture
def words(tmp_path):
    vectors = torch.randn(3, 3, generator=torch.Generator().manual_seed(1))
    words = WordEncoder(("_a", "_cat", "_red"), vectors.half(), length=4, position_width=2)
    words.save(tmp_path)
    return words


def test_texts_are_read_by_the_encoder_that_the_config_names(words, tmp_path):
    card = {"tokenizer": None, "text_encoder": str(tmp_path)}
    teacher = load_teacher(
        {**teacher_config(**SIZES), **card}, checkpoint=teacher_state(**SIZES), device="cpu"
    )
    tokens = teacher.sample(TEXTS, cfg=2.0, seed=3)
    assert torch.equal(tokens, teacher.sample(words(TEXTS), cfg=2.0, seed=3))
    assert torch.equal(tokens, teacher.sample(tuple(TEXTS), cfg=2.0, seed=3))
    student = load_student(
        {**student_config(**SIZES), **card}, checkpoint=student_state(**SIZES), device="cpu"
    )
    x, t = torch.randn(2, student.num_tokens, 4), torch.zeros(2, dtype=torch.int64)
    for mine, theirs in zip(
        student.predict(x, TEXTS, t), student.predict(x, words(TEXTS), t), strict=True
    ):
        assert torch.equal(mine, theirs)
    assert teacher.encoder is teacher.encoder  # loaded once


def test_texts_are_refused_where_nobody_reads_them():
    teacher = tiny_teacher(**SIZES)
    teacher.open_encoder = None  # as of a network that no loader made
    with pytest.raises(ConfigError, match="has no text encoder here: give features and mask"):
        teacher.sample(TEXTS)
    with pytest.raises(ConfigError, match="classes must be a 1-D list of integers"):
        tiny_teacher().sample(TEXTS)
