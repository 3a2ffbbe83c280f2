"""Facts about sampling and generation: draws belong to the sample, marginals are the teacher's."""

import pytest
import torch

import ddray
from ddray.errors import ConfigError
from ddray.method import student as method_student
from ddray.method.guidance import draw
from tests.core.tiny import chi_square_p_value, tiny_student, tiny_teacher

COND = [0, 1, 2, 3, 0, 1, 2, 3, 1, 1]
INDEX = [0, 1, 5, 2**63 - 1, 2**32, 3, 2, 8, 9, 7]


@pytest.fixture(scope="module")
def teacher():
    return tiny_teacher()


@pytest.fixture(scope="module")
def student():
    return tiny_student()


def splits(values, cuts):
    return [values[a:b] for a, b in zip([0, *cuts], [*cuts, len(values)], strict=True)]


@pytest.mark.parametrize("cuts", [(5,), (1, 4), tuple(range(1, 10))])
@pytest.mark.parametrize("cfg", [None, 2.0])
def test_tokens_belong_to_the_sample_and_not_to_its_batch(teacher, cuts, cfg):
    settings = {"cfg": cfg, "seed": 3, "top_k": 6, "top_p": 0.95, "temperature": 1.2}

    def both(cond, index):
        sampled = teacher.sample(cond, index=index, **settings)
        return torch.stack((sampled, teacher.trajectories(cond, index, **settings)))

    whole = both(COND, INDEX)
    parts = [both(c, i) for c, i in zip(splits(COND, cuts), splits(INDEX, cuts), strict=True)]
    assert torch.equal(torch.cat(parts, 1), whole)
    assert torch.equal(both(COND[::-1], INDEX[::-1]).flip(1), whole)


def test_the_index_defaults_to_the_place_in_the_batch(teacher, student):
    assert torch.equal(teacher.sample([1] * 4), teacher.sample([1] * 4, index=range(4)))
    assert torch.equal(student.generate([1] * 4), student.generate([1] * 4, index=range(4)))


def test_another_seed_gives_other_tokens(teacher):
    a, b = (teacher.sample([1] * 50, seed=seed) for seed in (0, 1))
    assert not torch.equal(a, b)
    a, b = (teacher.trajectories([1] * 50, range(50), seed=seed) for seed in (0, 1))
    assert not torch.equal(a, b)


@pytest.fixture(scope="module")
def one_token():
    return tiny_teacher(5, block_size=1)


@pytest.mark.parametrize("cfg", [None, 1.5])
def test_one_token_is_distributed_as_the_teacher_says(one_token, cfg):
    n = 20_000
    p = one_token.guided_logits([2], torch.zeros(1, 1, dtype=torch.long), cfg)[0, 0].softmax(-1)
    for tokens in (
        one_token.trajectories([2] * n, range(n), seed=1, cfg=cfg),
        one_token.sample([2] * n, cfg=cfg, seed=1),
    ):
        assert chi_square_p_value(tokens.flatten().bincount(minlength=8), p) > 0.01


def test_filters_and_temperature_shape_the_marginal_of_trajectories(one_token):
    n = 20_000
    logits = one_token.guided_logits([1], torch.zeros(1, 1, dtype=torch.long))[0, 0]
    tokens = one_token.trajectories([1] * n, range(n), seed=2, top_k=3, temperature=0.7)
    kept = torch.where(logits >= logits.topk(3).values[-1], logits / 0.7, -torch.inf)
    assert chi_square_p_value(tokens.flatten().bincount(minlength=8), kept.softmax(-1)) > 0.01


@pytest.mark.slow
def test_sequences_are_distributed_as_the_product_of_the_teachers_conditionals():
    """The joint law of the first two of four tokens, over random noise and over random draws."""
    teacher, n = tiny_teacher(9, vocab_size=4), 20_000
    pairs = torch.cartesian_prod(torch.arange(4), torch.arange(4))
    p = teacher.guided_logits([0] * 16, torch.nn.functional.pad(pairs, (0, 2))).softmax(-1)
    joint = p[range(16), 0, pairs[:, 0]] * p[range(16), 1, pairs[:, 1]]
    cells = joint >= 10 / n
    for tokens in (
        teacher.trajectories([0] * n, range(n), seed=4),
        teacher.sample([0] * n, seed=4),
    ):
        counts = (tokens[:, 0] * 4 + tokens[:, 1]).bincount(minlength=16)
        rest = torch.stack((counts[~cells].sum(), joint[~cells].sum()))
        counts = torch.cat((counts[cells], rest[:1].long()))
        expected = torch.cat((joint[cells], rest[1:]))
        assert expected[-1] == 0 or expected[-1] > 5 / n
        assert chi_square_p_value(counts, expected) > 0.01


