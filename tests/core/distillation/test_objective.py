"""What an objective says of the network that it trains."""

import json
from pathlib import Path

import pytest

from ddray.config.distillation import DistillConfig
from ddray.config.sampling import SampleConfig
from ddray.distillation.objective import new_objective
from ddray.models.zoo import load_teacher, new_student
from ddray.sets.conditions import open_captions
from ddray.sets.trajectories.making import make_plan
from ddray.sets.trajectories.plan import TrajectoryPlan
from ddray.storage.checkpoint import save_folder
from tests.core.tiny import teacher_config, teacher_state, tokenizer_state

TEXT = {"cls_token_num": 5, "caption_dim": 3}
OBJECTIVES = ("distilled", "continued", "masked")


def _plan(teacher: str, folder: Path, encoder: str | None, **row: object) -> TrajectoryPlan:
    """Of a set of one caption, whose features are given or made by an encoder."""
    (folder / "a.jsonl").write_text(json.dumps({"index": 0, "caption": "a red cat", **row}))
    given = {"captions": str(folder / "a.jsonl"), "text_encoder": encoder, "count": 1}
    config, model = SampleConfig(teacher=teacher, **given), load_teacher(teacher, device="cpu")
    return make_plan(config, model, open_captions(config, model))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A teacher of captions that was trained with an encoder called "words"."""
    folder = tmp_path_factory.mktemp("teacher")
    config = {**teacher_config(**TEXT), "text_encoder": "words"}
    save_folder(folder, config, model=teacher_state(**TEXT), tokenizer=tokenizer_state())
    return str(folder)


def _named(objective: str, teacher: str, plan: TrajectoryPlan, init: str) -> str:
    config = {
        "distilled": DistillConfig(schedule=(0,)),
        "continued": DistillConfig(schedule=(0,), init=init),
        "masked": DistillConfig(objective="masked"),
    }[objective]
    _, card = new_objective(config, load_teacher(teacher, device="cpu"), plan).new_network()
    return str(card["text_encoder"])


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_student_names_the_encoder_of_its_set(
    objective: str, teacher: str, tmp_path: Path
) -> None:
    model = load_teacher(teacher, device="cpu")
    network, card = new_student(model)
    tokenizer = model.tokenizer.state_dict()
    card["text_encoder"] = "other-words"
    save_folder(tmp_path / "init", card, model=network.state_dict(), tokenizer=tokenizer)
    init = str(tmp_path / "init")
    own, other = _plan(teacher, tmp_path, None), _plan(teacher, tmp_path, "meanings")
    assert _named(objective, teacher, own, init) == "words"
    assert _named(objective, teacher, other, init) == "meanings"
    # Where features are given nobody says what made them, but who learnt from such before.
    given = _plan(teacher, tmp_path, None, features=[[1.0, 2.0, 3.0]])
    before = "other-words" if objective == "continued" else "words"
    assert _named(objective, teacher, given, init) == before
