"""Facts about the evaluation and the bundled models."""

import json
import math

import numpy as np
import pytest
import torch

import ddray
from ddray.config.evaluation import EvaluateConfig
from ddray.config.sampling import SampleConfig
from ddray.errors import ConfigError
from ddray.evaluation.evaluate import Evaluator, evaluate, independent_tokens
from ddray.evaluation.report import build_report, tables_as_text, write_evaluation
from ddray.models.catalog import BUNDLED_MODELS
from ddray.models.zoo import BUNDLED, METRIC_FOLDER, load_student, load_teacher
from ddray.sets.trajectories.making import make_plan, sample_rows
from ddray.sets.trajectories.trajectory_set import TrajectorySet
from tests.core.tiny import chi_square_p_value

pytestmark = pytest.mark.slow

BUNDLED_TEACHERS = ("digits-llamagen", "digits-var")
SHORT = {"student": "digits-var-dd", "speed_batches": (1,), "speed_seconds": 0.01}


def test_independent_tokens_follow_the_marginals_of_their_class_and_position():
    torch.manual_seed(0)
    labels = torch.arange(4000) % 2
    tokens = torch.stack((torch.randint(0, 4, (4000,)), labels * 3), 1)
    drawn = independent_tokens((labels, tokens), labels, torch.arange(4000), seed=5, vocab_size=4)
    assert torch.equal(drawn[:, 1], labels * 3)
    for digit in (0, 1):
        known = torch.bincount(tokens[labels == digit, 0], minlength=4).double()
        counts = torch.bincount(drawn[labels == digit, 0], minlength=4)
        assert chi_square_p_value(counts, known / known.sum()) > 0.01


def test_independent_tokens_lose_what_ties_positions_together():
    labels = torch.zeros(2000, dtype=torch.long)
    first = torch.arange(2000) % 2
    tokens = torch.stack((first, first), 1)
    drawn = independent_tokens((labels, tokens), labels, torch.arange(2000), seed=1, vocab_size=2)
    assert 0.4 < (drawn[:, 0] == drawn[:, 1]).float().mean() < 0.6


def size_of(name):
    return sum(f.stat().st_size for f in (BUNDLED / name).iterdir())


def test_bundled_models_are_small_and_say_where_they_come_from():
    for teacher in BUNDLED_TEACHERS:
        assert size_of(teacher) + size_of("digits-classifier") <= 8e6
        assert size_of(f"{teacher}-dd") <= 5e6
    for name in (*BUNDLED_MODELS, "digits-classifier"):
        card = (BUNDLED / name / "card.md").read_text()
        for word in ("Data", "Recipe", "Command", "Measured"):
            assert word in card, f"{name}: the card lacks {word}"


def test_the_unit_of_the_metric_is_two_halves_of_the_held_out_digits():
    card = json.loads((METRIC_FOLDER / "config.json").read_text())
    assert card["fd_digits_of_disjoint_halves"] == pytest.approx(1.0, abs=0.01)


@pytest.mark.parametrize("name", BUNDLED_TEACHERS)
def test_a_bundled_student_belongs_to_its_teacher(name):
    teacher = load_teacher(name, device="cpu")
    student = load_student(f"{name}-dd", device="cpu")
    assert student.config["teacher"] == name
    assert student.config["teacher_fingerprint"] == teacher.fingerprint
    assert student.tokenizer.fingerprint == teacher.tokenizer.fingerprint
    first, second = student.config["schedule"]
    assert first == 0 < second < len(teacher.stages)


@pytest.mark.parametrize("name", BUNDLED_TEACHERS)
def test_a_bundled_student_follows_the_noise_of_its_teacher(name):
    teacher = ddray.load_teacher(name, device="cpu")
    student = ddray.load_student(f"{name}-dd", device="cpu")
    labels, index = torch.arange(20) % 10, torch.arange(20) + 10**6
    cfg = teacher.default_cfg
    target = teacher.decode(teacher.trajectories(labels, index, seed=1, cfg=cfg))
    same = student.decode(student.generate(labels, seed=1, index=index))
    other = student.decode(student.generate(labels, seed=2, index=index))
    assert (same - target).square().mean() < 0.6 * (other - target).square().mean()


