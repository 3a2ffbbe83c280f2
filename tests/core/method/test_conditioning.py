"""Facts about captions: where their rows go, what padding changes, what is refused."""

import pytest
import torch

from ddray.errors import ConfigError
from ddray.method.conditioning import left_padded
from ddray.method.student import Student
from ddray.models.families import empty_network
from ddray.models.zoo import load_teacher, new_student
from tests.core.tiny import VQ_SIZES, random_state, tiny_teacher, tokenizer_state

CPU = torch.device("cpu")
CONFIG = {
    "family": "llamagen",
    "dim": 16,
    "n_layer": 2,
    "n_head": 2,
    "vocab_size": 8,
    "block_size": 4,
    "multiple_of": 16,
    "cls_token_num": 5,
    "caption_dim": 3,
    "tokenizer": VQ_SIZES,
}


def captions(lengths, width=3, positions=5, seed=0):
    features = torch.randn(
        len(lengths), positions, width, generator=torch.Generator().manual_seed(seed)
    )
    mask = torch.arange(positions)[None] < torch.tensor(lengths)[:, None]
    return features, mask.long()


@pytest.fixture(scope="module")
def teacher():
    return load_teacher(
        CONFIG,
        checkpoint=random_state(empty_network(CONFIG)),
        tokenizer=tokenizer_state(),
        device="cpu",
    )


def test_valid_rows_move_to_the_end_and_the_rest_becomes_zero():
    features, mask = captions([2, 5, 0])
    moved = left_padded((features, mask), 5, 3, CPU)
    assert torch.equal(moved.features_BTD[0, 3:], features[0, :2])
    assert not moved.features_BTD[0, :3].any()
    assert torch.equal(moved.features_BTD[1], features[1])
    assert not moved.features_BTD[2].any()
    assert moved.mask_BT.sum(1).tolist() == [2, 5, 0]


def test_what_lies_in_the_padding_changes_nothing(teacher):
    features, mask = captions([2, 3])
    other = torch.where(mask[..., None] == 1, features, torch.nan)
    tokens = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 0]])
    expected = teacher.guided_logits((features, mask), tokens, 3.0)
    assert torch.equal(teacher.guided_logits((other, mask), tokens, 3.0), expected)
    shorter = (features[:, :3], mask[:, :3])
    assert torch.equal(teacher.guided_logits(shorter, tokens, 3.0), expected)


def test_cached_decoding_is_the_plain_forward(teacher):
    asked = captions([2, 5])
    greedy = teacher.sample(asked, cfg=3.0, top_k=1)
    logits = teacher.guided_logits(asked, greedy, 3.0)
    assert torch.equal(logits.argmax(-1), greedy)


def test_a_text_teacher_samples_carries_noise_and_has_a_student(teacher):
    assert teacher.conditioning == "text"
    asked = captions([2, 5])
    index = torch.tensor([3, 4])
    tokens = teacher.trajectories(asked, index, seed=1, cfg=2.0)
    alone = tuple(part[1:] for part in asked)
    assert torch.equal(teacher.trajectories(alone, index[1:], seed=1, cfg=2.0), tokens[1:])
    network, config = new_student(teacher)
    student = Student(network.eval().requires_grad_(False), teacher.tokenizer, config, "s")
    codes = student.generate(asked, index=index, schedule="0,teacher:1-2,2", teacher=teacher)
    assert codes.shape == (2, 4, 4)
    assert student.decode(codes).shape[0] == 2


def test_a_student_reads_its_caption_but_not_the_padding(teacher):
    network, config = new_student(teacher)
    student = Student(network.eval().requires_grad_(False), teacher.tokenizer, config, "s")
    x = torch.randn(1, 4, 4, generator=torch.Generator().manual_seed(0))
    features, mask = captions([2])
    before = student.predict(x, (features, mask), torch.zeros(1))
    padding, caption = features.clone(), features.clone()
    padding[:, 2:] = 9.0
    caption[:, 1] += 1.0
    for one, other in zip(before, student.predict(x, (padding, mask), torch.zeros(1)), strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(student.predict(x, (caption, mask), torch.zeros(1))[1], before[1])


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (
            [0, 1],
            r"captions are a list of texts, or a pair: features \[B, T, D\] and mask \[B, T\]",
        ),
        (
            captions([2], width=4),
            r"captions are \[1, 5, 4\] with mask \[1, 5\], expected \[B, T, 3\]",
        ),
        (captions([2], positions=6), "at most 5 positions"),
        ((torch.zeros(1, 5, 3), torch.tensor([[1, 0, 1, 0, 0]])), "mask has holes"),
        ((torch.zeros(0, 5, 3), torch.zeros(0, 5)), "at least one row"),
        (
            (torch.ones(1, 5, 3, dtype=torch.int64), torch.ones(1, 5)),
            "features are torch.int64, expected floating point",
        ),
        ((torch.full((1, 5, 3), torch.nan), torch.ones(1, 5)), "features are not all finite"),
        ((torch.full((1, 5, 3), -torch.inf), torch.ones(1, 5)), "features are not all finite"),
    ],
)
def test_captions_of_another_form_are_refused(teacher, asked, message):
    with pytest.raises(ConfigError, match=message):
        teacher.sample(asked)


def test_a_class_model_takes_no_captions():
    with pytest.raises(ConfigError, match="conditioned on classes, not on captions"):
        tiny_teacher().sample(captions([2]))


def test_condition_tokens_without_a_width_are_refused():
    config = {**CONFIG, "caption_dim": 0}
    with pytest.raises(ConfigError, match="cls_token_num=5: a class is 1 token"):
        load_teacher(config, checkpoint={"x": torch.zeros(1)}, tokenizer=tokenizer_state())