def test_top_k_one_is_greedy(teacher):
    tokens = teacher.sample(COND, top_k=1, seed=5)
    greedy = teacher.guided_logits(COND, tokens).argmax(-1)
    assert torch.equal(tokens, greedy)
    assert torch.equal(teacher.trajectories(COND, INDEX, seed=6, top_k=1), greedy)
    assert torch.equal(teacher.sample(COND, temperature=0.0), greedy)


def test_guidance_none_and_one_are_off(teacher):
    plain = teacher.sample(COND)
    assert torch.equal(teacher.sample(COND, cfg=1.0), plain)
    assert torch.equal(teacher.sample(COND, cfg=1), plain)
    assert not torch.equal(teacher.sample(COND, cfg=8.0), plain)


def test_guidance_on_an_interval_covers_its_first_two_stages_more(teacher):
    tokens = teacher.sample(COND, cfg=6.0, cfg_interval=0, top_k=1)
    guided = teacher.guided_logits(COND, tokens, 6.0).argmax(-1)
    plain = teacher.guided_logits(COND, tokens).argmax(-1)
    assert torch.equal(tokens, torch.cat((guided[:, :2], plain[:, 2:]), 1))


def test_trajectories_transport_the_published_noise(teacher):
    tokens = teacher.trajectories(COND, INDEX, seed=7, cfg=2.0)
    noise = ddray.noise(7, INDEX, (4, 4))
    logits = teacher.guided_logits(COND, tokens, 2.0)
    assert torch.equal(ddray.transport(noise, logits, teacher.codebook), tokens)


def test_codes_of_one_jump_belong_to_the_sample(student):
    whole = student.generate(COND, seed=1, index=INDEX, split=2, schedule="0,2")
    for cut in (1, 4, 9):
        parts = [
            student.generate(c, seed=1, index=i, split=2, schedule="0,2")
            for c, i in zip(splits(COND, (cut,)), splits(INDEX, (cut,)), strict=True)
        ]
        # The code head's numbers may move in the last place with the batch; tokens may not.
        torch.testing.assert_close(torch.cat(parts), whole, atol=1e-5, rtol=1e-5)
        nearest = student.tokenizer.module.nearest
        assert torch.equal(nearest(torch.cat(parts)[:, :2]), nearest(whole[:, :2]))


def test_noise_is_that_of_seed_and_index_unless_given(student):
    noise = ddray.noise(9, INDEX, (4, 4))
    given = student.generate(COND, noise=noise)
    assert torch.equal(student.generate(COND, seed=9, index=INDEX), given)
    assert not torch.equal(student.generate(COND, seed=10, index=INDEX), given)


def test_split_counts_the_stages_of_the_logits_head(student):
    noise = ddray.noise(0, INDEX, (4, 4))
    logits, codes = student.predict(noise, COND, torch.zeros(10, dtype=torch.long))
    tokens = logits.argmax(-1)
    for split in range(5):
        expected = torch.cat((student.codebook[tokens[:, :split]], codes[:, split:]), 1)
        assert torch.equal(student.generate(COND, noise=noise, split=split), expected)
    assert torch.equal(student.generate(COND, noise=noise), student.codebook[tokens])


@pytest.mark.parametrize("precision", [0.0, 0.7, 20.0, 1e6])
def test_tokens_are_the_mode_of_both_heads_product(precision):
    student = tiny_student()
    student.config["code_precision"] = precision
    noise = torch.randn(len(COND), 4, 4)
    logits, codes = student.predict(noise, COND, torch.zeros(len(COND)))
    distance = (codes[..., None, :] - student.codebook).square().sum(-1)
    unit = student.codebook.square().sum(1).mean()
    density = logits.log_softmax(-1) - precision / 2 * distance / unit
    expected = density.argmax(-1) if precision < 1e6 else distance.argmin(-1)
    assert torch.equal(student.generate(COND, noise=noise), student.codebook[expected])


def test_logits_that_are_not_finite_make_no_trajectories():
    teacher = tiny_teacher()
    with torch.no_grad():
        teacher.model.output.weight[3] = float("inf")
    with pytest.raises(ConfigError, match="logits that are not finite in float32; use another"):
        teacher.trajectories(COND, INDEX, seed=0)


def test_tokens_are_read_alike_in_parts_of_a_batch(monkeypatch):
    student = tiny_student()
    student.config["code_precision"] = 2.0
    whole = student.generate(COND)
    monkeypatch.setattr(method_student, "_READ_ELEMENTS", 1)
    assert torch.equal(student.generate(COND), whole)


@pytest.mark.parametrize("precision", [-1, float("nan"), "much"])
def test_a_precision_that_is_none_is_refused(precision):
    student = tiny_student()
    student.config["code_precision"] = precision
    with pytest.raises(ConfigError, match=r"code_precision=.* must be a number >= 0"):
        student.generate(COND)


