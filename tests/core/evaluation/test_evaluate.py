"""Facts about the evaluation and the bundled models."""

import json
import math
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import ddray
from ddray.cli import _parsed, _resolve
from ddray.config.evaluation import EvaluateConfig
from ddray.config.flags import command_of
from ddray.config.sampling import SampleConfig
from ddray.errors import ConfigError, DDRayError
from ddray.evaluation.evaluate import evaluate
from ddray.evaluation.feature_set import FeatureSet
from ddray.evaluation.generators import Generators, independent_tokens
from ddray.evaluation.look import Look
from ddray.evaluation.planning import Preparation
from ddray.evaluation.report import build_report, tables_as_text, write_evaluation
from ddray.evaluation.rows import Rows
from ddray.models.catalog import BUNDLED_MODELS
from ddray.models.zoo import BUNDLED, METRIC_FOLDER, load_student, load_teacher
from ddray.sets.trajectories.making import make_plan, sample_rows
from ddray.sets.trajectories.trajectory_set import TrajectorySet
from tests.core.tiny import chi_square_p_value, tiny_student, tiny_teacher
from tests.runtime.tiny import write_student, write_teacher

pytestmark = pytest.mark.slow

BUNDLED_TEACHERS = ("digits-llamagen", "digits-var")
SHORT = {
    "student": "digits-var-dd",
    "speed_batches": (1,),
    "speed_seconds": 0.01,
    "transport_count": 0,
    "batch_size": 4,
    "threads": 1,
}


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


def figures(evaluation):
    """Every metric of every row, of which each bit counts."""
    skipped = ("seconds_per_image", "settings", "warnings")
    return [{k: v for k, v in row.items() if k not in skipped} for row in evaluation.quality]


def test_an_evaluation_measures_every_generator_and_writes_its_page(tmp_path):
    out = tmp_path / "out"
    evaluation = evaluate(EvaluateConfig(**{**SHORT, "transport_count": 2}, count=4, out=out))
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
    summary = evaluation.summary
    assert all(row["batch_1"] > 0 for row in summary["speed"])
    assert summary["transport"]["agreement"] > 0.9
    assert "seed 1000003" in summary["protocol"][0]
    assert "classes 0, 1, 2, 3 in turn" in summary["protocol"][0]
    shown = evaluation.pictures, evaluation.columns
    report = build_report(summary, *shown, title="T", subtitle="S", settings={}, commands=["c"])
    write_evaluation(str(tmp_path / "page"), summary, report, *shown)
    written = {p.name for p in (tmp_path / "page").iterdir()}
    assert written == {"report.html", "grid.png", "summary.json"}
    assert json.loads((tmp_path / "page" / "summary.json").read_text()) == summary
    assert "fd_digits" in (tmp_path / "page" / "report.html").read_text()
    assert "student, 2 steps" in tables_as_text(summary)


def test_an_evaluation_that_was_killed_goes_on_to_the_same_bits(tmp_path):
    config = EvaluateConfig(
        **{**SHORT, "speed_batches": "off"}, count=10, shard_rows=4, out=tmp_path
    )
    whole = evaluate(config)
    files = sorted((tmp_path / "features").rglob("*.safetensors"))
    left = {path: path.read_bytes() for path in files}
    for path in files[::3]:
        path.unlink()
    kept = {path: path.stat().st_mtime_ns for path in files if path.exists()}
    assert figures(evaluate(config)) == figures(whole)
    assert {path: path.read_bytes() for path in files} == left
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


def test_more_images_and_another_row_make_only_what_is_not_there(tmp_path):
    few = {**SHORT, "speed_batches": "off", "shard_rows": 4, "out": tmp_path}
    evaluate(EvaluateConfig(**few, count=8, rows="student"))
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.safetensors")}
    larger = evaluate(EvaluateConfig(**few, count=12, rows="teacher,student", skip="2"))
    after = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.safetensors")}
    assert before.items() <= after.items() and len(before) == 4 and len(after) == 9
    fresh = {**few, "out": tmp_path / "other"}
    again = evaluate(EvaluateConfig(**fresh, count=12, rows="teacher,student"))
    assert figures(larger) == figures(again)


def test_a_sweep_is_a_row_for_each_value(tmp_path):
    config = EvaluateConfig(**SHORT, count=4, sweep="cfg=1.0,2.0 top_k=0,8", out=tmp_path)
    names = [row.name for row in Preparation(config).plan.generators if row.kind == "teacher"]
    assert names == [
        "teacher, autoregressive, cfg 1, top_k 0",
        "teacher, autoregressive, cfg 1, top_k 8",
        "teacher, autoregressive, cfg 2, top_k 0",
        "teacher, autoregressive, cfg 2, top_k 8",
    ]


