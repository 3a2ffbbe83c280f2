"""Facts about skip-n: the stages of one pass, what they read, how their tokens are drawn."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ddray.errors import ConfigError
from ddray.method.conditioning import Captions
from ddray.method.teacher import Teacher
from ddray.models.families import empty_network
from ddray.models.llamagen import LlamaGen, LlamaGenDecoder
from ddray.models.var import VAR, VARDecoder
from ddray.models.zoo import load_teacher
from tests.core.method.test_conditioning import CONFIG, captions
from tests.core.tiny import (
    chi_square_p_value,
    random_state,
    tiny_teacher,
    tiny_var,
    tokenizer_state,
)

COND, INDEX = [0, 2, 1, 2], [3, 2**40, 0, 8]
RULES: dict[str, Any] = {"cfg": 2.0, "top_k": 6, "top_p": 0.9, "temperature": 1.1, "seed": 5}


def new_teacher(family: str) -> Teacher:
    return tiny_var() if family == "var" else tiny_teacher(block_size=9)


@pytest.fixture(scope="module", params=["llamagen", "var"])
def teacher(request: pytest.FixtureRequest) -> Teacher:
    return new_teacher(request.param)


def plain_logits(teacher: Teacher, cond: Any, known: Tensor, skip: int) -> Tensor:
    """Logits of the last stages in one uncached pass over all positions."""
    model = teacher.model
    with torch.no_grad():
        if isinstance(model, LlamaGen):
            mean = model.tok_embeddings.weight.mean(0).expand(len(known), skip - 1, -1)
            x = torch.cat((model.cls_embedding(cond), model.tok_embeddings(known), mean), 1)
            return model.logits(model.hidden(x, model.attention_mask(cond, x.shape[1])))[:, -skip:]
        quantizer, first = model.quantizer, len(model.stages) - skip
        parts = quantizer.codebook[known].split(list(model.stages[:first]), 1)
        latent = torch.zeros(len(known), 4, 3, 3)
        inputs = [model.first_input(cond)]
        for stage in range(1, len(model.stages)):
            if stage <= first:
                latent = latent + quantizer.contribution(parts[stage - 1], stage - 1)
            inputs.append(model.embed(quantizer.seen_by(latent, stage)))
        x, condition = torch.cat(inputs, 1) + model.places(), model.class_emb(cond)
        for block, modulation in zip(model.blocks, model.modulations(condition), strict=True):
            x = block(x, modulation, model.attn_bias_for_masking)
        logits = model.logits(x, model.head_nm.modulation(condition))
        return logits[:, teacher.stage_starts()[first] :]


def at_once(teacher: Teacher, cond: Any, known: Tensor, skip: int) -> Tensor:
    """The same by the decoder, told the stages before one by one."""
    decoder, starts = teacher.model.decoder(cond), teacher.stage_starts()
    with torch.no_grad():
        for stage in range(len(teacher.stages) - skip):
            decoder.logits()
            decoder.append(known[:, starts[stage] : starts[stage + 1]])
        logits: Tensor = decoder.logits(skip)
        return logits


def known_tokens(teacher: Teacher, skip: int, rows: int = 3) -> Tensor:
    count = teacher.stage_starts()[len(teacher.stages) - skip]
    return torch.randint(8, (rows, count), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("skip", [1, 2, "all but one", "all"])
def test_cached_and_uncached_logits_agree(teacher: Teacher, skip: Any) -> None:
    stages = len(teacher.stages)
    skip = {"all": stages, "all but one": stages - 1}.get(skip, skip)
    known, cond = known_tokens(teacher, skip), torch.tensor([0, 2, 3])
    logits = at_once(teacher, cond, known, skip)
    assert logits.shape == (3, sum(teacher.stages[-skip:]), 8) and logits.dtype == torch.float32
    expected = plain_logits(teacher, cond, known, skip)
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


def test_captions_are_seen_and_their_padding_is_not() -> None:
    teacher = tiny_text_teacher()
    asked = teacher.condition(captions([2, 5, 1]))
    assert isinstance(asked, Captions)
    for skip in (2, 4):
        known = known_tokens(teacher, skip)
        expected = plain_logits(teacher, asked, known, skip)
        logits = at_once(teacher, asked, known, skip)
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


def tiny_text_teacher() -> Teacher:
    weights = {"checkpoint": random_state(empty_network(CONFIG)), "tokenizer": tokenizer_state()}
    return load_teacher(CONFIG, device="cpu", **weights)


def test_one_stage_in_one_shot_is_plain_sampling(teacher: Teacher) -> None:
    plain = teacher.sample(COND, index=INDEX, **RULES)
    for skip in (0, 1):
        assert torch.equal(teacher.sample(COND, index=INDEX, skip=skip, **RULES), plain)


def test_the_stages_before_are_those_of_plain_sampling(teacher: Teacher) -> None:
    plain = teacher.sample(COND, index=INDEX, **RULES)
    skipped = teacher.sample(COND, index=INDEX, skip=2, **RULES)
    # The first stage of the pass reads what it always reads.
    same = teacher.stage_starts()[-2]
    assert torch.equal(skipped[:, :same], plain[:, :same])
    assert not torch.equal(skipped, plain)


def test_tokens_belong_to_the_sample_and_not_to_its_batch(teacher: Teacher) -> None:
    whole = teacher.sample(COND, index=INDEX, skip=2, **RULES)
    alone = [
        teacher.sample([c], index=[i], skip=2, **RULES) for c, i in zip(COND, INDEX, strict=True)
    ]
    assert torch.equal(torch.cat(alone), whole)


@pytest.mark.parametrize("skip", [0, 1, 2, 3])
def test_so_many_passes(teacher: Teacher, skip: int, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = VARDecoder if isinstance(teacher.model, VAR) else LlamaGenDecoder
    asked, logits = [], kind.logits

    def counted(self: Any, stages: int = 1) -> Tensor:
        asked.append(stages)
        return logits(self, stages)

    monkeypatch.setattr(kind, "logits", counted)
    teacher.sample(COND, skip=skip, **RULES)
    assert len(asked) == len(teacher.stages) - max(skip, 1) + 1
    assert sum(asked) == len(teacher.stages)


def test_guidance_is_each_stages_own(teacher: Teacher) -> None:
    skip, cond = len(teacher.stages), torch.tensor([0, 1, 2])
    null = torch.full((3,), 3)
    empty = torch.zeros(3, 0, dtype=torch.long)
    c, u = (at_once(teacher, asked, empty, skip) for asked in (cond, null))
    starts = teacher.stage_starts()
    for interval in (-1, 0):
        expected = c.clone()
        for stage in range(skip):
            part = slice(starts[stage], starts[stage + 1])
            if interval < 0 or stage < 2:
                expected[:, part] = teacher.model.guide(c[:, part], u[:, part], 3.0, stage)
        greedy = teacher.sample(cond, cfg=3.0, cfg_interval=interval, top_k=1, skip=skip)
        assert torch.equal(greedy, expected.argmax(-1))


def test_tokens_of_the_pass_are_independent_draws_of_their_logits() -> None:
    teacher, n = tiny_teacher(9, vocab_size=4), 20_000
    empty = torch.zeros(1, 0, dtype=torch.long)
    p = at_once(teacher, torch.tensor([1]), empty, 4)[0].double().softmax(-1)
    tokens = teacher.sample([1] * n, seed=3, skip=4)
    for first, second in ((0, 1), (1, 2), (0, 3)):
        counts = (tokens[:, first] * 4 + tokens[:, second]).bincount(minlength=16)
        joint = torch.outer(p[first], p[second]).flatten()
        assert chi_square_p_value(counts, joint) > 0.01


@pytest.mark.parametrize("skip", [-1, 99, True, 1.5])
def test_what_cannot_be_skipped_is_refused(teacher: Teacher, skip: Any) -> None:
    stages = len(teacher.stages)
    message = f"skip={skip!r} must be an integer from 0 to {stages}, the stages of"
    with pytest.raises(ConfigError, match=message):
        teacher.sample(COND, skip=skip)
