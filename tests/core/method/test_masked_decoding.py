"""Facts about masked decoding: passes, what stays, whose the draws are, what it can learn."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from ddray.config.distillation import DistillConfig
from ddray.distillation.masked import MaskedDecoding
from ddray.distillation.stream import Batch
from ddray.errors import ConfigError
from ddray.method.masked_decoding import Masked, default_temperature, masked_after
from ddray.method.teacher import Teacher
from ddray.models.zoo import load_masked
from tests.core.tiny import chi_square_p_value, tiny_masked, tiny_teacher, tiny_var

TEACHERS = {"llamagen": tiny_teacher, "var": tiny_var}


@pytest.fixture(scope="module", params=TEACHERS)
def masked(request: pytest.FixtureRequest) -> Masked:
    return tiny_masked(TEACHERS[request.param]())


def passes(masked: Masked, *given: Any, **settings: Any) -> tuple[list[Tensor], Tensor]:
    """What the network read in each pass, and the tokens at the end."""
    seen: list[Tensor] = []
    hook = masked.model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].clone()))
    try:
        return seen, masked.generate(*given, **settings)
    finally:
        hook.remove()


@pytest.mark.parametrize("length", [1, 4, 49, 256])
@pytest.mark.parametrize("steps", [1, 2, 4, 8, 49])
def test_every_pass_fixes_a_token_and_the_last_one_the_rest(length: int, steps: int) -> None:
    steps = min(steps, length)
    counts = [length, *masked_after(length, steps)]
    assert len(counts) == steps + 1 and counts[-1] == 0
    assert all(after < before for before, after in zip(counts, counts[1:], strict=False))


def test_what_stays_masked_falls_by_a_cosine() -> None:
    wanted = [math.floor(256 * math.cos(math.pi / 2 * k / 8)) for k in range(1, 8)]
    assert masked_after(256, 8) == [*wanted, 0]


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("cfg", [None, 2.0])
def test_a_step_is_one_pass_and_what_is_fixed_stays(
    masked: Masked, steps: int, cfg: float | None
) -> None:
    rows, length, mask = 5, masked.num_tokens, masked.model.mask_id
    seen, tokens = passes(masked, [0, 1, 2, 0, 1], steps=steps, seed=1, cfg=cfg)
    assert len(seen) == steps
    assert tokens.shape == (rows, length) and 0 <= int(tokens.min()) <= int(tokens.max()) < mask
    for number, left in enumerate([length, *masked_after(length, steps)[:-1]]):
        known = seen[number][:rows]
        assert ((known == mask).sum(1) == left).all()
        for later in (*(s[:rows] for s in seen[number + 1 :]), tokens):
            assert torch.equal(later[known != mask], known[known != mask])


def test_draws_belong_to_seed_and_index(masked: Masked) -> None:
    told = {"steps": 3, "seed": 7, "cfg": 1.5}
    whole = masked.generate([0, 1, 2, 1], index=[4, 9, 2**40, 11], **told)
    for row, (label, index) in enumerate([(0, 4), (1, 9), (2, 2**40), (1, 11)]):
        assert torch.equal(masked.generate([label], index=[index], **told)[0], whole[row])
    other = masked.generate([0, 1, 2, 1], index=[4, 9, 2**40, 11], **{**told, "seed": 8})
    assert not torch.equal(other, whole)


def test_one_step_draws_every_token_by_itself_from_the_logits(masked: Masked) -> None:
    rows, length = 4000, masked.num_tokens
    logits = masked.model(torch.full((1, length), masked.model.mask_id), torch.tensor([1]))[0]
    p_LV = (logits / 1.5).double().softmax(-1)
    tokens = masked.generate([1] * rows, steps=1, seed=3, temperature=1.5)
    codes = p_LV.shape[1]
    for position in (0, length - 1):
        counts = tokens[:, position].bincount(minlength=codes)
        assert chi_square_p_value(counts, p_LV[position]) > 1e-3
    pairs = (tokens[:, 0] * codes + tokens[:, 1]).bincount(minlength=codes**2)
    expected = (p_LV[0][:, None] * p_LV[1]).flatten()
    often = expected * rows >= 5
    pooled = [torch.cat((x[often], x[~often].sum(0, True))) for x in (pairs, expected)]
    assert chi_square_p_value(*pooled) > 1e-3


def test_guidance_of_one_is_none_and_more_leaves_the_null_condition(masked: Masked) -> None:
    told = {"steps": 2, "seed": 5}
    plain = masked.generate([0, 1, 2], **told)
    assert torch.equal(masked.generate([0, 1, 2], cfg=1.0, **told), plain)
    assert not torch.equal(masked.generate([0, 1, 2], cfg=200.0, **told), plain)
    null = masked.generate([masked.num_classes] * 3, **told)
    assert torch.equal(masked.generate([0, 1, 2], cfg=0.0, **told), null)


def test_the_temperature_of_few_steps_is_low_unless_it_is_given(masked: Masked) -> None:
    assert [default_temperature(steps) for steps in (1, 4, 8)] == [0.4, 0.8, 1.0]
    told = {"steps": 4, "seed": 5}
    plain = masked.generate([0, 1, 2], **told)
    assert torch.equal(masked.generate([0, 1, 2], temperature=0.8, **told), plain)
    assert not torch.equal(masked.generate([0, 1, 2], temperature=9.0, **told), plain)


def test_without_temperature_the_likeliest_tokens_stay(masked: Masked) -> None:
    told = {"steps": 2, "temperature": 0.0, "choice_temperature": 0.0}
    seen, tokens = passes(masked, [2], seed=1, **told)
    assert torch.equal(masked.generate([2], seed=2, **told), tokens)
    log_p = masked.model(seen[0], torch.tensor([2])).double().log_softmax(-1)[0]
    best, code = log_p.max(-1)
    kept = seen[1][0] != masked.model.mask_id
    assert torch.equal(seen[1][0][kept], code[kept])
    assert best[kept].min() >= best[~kept].max()


def test_images_are_those_of_the_teachers_tokenizer(masked: Masked) -> None:
    tokens = masked.generate([0, 1], steps=2)
    images = masked.decode(tokens)
    assert torch.equal(images, masked.tokenizer.decode(tokens))
    assert images.shape[:2] == (2, 3) and 0 <= float(images.min()) <= float(images.max()) <= 1
    assert masked.encode(images).shape == tokens.shape


def test_recommended_settings_are_the_cards() -> None:
    teacher = tiny_teacher()
    assert tiny_masked(teacher).default_cfg == 1.0
    assert tiny_masked(teacher, {"default_cfg": 3}).default_cfg == 3.0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps=0 must be an integer from 1 to 4"),
        ({"steps": 5}, "steps=5 must be an integer from 1 to 4"),
        ({"steps": 1.5}, "steps=1.5 must be an integer"),
        ({"steps": 1, "cfg": math.nan}, "cfg=nan is no guidance"),
        ({"steps": 1, "temperature": -1.0}, "temperature=-1.0 must be a number >= 0"),
        ({"steps": 1, "choice_temperature": math.inf}, "choice_temperature=inf must be"),
        ({"steps": 1, "index": [0]}, "1 indices for 2 classes"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny_masked(tiny_teacher()).generate([0, 1], **settings)


def test_logits_that_are_not_finite_are_refused() -> None:
    masked = tiny_masked(tiny_teacher())
    masked.model.norm.weight.fill_(math.nan)
    with pytest.raises(ConfigError, match="gives logits that are not finite"):
        masked.generate([0], steps=2)


def _learned(teacher: Teacher, patterns: Tensor, rows: int = 64, steps: int = 150) -> Masked:
    """A model trained on sequences that are one of two patterns, the second twice as often."""
    config = DistillConfig(objective="masked", batch_size=rows)
    objective = MaskedDecoding(config, teacher)
    torch.manual_seed(0)
    network, card = objective.new_network()
    optimizer = torch.optim.AdamW(network.parameters(), 1e-2)
    for step in range(steps):
        which = (torch.rand(rows) < 2 / 3).long()
        cond = torch.zeros(rows, dtype=torch.long)
        batch = Batch(torch.empty(0), patterns[which], cond, torch.arange(rows))
        loss, _ = objective.loss(network, batch, step=step, row=0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    codec = teacher.tokenizer.state_dict()
    return load_masked(card, checkpoint=network.state_dict(), tokenizer=codec, device="cpu")


@pytest.mark.slow  # 150 steps
def test_a_distribution_of_two_sequences_is_learned_but_not_in_one_step() -> None:
    patterns = torch.tensor([[1, 5, 2, 6], [7, 3, 4, 0]])
    masked = _learned(tiny_teacher(), patterns)
    rows = 2000
    tokens = masked.generate([0] * rows, steps=4, seed=1, temperature=1.0)
    which = [(tokens == pattern).all(1).float().mean().item() for pattern in patterns]
    assert sum(which) > 0.97
    assert which[1] == pytest.approx(2 / 3, abs=0.05)
    # Tokens that are drawn at once agree by chance alone: (1/3)^4 + (2/3)^4 = 0.21 of the rows.
    at_once = masked.generate([0] * rows, steps=1, seed=1, temperature=1.0)
    fits = sum((at_once == pattern).all(1).float().mean().item() for pattern in patterns)
    assert fits == pytest.approx(17 / 81, abs=0.05)