def test_an_evaluation_measures_every_generator_and_writes_its_page(tmp_path):
    config = EvaluateConfig(**SHORT, count=4, batch_size=4, transport_count=2)
    evaluation = evaluate(config)
    names = [row["generator"] for row in evaluation.quality]
    assert names[-5:] == [
        "teacher, autoregressive",
        "teacher, by transport",
        "student, 1 step",
        "student, 2 steps",
        "independent tokens",
    ]
    assert all(row["fd_digits"] > 0 for row in evaluation.quality)
    assert all(0 <= row["class_accuracy"] <= 1 for row in evaluation.quality)
    assert all(row["batch_1"] > 0 for row in evaluation.speed)
    assert evaluation.transport["agreement"] > 0.9
    assert "seed 1000003" in evaluation.protocol[0]
    assert "classes 0, 1, 2, 3 in turn, for so few images" in evaluation.protocol[0]
    summary, shown = evaluation.summary(), (evaluation.shown, evaluation.columns)
    report = build_report(summary, *shown, title="T", subtitle="S", settings={}, commands=["c"])
    write_evaluation(str(tmp_path), summary, report, *shown)
    assert {p.name for p in tmp_path.iterdir()} == {"report.html", "grid.png", "summary.json"}
    assert json.loads((tmp_path / "summary.json").read_text())["quality"][0]["images"] > 0
    assert "fd_digits says how far" in (tmp_path / "report.html").read_text()
    assert "student, 2 steps" in tables_as_text(summary)


def set_of(folder, **changes):
    """A set of one shard, made by few evaluations: what it holds is not looked at."""
    config = SampleConfig.model_validate(
        {"teacher": "digits-var", "num_evals": 2, "out": str(folder), **changes}
    )
    teacher = load_teacher("digits-var", device="cpu")
    trajectories = TrajectorySet.create(config.out, make_plan(config, teacher))
    index = np.arange(config.count)
    tokens = sample_rows(teacher, trajectories.plan, range(config.count))
    trajectories.write_shard(0, index, trajectories.plan.label(index), tokens)
    return config.out


def test_a_set_of_fewer_rows_than_classes_is_compared_over_those_that_it_has(tmp_path):
    uri = set_of(tmp_path / "set", count=4)
    evaluator = Evaluator(EvaluateConfig(**SHORT, data=uri, count=4, batch_size=4))
    assert evaluator.labels_of(7).tolist() == [0, 1, 2, 3, 0, 1, 2]
    assert evaluator.known[0].tolist() == [0, 1, 2, 3]
    assert "classes 0, 1, 2, 3 in turn, as the set has them" in evaluator.protocol()[0]


def test_a_set_is_compared_over_the_classes_that_it_has(tmp_path):
    uri = set_of(tmp_path / "set", classes="0,0,8", count=3)
    config = EvaluateConfig(**SHORT, data=uri, count=4, batch_size=4, transport_count=2)
    evaluator = Evaluator(config)
    assert evaluator.labels_of(7).tolist() == [0, 0, 8, 0, 0, 8, 0]
    rows = {row["generator"]: row for row in evaluator.quality()}
    assert all(math.isfinite(row["fd_digits"]) for row in rows.values())
    assert {*evaluator.known[0].tolist()} == {0, 8}
    assert "classes 0, 8 in turn, as the set has them" in evaluator.protocol()[0]
    names = [name for name, images in evaluator.pictures() if images.isfinite().all()]
    assert len(names) == 5


def test_tokens_of_a_class_that_the_set_lacks_are_refused_by_name():
    known = torch.tensor([1, 5]), torch.zeros(2, 3, dtype=torch.long)
    with pytest.raises(ConfigError, match="no trajectories of class 2 to count tokens in"):
        independent_tokens(known, torch.tensor([1, 2]), torch.arange(2), seed=0, vocab_size=4)


def test_a_set_of_one_row_is_refused_at_once(tmp_path):
    uri = set_of(tmp_path / "set", count=1)
    with pytest.raises(ConfigError, match="has one row, and a Frechet distance needs at least 2"):
        Evaluator(EvaluateConfig(student="digits-var-dd", data=uri))


def test_a_student_without_a_known_teacher_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no model 'nowhere'"):
        evaluate(EvaluateConfig(teacher="nowhere"))
