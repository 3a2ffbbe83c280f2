"""Facts about what judges a student's whole sequences, as the training loop holds it."""

import io

import pytest
import torch

from ddray.config.distillation import DistillConfig
from ddray.config.sampling import SampleConfig
from ddray.distillation.adversary import Adversary
from ddray.distillation.critics import new_critics
from ddray.distillation.perceptual import Perceptual
from ddray.distillation.score_distillation import ScoreDistillation
from ddray.sets.trajectories.making import make_plan
from tests.core.distillation.test_score_distillation import prediction
from tests.core.tiny import tiny_teacher

ALL = {
    "score": {"weight": 1.0, "start": 0},
    "adversary": {"weight": 0.1, "start": 0},
    "perceptual": {"distance": "tokenizer"},
}


def critics(teacher, **settings):
    torch.manual_seed(0)
    plan = make_plan(SampleConfig(cfg=2.0, count=10), teacher)
    return new_critics(DistillConfig(**settings), teacher, plan, 8.0)


def losses(judges, said):
    """The losses of one step, which every critic then takes."""
    found = [critic.loss(said, 1.0)[0].item() for critic in judges]
    for critic in judges:
        critic.update(lambda gradients: None)
    return found


@pytest.mark.parametrize(
    ("settings", "kinds"),
    [
        ({}, []),
        ({"score": {"weight": 1.0}}, [ScoreDistillation]),
        ({"adversary": {"weight": 0.1}}, [Adversary]),
        ({"perceptual": {"distance": "tokenizer"}}, [Perceptual]),
        (ALL, [ScoreDistillation, Adversary, Perceptual]),
    ],
)
def test_a_job_gets_the_critics_that_it_asks_for(settings, kinds):
    assert [type(critic) for critic in critics(tiny_teacher(), **settings)] == kinds


def test_restored_critics_go_on_bit_for_bit():
    teacher = tiny_teacher()
    first, said = critics(teacher, **ALL), prediction(teacher)
    for _ in range(3):
        losses(first, said)
    file = io.BytesIO()
    torch.save([critic.state_dict() for critic in first], file)
    file.seek(0)
    second = critics(teacher, **ALL)
    for critic, state in zip(second, torch.load(file, weights_only=True), strict=True):
        critic.load_state_dict(state)
    assert [losses(first, said) for _ in range(3)] == [losses(second, said) for _ in range(3)]


def test_discarded_gradients_leave_the_next_step_as_it_would_have_been():
    teacher = tiny_teacher()
    calm, shaken = critics(teacher, **ALL), critics(teacher, **ALL)
    said, bad = prediction(teacher), prediction(teacher, seed=1)
    losses(calm, said)
    for critic in shaken:
        critic.loss(bad, 1.0)
        critic.discard()
    losses(shaken, said)
    assert losses(calm, said) == losses(shaken, said)