def test_schedules_may_be_swept_too(tmp_path):
    config = EvaluateConfig(**SHORT, count=4, sweep="schedule=0/0,2 cfg=1", out=tmp_path)
    names = [row.name for row in Preparation(config).plan.generators if row.kind != "reference"]
    assert names[1:5] == [
        "teacher, autoregressive, cfg 1",
        "teacher, by transport, cfg 1",
        "student, 1 step",
        "student, 2 steps (0,2)",
    ]


@pytest.mark.parametrize(
    ("sweep", "told"),
    [
        ("cfg=1,x", "cfg=1,x are no numbers"),
        ("cgf=1", "'cgf' cannot be swept; cfg, top_k, top_p, temperature, schedule can"),
        ("cfg", "'cfg' must be KEY=VALUE,VALUE"),
    ],
)
def test_a_sweep_of_something_else_is_refused(sweep, told):
    with pytest.raises(ValueError, match=told):
        EvaluateConfig(sweep=sweep)


def test_the_command_of_a_config_is_one_that_gives_it(tmp_path):
    config = EvaluateConfig(
        **{**SHORT, "speed_batches": "off"},
        sweep="cfg=1.0,2.0 schedule=0/0,2",
        schedules="0,teacher:3-5/0",
        keep_features=False,
        workers="1:2",
        out=str(tmp_path / "a b"),
    )
    _, verb, *words = shlex.split(command_of("evaluate", config))
    assert _resolve(verb, _parsed(verb, words)) == config


def test_the_teacher_may_write_the_first_stages_or_the_last(tmp_path):
    config = {**SHORT, "rows": "student,skip", "skip": "2", "count": 4, "out": tmp_path}
    schedules = "0/0,teacher:3-5/teacher:0-2,2"
    found = evaluate(EvaluateConfig(**config, schedules=schedules)).quality
    assert [(row["generator"], row["steps"]) for row in found] == [
        ("student, 1 step", 1),
        ("student, 3 steps (0,teacher:3-5)", 3),
        ("student, 3 steps (teacher:0-2,2)", 3),
        ("teacher, last 2 steps in one", 4),
    ]
    assert all(math.isfinite(row["fd_digits"]) for row in found)


def test_labels_at_random_are_those_of_the_rule(tmp_path):
    config = EvaluateConfig(**SHORT, count=64, labels="random", out=tmp_path)
    plan = Preparation(config).plan
    assert 5 < len({*plan.label(np.arange(64)).tolist()}) <= 10
    assert plan.label([5]).tolist() == plan.label(np.arange(6))[5:].tolist()
    blocks = Preparation(config.model_copy(update={"labels": "in-order"})).plan
    assert blocks.label(np.arange(15)).tolist() == [0] * 7 + [1] * 7 + [2]


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
    prepared = Preparation(EvaluateConfig(**SHORT, data=uri, count=7, out=tmp_path / "out"))
    assert prepared.plan.label(np.arange(7)).tolist() == [0, 1, 2, 3, 0, 1, 2]
    counts = {row.kind: row.count for row in prepared.plan.generators}
    assert (counts["transport"], counts["student"]) == (4, 7)
    assert Generators(prepared.begin(), "cpu").known[0].tolist() == [0, 1, 2, 3]


def test_a_set_is_compared_over_the_classes_that_it_has(tmp_path):
    uri = set_of(tmp_path / "set", classes="0,0,8", count=3)
    config = EvaluateConfig(**SHORT, data=uri, count=4, out=tmp_path / "out")
    evaluation = evaluate(config)
    assert all(math.isfinite(row["fd_digits"]) for row in evaluation.quality)
    generators = Generators(FeatureSet.open(config.out), "cpu")
    assert generators.plan.label(np.arange(7)).tolist() == [0, 0, 8, 0, 0, 8, 0]
    assert {*generators.known[0].tolist()} == {0, 8}
    assert evaluation.columns == ("0", "0", "8", "0")
    assert sum(np.isfinite(images).all() for _, images in evaluation.pictures) == 5


def test_tokens_of_a_class_that_the_set_lacks_are_refused_by_name():
    known = torch.tensor([1, 5]), torch.zeros(2, 3, dtype=torch.long)
    with pytest.raises(ConfigError, match="no trajectories of class 2 to count tokens in"):
        independent_tokens(known, torch.tensor([1, 2]), torch.arange(2), seed=0, vocab_size=4)


def test_a_set_of_one_row_is_refused_at_once(tmp_path):
    uri = set_of(tmp_path / "set", count=1)
    with pytest.raises(ConfigError, match="has one row, and a Frechet distance needs at least 2"):
        Preparation(EvaluateConfig(student="digits-var-dd", data=uri))


