"""Facts about the masked transformer: what sees what, its sizes, its folder, who may load it."""

from pathlib import Path

import pytest
import torch

from ddray.errors import ConfigError
from ddray.method.conditioning import Captions
from ddray.models.masked import MaskedConfig, MaskedTransformer
from ddray.models.zoo import (
    empty_masked,
    empty_student,
    load_masked,
    load_student,
    load_teacher,
    new_masked,
)
from ddray.storage.checkpoint import save_folder
from tests.core.tiny import random_state, tiny_masked, tiny_student, tiny_teacher, tiny_var

SIZES = {"dim": 16, "n_layer": 2, "n_head": 2, "vocab_size": 8, "num_classes": 3}
KINDS = {
    "tokens": {"block_size": 9},
    "scales": {"patch_nums": [1, 2, 3]},
    "captions": {"block_size": 9, "cls_token_num": 3, "caption_dim": 5},
}


def network(kind: str) -> MaskedTransformer:
    model = MaskedTransformer(MaskedConfig(**SIZES, **KINDS[kind]))
    model.load_state_dict(random_state(model))
    return model.requires_grad_(False)


def condition(kind: str, rows: int) -> torch.Tensor | Captions:
    if kind != "captions":
        return torch.arange(rows) % 3
    features = torch.randn(rows, 3, 5, generator=torch.Generator().manual_seed(1))
    return Captions(features, torch.tensor([[False, True, True]]).expand(rows, -1))


@pytest.mark.parametrize("kind", KINDS)
def test_every_token_sees_every_other_and_the_condition(kind: str) -> None:
    model, length = network(kind), sum(network(kind).stages)
    tokens = torch.arange(length)[None] % 8
    base = model(tokens, condition(kind, 1))
    assert base.shape == (1, length, 8)
    for changed in (0, length - 1):
        other = tokens.clone()
        other[0, changed] = model.mask_id
        assert ((model(other, condition(kind, 1)) - base).abs().amax(-1) > 1e-6).all()
    null = model.null(condition(kind, 1))
    assert ((model(tokens, null) - base).abs().amax(-1) > 1e-6).all()


def test_padding_of_a_caption_is_seen_by_none() -> None:
    model, cond = network("captions"), condition("captions", 2)
    assert isinstance(cond, Captions)
    features = cond.features_BTD.clone()
    features[:, 0] = 100.0
    tokens = torch.zeros(2, 9, dtype=torch.long)
    torch.testing.assert_close(model(tokens, Captions(features, cond.mask_BT)), model(tokens, cond))


@pytest.mark.parametrize("kind", KINDS)
def test_masked_positions_differ_by_their_place(kind: str) -> None:
    model = network(kind)
    tokens = torch.full((1, sum(model.stages)), model.mask_id)
    logits = model(tokens, condition(kind, 1))[0]
    assert torch.pdist(logits).min() > 1e-4


def test_cells_of_scales_turn_with_their_place_in_the_image() -> None:
    rotation = network("scales").rotation(torch.device("cpu"))
    # Behind the class: 1 cell, 4 cells, 9 cells. The middle of the last grid is the whole image's.
    assert torch.equal(rotation[0, :, 0], torch.ones(4))
    torch.testing.assert_close(rotation[1], rotation[1 + 1 + 4 + 4])
    tokens = network("tokens").rotation(torch.device("cpu"))
    torch.testing.assert_close(rotation[6:], tokens[1:])


def test_stages_are_the_teachers() -> None:
    assert network("tokens").stages == (1,) * 9
    assert network("scales").stages == (1, 4, 9)
    assert network("scales").config.block_size == 9


@pytest.mark.parametrize("name", ["digits-llamagen", "digits-var"])
def test_it_is_about_as_large_as_the_student(name: str) -> None:
    size, student = (
        sum(p.numel() for p in empty(name).parameters()) for empty in (empty_masked, empty_student)
    )
    assert size == pytest.approx(student, rel=0.1)


@pytest.mark.parametrize("make", [tiny_teacher, tiny_var])
def test_it_survives_its_folder(make, tmp_path: Path) -> None:
    teacher = make()
    masked = tiny_masked(teacher, {"step": 7, "teacher": "x", "teacher_fingerprint": "y"})
    save_folder(
        tmp_path,
        masked.config,
        model=masked.model.state_dict(),
        tokenizer=masked.tokenizer.state_dict(),
    )
    loaded = load_masked(tmp_path, device="cpu")
    assert loaded.stages == teacher.stages
    assert (loaded.num_classes, loaded.conditioning) == (3, "class")
    assert loaded.tokenizer.fingerprint == teacher.tokenizer.fingerprint
    assert loaded.fingerprint == masked.fingerprint
    assert (loaded.config["step"], loaded.config["teacher"]) == (7, "x")
    tokens = masked.generate([0, 1], steps=2)
    assert torch.equal(loaded.generate([0, 1], steps=2), tokens)


def test_the_null_caption_is_the_teachers() -> None:
    teacher = tiny_teacher(cls_token_num=3, caption_dim=5)
    network, _ = new_masked(teacher)
    theirs = teacher.model.cls_embedding.uncond_embedding
    assert torch.equal(network.cls_embedding.uncond_embedding, theirs)


def test_each_loader_refuses_what_others_load(tmp_path: Path) -> None:
    masked, student = tiny_masked(tiny_teacher()), tiny_student()
    for name, model in (("masked", masked), ("student", student)):
        save_folder(tmp_path / name, model.config, model=model.model.state_dict())
    for load, kind in ((load_student, "student"), (load_teacher, "teacher")):
        with pytest.raises(ConfigError, match=f"is of family 'masked', which is no {kind}$"):
            load(tmp_path / "masked")
    with pytest.raises(ConfigError, match="is of family 'llamagen-dd', which is no masked model"):
        load_masked(tmp_path / "student")


def test_sizes_that_contradict_the_tokenizer_are_refused() -> None:
    masked = tiny_masked(tiny_var())
    codec = {**masked.config["tokenizer"], "patch_nums": [1, 2, 3]}
    with pytest.raises(ConfigError, match="patch_nums=.* but its tokenizer has patch_nums"):
        load_masked(
            {**masked.config, "patch_nums": [1, 3], "tokenizer": codec},
            checkpoint=masked.model.state_dict(),
            tokenizer=masked.tokenizer.state_dict(),
        )