def test_a_second_jump_keeps_the_given_tokens_and_restores_the_noise(student):
    noise = ddray.noise(0, INDEX, (4, 4))
    first = student.generate(COND, noise=noise)
    second = student.generate(COND, noise=noise, schedule=(0, 2))
    assert torch.equal(second[:, :2], first[:, :2])
    x = torch.cat((first[:, :2], noise[:, 2:]), 1)
    logits, _ = student.predict(x, COND, torch.full((10,), 2))
    assert torch.equal(second[:, 2:], student.codebook[logits.argmax(-1)][:, 2:])


def test_a_schedule_may_be_text_or_numbers(student, teacher):
    for text, numbers in (("0", (0,)), ("0,2", [0, 2]), ("0, 1, 3", (0, 1, 3))):
        a, b = (student.generate(COND, schedule=s) for s in (text, numbers))
        assert torch.equal(a, b)
    a, b = (
        student.generate(COND, schedule=s, teacher=teacher)
        for s in ("0,teacher:1-3,3", (0, "teacher:1-3", 3))
    )
    assert torch.equal(a, b)


def test_the_teacher_writes_its_stages_and_no_others():
    teacher, student = tiny_teacher(block_size=9), tiny_student(block_size=9)
    noise = ddray.noise(0, INDEX, (9, 4))
    schedule = "0,teacher:4-8,8"
    codes = student.generate(
        COND, noise=noise, schedule=schedule, teacher=teacher, top_k=1, cfg=2.0
    )
    tokens = student.tokenizer.module.nearest(codes)
    first = student.tokenizer.module.nearest(student.generate(COND, noise=noise))
    assert torch.equal(tokens[:, :4], first[:, :4])
    greedy = teacher.guided_logits(COND, tokens, 2.0).argmax(-1)
    assert torch.equal(tokens[:, 4:8], greedy[:, 4:8])
    x = torch.cat((teacher.codebook[tokens[:, :8]], noise[:, 8:]), 1)
    logits, _ = student.predict(x, COND, torch.full((10,), 8))
    assert torch.equal(tokens[:, 8], logits[:, 8].argmax(-1))


def test_a_teacher_from_stage_zero_draws_as_it_samples(student, teacher):
    codes = student.generate(
        COND, seed=3, index=INDEX, schedule="teacher:0-2,2", teacher=teacher, cfg=1.5
    )
    sampled = teacher.sample(COND, seed=3, index=INDEX, cfg=1.5)
    assert torch.equal(codes[:, :2], teacher.codebook[sampled[:, :2]])
    alone = student.generate(COND, seed=3, index=INDEX, schedule="teacher:0-4", teacher=teacher)
    assert torch.equal(alone, teacher.codebook[teacher.sample(COND, seed=3, index=INDEX)])


@pytest.mark.parametrize("cond", [[0, 4], [-1], [1000]])
def test_a_class_out_of_range_is_refused(teacher, student, cond):
    message = rf"class {max(cond, key=abs)} is out of range: 0 to 2, or 3 for the null class"
    tokens = torch.zeros(len(cond), 4, dtype=torch.long)
    for call in (
        lambda: teacher.sample(cond),
        lambda: teacher.trajectories(cond, range(len(cond)), seed=0),
        lambda: teacher.guided_logits(cond, tokens),
        lambda: student.generate(cond),
        lambda: student.predict(torch.zeros(len(cond), 4, 4), cond, tokens[:, 0]),
    ):
        with pytest.raises(ConfigError, match=message):
            call()


@pytest.mark.parametrize("cond", [[0.5], [[0]], 1, []])
def test_classes_that_are_no_list_of_integers_are_refused(teacher, cond):
    with pytest.raises(ConfigError, match="classes must be a 1-D list of at least one integer"):
        teacher.sample(cond)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"index": [0, 1]}, "2 indices for 3 classes"),
        ({"index": [0, 1, -1]}, "index must be >= 0, got -1"),
        ({"seed": -1}, "seed must be an integer from 0 to"),
        ({"top_k": -1}, "top_k must be an integer >= 0"),
        ({"top_p": 0}, r"top_p must be in \(0, 1\]"),
        ({"temperature": -1}, "temperature must be >= 0"),
    ],
)
def test_sampling_settings_that_mean_nothing_are_refused(teacher, settings, message):
    with pytest.raises(ConfigError, match=message):
        teacher.sample([0, 1, 2], **settings)
    with pytest.raises(ConfigError, match=message):
        teacher.trajectories(
            [0, 1, 2],
            **{"index_B": range(3), "seed": 0}
            | {"index_B" if name == "index" else name: value for name, value in settings.items()},
        )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"schedule": "0,4"}, "4 must be above the jump before it and below 4"),
        ({"schedule": "0,teacher:1-2,2"}, "has a teacher's part; give teacher="),
        ({"noise": torch.zeros(3, 4, 5)}, r"noise is \[3, 4, 5\], expected \[3, 4, 4\]"),
        ({"noise": torch.zeros(2, 4, 4)}, r"noise is \[2, 4, 4\], expected \[3, 4, 4\]"),
        ({"split": 5}, "split=5 is outside 0 to 4 stages"),
        ({"split": -1}, "split=-1 is outside 0 to 4 stages"),
        ({"index": [0, 1]}, "2 indices for 3 classes"),
        ({"index": [0, 1], "noise": torch.zeros(3, 4, 4)}, "2 indices for 3 classes"),
        ({"seed": 2**63}, "seed must be an integer from 0 to"),
    ],
)
def test_generation_that_cannot_work_is_refused(student, settings, message):
    with pytest.raises(ConfigError, match=message):
        student.generate([0, 1, 2], **settings)


