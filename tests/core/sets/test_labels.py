"""Facts about labels: which class an image is of, by the rule, the index and the seed alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ddray.config.generation import GenerateConfig
from ddray.config.loading import load_config
from ddray.errors import ConfigError
from ddray.sets.images.image_set import ImageSet
from ddray.sets.images.making import make_plan
from ddray.sets.images.plan import ImagePlan
from ddray.sets.inspection import describe, verify
from ddray.sets.labels import label_of, with_block
from ddray.sets.making import create_set
from tests.core.sets.images.test_image_set import PLAN, fill, images_like, pixels_of, write
from tests.core.tiny import chi_square_p_value, tiny_student


def test_balanced_takes_the_classes_in_turn() -> None:
    assert label_of("balanced", np.arange(7), 3).tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert label_of("balanced", np.arange(5), (4, 4, 9)).tolist() == [4, 4, 9, 4, 4]
    assert label_of("balanced", [5], 3).dtype == np.int32


def test_in_order_takes_blocks_and_begins_again() -> None:
    assert label_of("in-order:2", np.arange(8), (7, 1, 7)).tolist() == [7, 7, 1, 1, 7, 7, 7, 7]
    assert with_block("in-order", 50_000, 1000) == "in-order:50"
    assert with_block("in-order", 11, (0, 5)) == "in-order:6"
    assert (
        with_block("in-order:9", 11, 2) == "in-order:9" and with_block("random", 9, 2) == "random"
    )


def test_random_labels_are_even_and_independent_of_their_neighbours() -> None:
    label = label_of("random", np.arange(30_000), (2, 0, 1), seed=7)
    even = torch.full((3,), 1 / 3)
    assert chi_square_p_value(torch.from_numpy(label).long().bincount(minlength=3), even) > 0.01
    pairs = torch.from_numpy(label[::2] * 3 + label[1::2]).long().bincount(minlength=9)
    assert chi_square_p_value(pairs, torch.full((9,), 1 / 9)) > 0.01
    weighted = label_of("random", np.arange(30_000), (5, 5, 6), seed=7)
    assert abs((weighted == 5).mean() - 2 / 3) < 0.01


def test_random_labels_are_of_seed_and_index_alone() -> None:
    index = np.array([2**40, 0, 9, 2**62])
    label = label_of("random", index, 1000, seed=3)
    assert label_of("random", index[::-1], 1000, seed=3)[::-1].tolist() == label.tolist()
    assert label_of("random", [9], 1000, seed=3)[0] == label[2]
    assert label_of("random", index, 1000, seed=4).tolist() != label.tolist()
    # The same on every machine: sets are extended elsewhere.
    assert label_of("random", np.arange(8), 1000, seed=0).tolist() == KNOWN


KNOWN = [111, 160, 388, 161, 463, 197, 771, 862]


@pytest.mark.parametrize("rule", ["in-order", "in-order:0", "in-order:x", "shuffled", ""])
def test_another_rule_is_refused(rule: str) -> None:
    with pytest.raises(ConfigError, match="must be balanced, random or in-order:M"):
        label_of(rule, [0], 3)
    with pytest.raises(ConfigError, match="plan: labels=|must be balanced"):
        images_like(labels=rule)


# In a set.


def test_a_set_from_before_labels_were_a_choice_keeps_its_hash() -> None:
    assert "labels" not in json.loads(PLAN.to_json())
    other = images_like(labels="random")
    assert other.hash != PLAN.hash and ImagePlan.from_json(other.to_json()) == other


@pytest.mark.parametrize("rule", ["random", "in-order:3"])
@pytest.mark.parametrize("encoding", ["parquet", "images"])
def test_a_set_has_the_labels_of_its_rule(tmp_path: Path, rule: str, encoding: str) -> None:
    images = write(tmp_path, pixels_of(), labels=rule, encoding=encoding)
    expected = label_of(rule, np.arange(7), 12, seed=4).tolist()
    found = [label for k in range(2) for label in images.read_shard(k).label.tolist()]
    assert found == expected and len({*expected}) > 1
    told = describe(images.uri)
    assert told["labels"]["classes_present"] == len({*expected})
    assert verify(images.uri) == []
    larger = ImageSet.create(images.uri, images_like(labels=rule, encoding=encoding, count=12))
    fill(larger, pixels_of())
    assert larger.read_shard(0).label.tolist() == expected[:5]
    assert larger.read_shard(2).label.tolist() == label_of(rule, [10, 11], 12, 4).tolist()
    with pytest.raises(ConfigError, match=f"labels is '{rule}' there and 'balanced' here"):
        ImageSet.create(images.uri, images_like(encoding=encoding, count=12))


def planned(folder: Path, **values: Any) -> ImagePlan:
    student = tiny_student()
    config = GenerateConfig(out=str(folder), batch_size=2, **values)
    plan: Any = create_set(ImageSet, config, make_plan(config, student), student, None).plan
    assert isinstance(plan, ImagePlan)
    return plan


def test_an_extension_goes_on_in_the_blocks_that_were_begun(tmp_path: Path) -> None:
    begun = planned(tmp_path, count=30, labels="in-order")
    assert begun.labels == "in-order:10"
    assert planned(tmp_path, count=300, labels="in-order").labels == "in-order:10"
    with pytest.raises(ConfigError, match="labels is 'in-order:10' there and 'in-order:20' here"):
        planned(tmp_path, count=300, labels="in-order:20")
    with pytest.raises(ConfigError, match="labels is 'in-order:10' there and 'random' here"):
        planned(tmp_path, count=300, labels="random")


def test_captions_have_no_labels() -> None:
    student = tiny_student(cls_token_num=5, caption_dim=3)
    assert student.conditioning == "text"
    with pytest.raises(ConfigError, match="labels=in-order is of classes, but .* on captions"):
        make_plan(GenerateConfig(labels="in-order"), student)
    with pytest.raises(ConfigError, match="labels='random' is of classes, but the student takes"):
        images_like(conditioning="text", labels="random", text_encoder="t5")
    plan = images_like(conditioning="text", num_classes=0, text_encoder="t5")
    assert "labels" not in plan.shown() and "labels" in PLAN.shown()


@pytest.mark.parametrize("value", ["shuffled", "in-order:0", "in-order:", "7"])
def test_what_is_no_rule_is_refused_with_the_rules(value: str) -> None:
    with pytest.raises(ConfigError, match="labels.* must be balanced, random, in-order, or"):
        load_config(GenerateConfig, flags={"labels": value})