REFUSED = {
    "teacher": ({"teacher": "nowhere"}, "no model 'nowhere'"),
    "metric": ({"metrics": "fidd"}, "metric 'fidd' is not one of fid, "),
    "no weights": ({"metrics": "fid", "inception": "none.pth"}, "none.pth does not exist"),
    "no reference": (
        {"metrics": "fd_efficientnet"},
        "fd_efficientnet compares with real images; give their reference",
    ),
    "few": ({"metrics": "kd_digits", "count": 4}, "kd_digits takes at least 1000 images"),
    "skip": ({"skip": "9"}, "skip=9, but digits-var has 5"),
    "classes": ({"classes": "3,10"}, "classes holds 10; those of digits-var-dd are 0 to 9"),
    "tokenizers": ({"teacher": "digits-llamagen"}, "have different tokenizers"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_work_is_refused_before_anything_is_made(case, tmp_path):
    changes, told = REFUSED[case]
    with pytest.raises(ConfigError, match=told):
        evaluate(EvaluateConfig(**{**SHORT, "out": tmp_path / "out", **changes}))
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_a_look_shows_captions_or_classes_above_its_pictures(tmp_path):
    prepared = Preparation(EvaluateConfig(**SHORT, count=3, rows="student", out=tmp_path))
    features = prepared.begin()
    look = Look(prepared.config, Generators(features, "cpu", **prepared.models))
    assert look.columns(["zero", "one"]) == ("zero", "one", "2")
    assert [images.shape for _, images in look.pictures()] == [(3, 1, 28, 28)] * 2


def test_a_student_alone_need_not_name_its_teacher(tmp_path):
    student = shutil.copytree(BUNDLED / "digits-var-dd", tmp_path / "student")
    card = json.loads((student / "config.json").read_text())
    card.pop("teacher")
    (student / "config.json").write_text(json.dumps(card))
    config = {**SHORT, "student": student, "count": 4, "out": tmp_path / "out"}
    assert {*Preparation(EvaluateConfig(**config, rows="student")).models} == {"student"}
    with pytest.raises(ConfigError, match="does not name its teacher; give teacher="):
        Preparation(EvaluateConfig(**config, rows="student", schedules="0,teacher:3-5"))


def test_other_weights_than_where_it_began_are_refused(tmp_path):
    prepared = Preparation(EvaluateConfig(**SHORT, count=4, rows="student", out=tmp_path))
    changed = replace(prepared.plan, fingerprints={"student": "0" * 64})
    features = FeatureSet.create(str(Path(tmp_path)), changed)
    with pytest.raises(DDRayError, match="digits-var-dd has other weights here"):
        Generators(features, "cpu").content(changed.generators[-1], range(2))


def test_a_student_of_captions_beside_its_teacher(tmp_path):
    length, width = 4, 6
    teacher = write_teacher(tmp_path / "teacher", cls_token_num=length, caption_dim=width)
    student = write_student(tmp_path / "student", teacher)
    random = np.random.default_rng(0)
    rows = [
        {"index": i, "caption": f"a cat, {i}", "features": random.normal(size=(2, width)).tolist()}
        for i in range(6)
    ]
    captions = tmp_path / "captions.jsonl"
    captions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    np.savez(tmp_path / "real.npz", arr_0=random.integers(0, 256, (8, 16, 16, 3), dtype=np.uint8))
    found = evaluate(
        EvaluateConfig(
            **{**SHORT, "student": student, "teacher": teacher, "speed_batches": "1"},
            captions=captions,
            count=6,
            shard_rows=3,
            metrics="fd_efficientnet",
            reference=str(tmp_path / "real.npz"),
            out=tmp_path / "out",
        )
    )
    assert [row["kind"] for row in found.quality] == [
        *("teacher", "transport", "student", "student", "independent")
    ]
    assert all(row["fd_efficientnet"] > 0 for row in found.quality)
    assert found.columns == tuple(f"a cat, {i}" for i in range(6))
    assert found.summary["worst_classes"] == {}
    assert "captions in their order" in found.summary["protocol"][0]


def test_sets_and_rows_sample_as_a_teacher_is_best_sampled():
    teacher, student = tiny_teacher(), tiny_student()
    teacher.config |= {"default_cfg": 3.0, "default_top_p": 0.5}
    told = {"cfg": 2.0, "top_p": 1.0}
    for settings, expected in (({}, {"cfg": 3.0, "top_p": 0.5}), (told, told)):
        plan = make_plan(SampleConfig(**settings), teacher)
        assert {key: getattr(plan, key) for key in told} == expected
        config = EvaluateConfig(count=4, rows=("teacher", "transport"), **settings)
        rows = Rows(config, {"teacher": teacher, "student": student}, [0, 1, 2]).all(None, False)
        assert [{key: row.settings[key] for key in told} for row in rows] == [expected] * 2
