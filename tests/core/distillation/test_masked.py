"""Facts about the objective of masked decoding: masks, closed forms, whose the masks are."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ddray.config.distillation import DistillConfig
from ddray.distillation.masked import MaskedDecoding, cosine_masks
from ddray.distillation.optimization import parameter_groups
from ddray.distillation.stream import Batch
from ddray.method.conditioning import Captions
from tests.core.tiny import tiny_teacher, tiny_var

ROWS = 12


def objective(teacher: Any = None, rows: int = ROWS, **masked: float) -> MaskedDecoding:
    config = DistillConfig(objective="masked", batch_size=rows, seed=5, masked=masked)
    return MaskedDecoding(config, teacher or tiny_teacher())


def batch(rows: int = ROWS, codes: int = 8, length: int = 4) -> Batch:
    tokens = torch.randint(codes, (rows, length), generator=torch.Generator().manual_seed(1))
    return Batch(torch.empty(0), tokens, torch.arange(rows) % 3, torch.arange(rows))


class Watched:
    """A network that says the same of everything, and what it was given."""

    def __init__(self, logits: Tensor):
        self.logits, self.tokens, self.cond = logits, list[Tensor](), list[Any]()

    def __call__(self, tokens_BL: Tensor, cond: Any) -> Tensor:
        self.tokens.append(tokens_BL)
        self.cond.append(cond)
        return self.logits


def test_a_mask_has_the_share_that_the_cosine_says_and_one_token_at_least() -> None:
    uniform = torch.rand(4, 100, dtype=torch.float64)
    share = torch.tensor([0.0, 1 / 3, 0.5, 1.0], dtype=torch.float64)
    masks = cosine_masks(uniform, share)
    assert masks.sum(1).tolist() == [100, 87, 71, 1]
    for mask, row in zip(masks[1:], uniform[1:], strict=True):
        assert row[mask].max() < row[~mask].min()
    many = cosine_masks(torch.rand(4000, 100), torch.rand(4000))
    assert float(many.float().mean()) == pytest.approx(2 / math.pi, abs=0.02)


def test_masked_tokens_are_hidden_and_the_others_are_the_teachers() -> None:
    network, rows = Watched(torch.zeros(ROWS, 4, 8)), batch()
    objective(cond_dropout=0).loss(network, rows, step=0, row=0)
    (seen,) = network.tokens
    hidden = seen == 8
    assert hidden.any(1).all() and not hidden.all()
    assert torch.equal(seen[~hidden], rows.tokens_BL[~hidden])
    assert torch.equal(network.cond[0], rows.cond_B)


def test_a_perfect_network_has_no_loss_and_an_indifferent_one_the_entropy() -> None:
    rows = batch(4000)
    perfect = Watched(100.0 * F.one_hot(rows.tokens_BL, 8))
    loss, figures = objective(rows=4000).loss(perfect, rows, step=0, row=0)
    assert float(loss) == pytest.approx(0, abs=1e-6)
    assert float(figures["token_accuracy"]) == 1
    loss, figures = objective(rows=4000).loss(Watched(torch.zeros(4000, 4, 8)), rows, step=0, row=0)
    assert float(figures["cross_entropy"]) == pytest.approx(math.log(8))
    # Divided by how many tokens are masked on average, not by how many are here.
    assert float(loss) == pytest.approx(math.log(8), rel=0.05)


def test_known_tokens_do_not_count() -> None:
    rows, network = batch(), Watched(torch.zeros(ROWS, 4, 8))
    objective().loss(network, rows, step=0, row=0)
    wrong = F.one_hot((rows.tokens_BL + 1) % 8, 8)
    right = F.one_hot(rows.tokens_BL, 8)
    network.logits = 100.0 * torch.where((network.tokens[0] == 8)[..., None], right, wrong)
    loss, figures = objective().loss(network, rows, step=0, row=0)
    assert float(loss) < 1e-6 and float(figures["token_accuracy"]) == 1


def test_smoothing_gives_every_token_a_share_of_the_target() -> None:
    rows = batch()
    logits = torch.randn(ROWS, 4, 8, generator=torch.Generator().manual_seed(2))
    network = Watched(logits)
    loss, _ = objective(label_smoothing=0.3).loss(network, rows, step=0, row=0)
    hidden = network.tokens[0] == 8
    nats = F.cross_entropy(
        logits[hidden], rows.tokens_BL[hidden], reduction="sum", label_smoothing=0.3
    )
    assert float(loss) == pytest.approx(float(nats) / (ROWS * 4 * 2 / math.pi), rel=1e-5)


@pytest.mark.parametrize("parts", [2, 3, 4])
def test_a_batch_learns_the_same_however_it_is_cut(parts: int) -> None:
    made = objective()
    torch.manual_seed(0)
    network, _ = made.new_network()
    torch.nn.init.normal_(network.output.weight)
    network.requires_grad_(False)
    whole, _ = made.loss(network, batch(), step=3, row=0)
    size = ROWS // parts
    cut = [
        made.loss(network, part, step=3, row=number * size)[0]
        for number, part in enumerate(batch().split(parts))
    ]
    assert float(sum(cut) / parts) == pytest.approx(float(whole), rel=1e-5)
    other, _ = made.loss(network, batch(), step=4, row=0)
    assert abs(float(other) - float(whole)) > 1e-3


def test_conditions_are_dropped_at_the_rate_that_is_asked_for() -> None:
    rows = batch(4000)
    network = Watched(torch.zeros(4000, 4, 8))
    objective(rows=4000, cond_dropout=0.25).loss(network, rows, step=0, row=0)
    dropped = network.cond[0] == 3
    assert float(dropped.float().mean()) == pytest.approx(0.25, abs=0.03)
    assert torch.equal(network.cond[0][~dropped], rows.cond_B[~dropped])


def test_a_dropped_caption_is_the_null_caption() -> None:
    teacher = tiny_teacher(cls_token_num=3, caption_dim=5)
    captions = Captions(torch.randn(ROWS, 3, 5), torch.ones(ROWS, 3, dtype=torch.bool))
    network = Watched(torch.zeros(ROWS, 4, 8))
    objective(teacher, cond_dropout=0.5).loss(
        network, batch()._replace(cond_B=captions), step=0, row=0
    )
    null = teacher.model.cls_embedding.uncond_embedding
    dropped = (network.cond[0].features_BTD == null).all(-1).all(-1)
    assert 0 < int(dropped.sum()) < ROWS
    kept = network.cond[0].features_BTD[~dropped]
    assert torch.equal(kept, captions.features_BTD[~dropped])


@pytest.mark.parametrize("make", [tiny_teacher, tiny_var])
def test_every_weight_learns(make: Any) -> None:
    teacher = make()
    made = objective(teacher)
    network, _ = made.new_network()
    torch.nn.init.normal_(network.output.weight)
    loss, _ = made.loss(network, batch(length=teacher.num_tokens), step=0, row=0)
    loss.backward()
    for name, weight in network.named_parameters():
        assert weight.grad is not None and weight.grad.abs().sum() > 0, name
    (group,) = parameter_groups(network, teacher.codebook, 0.01)
    assert len(group["params"]) == len([*network.parameters()])
