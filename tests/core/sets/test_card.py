"""The card of a set: how `datasets` finds its rows, how it was made, and that edits last."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml

from ddray import __version__
from ddray.sets.card import card_text, write_card
from ddray.sets.images.image_set import ImageSet
from ddray.sets.plan import SetPlan
from ddray.sets.trajectories.trajectory_set import TrajectorySet
from tests.core.sets.images.test_image_set import PLAN
from tests.core.sets.trajectories.test_trajectory_set import plan_of

MODEL = {"teacher": "the | teacher"}


def _images(**changes: Any) -> SetPlan:
    return dataclasses.replace(PLAN, **changes)


def _head(plan: SetPlan) -> dict[str, Any]:
    head: dict[str, Any] = yaml.safe_load(card_text(plan, MODEL).split("---\n")[1])
    return head


@pytest.mark.parametrize(
    ("plan", "pattern"),
    [
        (plan_of(), "shards/*.parquet"),
        (_images(), "shards/*.parquet"),
        (_images(encoding="webdataset"), "shards/*.tar"),
        (_images(encoding="images"), "images/**"),
    ],
)
def test_the_head_names_the_files_that_hold_the_rows(plan: SetPlan, pattern: str) -> None:
    (config,) = _head(plan)["configs"]
    assert config == {
        "config_name": "default",
        "data_files": [{"split": "train", "path": pattern}],
    }
    assert "license" not in _head(plan)


def test_folders_of_captions_are_no_classes() -> None:
    text = {"conditioning": "text", "num_classes": 0, "text_encoder": "t5"}
    assert _head(_images(encoding="images", **text))["configs"][0]["drop_labels"] is True


def test_the_card_says_how_the_set_was_made() -> None:
    lines = card_text(_images(classes=(3, 3, 7)), MODEL).splitlines()
    assert "# Images by tiny" in lines
    assert f"7 images made with ddray {__version__} by `ddray generate`" in "\n".join(lines)
    for line in (
        "| student | tiny (sha256 of its weights aaaaaaaaaaaa) |",
        "| teacher of the student | the \\| teacher |",
        "| seed | 4 |",
        "| schedule | 0 |",
        "| classes asked for | 3, 3, 7 |",
    ):
        assert line in lines
    # Lossless, and without an encoder: nothing is said of either.
    assert not [line for line in lines if "None" in line or line.startswith("| encoder")]
    assert "# Trajectories by digits" in card_text(plan_of(teacher="digits"), {}).splitlines()


@pytest.mark.parametrize("kind", [ImageSet, TrajectorySet])
def test_a_card_grows_with_its_set_until_somebody_edits_it(tmp_path: Path, kind: Any) -> None:
    plan = PLAN if kind is ImageSet else plan_of()
    made = kind.create(str(tmp_path), plan)
    card = tmp_path / "README.md"
    for count in (25, 30):
        write_card(made.storage, dataclasses.replace(plan, count=count), MODEL)
        assert f"\n{count} " in card.read_text()
    edited = card.read_text().replace("tags:", "license: cc0-1.0\ntags:")
    card.write_text(edited)
    write_card(made.storage, dataclasses.replace(plan, count=40), MODEL)
    assert card.read_text() == edited
    # Somebody's own, in a folder that a set was put into.
    card.write_bytes(b"\xff my notes")
    write_card(made.storage, plan, MODEL)
    assert card.read_bytes() == b"\xff my notes"
    assert made.verify().unexpected == []