@pytest.mark.parametrize("schedule", ["0,teacher:1-2,2", "0"])
def test_an_unknown_sampling_setting_is_refused(student, teacher, schedule):
    with pytest.raises(ConfigError, match="unknown sampling setting 'topk'; did you mean top_k?"):
        student.generate([0], schedule=schedule, teacher=teacher, topk=3)


def test_an_empty_schedule_is_refused(student):
    with pytest.raises(ConfigError, match="schedule"):
        student.generate([0], schedule=())


def test_sampling_settings_without_a_part_of_the_teacher_warn():
    student = tiny_student()
    with pytest.warns(UserWarning, match=r"cfg has no effect: schedule \(0,\) has no part"):
        student.generate([0], teacher=tiny_teacher(), cfg=2.0)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"num_classes": 5}, r"number of classes differs \(5, the student has 3\)"),
        ({"block_size": 9}, "stages differs"),
        ({"vocab_size": 16}, "tokenizer differs"),
    ],
)
def test_a_teacher_that_does_not_fit_is_refused(sizes, message):
    with pytest.raises(ConfigError, match=message):
        tiny_student().generate([0], schedule="0,teacher:1-2,2", teacher=tiny_teacher(**sizes))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"top_p": 2.0}, "top_p must be in"),
        ({"cfg": "2"}, "cfg='2' is no guidance"),
        ({"unmasked_prefix": True}, "quirk of VAR's published code"),
    ],
)
def test_settings_of_the_teacher_are_refused_before_the_first_jump(settings, message):
    student = tiny_student()
    student.model.forward = None  # whoever calls it fails otherwise
    with pytest.raises(ConfigError, match=message):
        student.generate([0], schedule="0,teacher:1-2,2", teacher=tiny_teacher(), **settings)


def test_what_is_given_out_can_be_trained_on():
    student, teacher = tiny_student(), tiny_teacher()
    codes = student.generate([0, 1])
    layer = torch.nn.Linear(4, 8)
    layer(codes).sum().backward()
    (layer(student.codebook).sum() + layer(teacher.codebook).sum()).backward()
    tokens = teacher.sample([0, 1])
    tokens[0, 0] = 1
    torch.nn.Embedding(8, 2)(tokens).sum().backward()


def test_tokens_may_be_of_any_integer_type():
    teacher = tiny_teacher()
    tokens = teacher.sample([0, 1])
    for dtype in (torch.uint16, torch.int32, torch.uint8):
        assert torch.equal(teacher.decode(tokens.to(dtype)), teacher.decode(tokens))


@pytest.mark.parametrize(
    "images",
    [
        torch.zeros(1, 3, 8, 8),
        torch.zeros(1, 1, 4, 4),
        torch.zeros(1, 3, 4, 4, dtype=torch.uint8),
        torch.zeros(3, 4, 4),
    ],
)
def test_images_of_another_form_are_refused(images):
    with pytest.raises(ConfigError, match=r"expected floats in \[0, 1\] of \['B', 3, 4, 4\]"):
        tiny_teacher().encode(images)


@pytest.mark.parametrize("shape", [(1, 3, 4), (2, 4, 4), (1, 4, 5)])
def test_predictions_of_another_shape_are_refused(shape):
    with pytest.raises(ConfigError, match=r"x is .*, expected \[1, 4, 4\]"):
        tiny_student().predict(torch.zeros(shape), [0], torch.zeros(1))


def test_draws_do_not_depend_on_the_block_they_are_made_in(monkeypatch):
    logits = torch.randn(50, 7, generator=torch.Generator().manual_seed(0))
    uniform = torch.rand(50, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    whole = draw(logits, uniform)
    monkeypatch.setattr("ddray.method.guidance._BLOCK_ELEMENTS", 20)
    assert torch.equal(draw(logits, uniform), whole)
    assert draw(logits[0], uniform[0]) == whole[0]
