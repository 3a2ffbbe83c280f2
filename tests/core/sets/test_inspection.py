"""Facts about looking at a trajectory set: what is told, recomputed, drawn and moved aside."""

import json
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from ddray.config.sampling import SampleConfig
from ddray.errors import ConfigError, ShardError
from ddray.models.zoo import load_teacher
from ddray.sets.inspection import describe, quarantine, verified, verify
from ddray.sets.makers import Maker, MakersOfSet, kinds_of, maker_on, makers_of
from ddray.sets.sharded_set import shard_name
from ddray.sets.trajectories.making import make_plan, sample_rows
from ddray.sets.trajectories.picture import write_picture
from ddray.sets.trajectories.plan import TrajectoryPlan
from ddray.sets.trajectories.recompute import recompute
from ddray.sets.trajectories.trajectory_set import TrajectorySet
from ddray.storage.checkpoint import save_folder
from tests.core.sets.trajectories.test_trajectory_set import fill, plan_of
from tests.core.tiny import VAR_SIZES, tiny_teacher, tiny_var


def _write_teacher(folder: Path, seed: int = 0, var: bool = False) -> str:
    teacher = tiny_var(seed=seed) if var else tiny_teacher(seed)
    tokenizer = teacher.tokenizer.state_dict()
    save_folder(folder, teacher.config, model=teacher.model.state_dict(), tokenizer=tokenizer)
    return str(folder)


def _sampled(folder: Path, teacher: str, **settings: Any) -> TrajectorySet:
    """A set that a plain loop has made."""
    values = {"count": 25, "shard_rows": 10, "batch_size": 4, "num_evals": 6, "seed": 3}
    config = SampleConfig(**{"teacher": teacher, "out": str(folder), **values, **settings})
    model = load_teacher(teacher, device="cpu")
    trajectories = TrajectorySet.create(str(folder), make_plan(config, model))
    plan = trajectories.plan
    for k in trajectories.missing():
        index = np.asarray(plan.shard_range(k))
        tokens = np.concatenate([sample_rows(model, plan, batch) for batch in plan.batches(k)])
        trajectories.write_shard(k, index, plan.label(index), tokens)
    return trajectories


@pytest.fixture
def sampled(tmp_path: Path) -> TrajectorySet:
    """25 rows of a tiny LlamaGen in three shards."""
    return _sampled(tmp_path / "set", _write_teacher(tmp_path / "teacher"))


def _rewrite(trajectories: TrajectorySet, k: int, **columns: np.ndarray) -> None:
    """Replace columns of a shard; its hash fits the new rows, as no bit flip's would."""
    index, label, tokens = trajectories.read_shard(k)
    rows = {"label": label, "tokens": tokens, **columns}
    trajectories.write_shard(k, index, rows["label"], rows["tokens"])


# What is told.


def test_progress_and_size_are_those_of_the_shards_that_are_there(tmp_path: Path) -> None:
    plan = plan_of(count=125)
    trajectories = TrajectorySet.create(str(tmp_path), plan)
    told = describe(str(tmp_path))
    assert (told["rows"], told["shards"], told["shards_missing"]) == (0, 0, 13)
    assert told["first_missing"] == list(range(10))
    assert (told["bytes_per_row"], told["labels"], told["tokens"]) == (None, None, None)

    fill(trajectories)
    trajectories.storage.delete(shard_name(1))
    trajectories.storage.write("shards/stray.txt", b"x" * 999)
    told = describe(str(tmp_path))
    assert (told["rows"], told["rows_planned"]) == (115, 125)
    assert (told["shards"], told["shards_planned"], told["first_missing"]) == (12, 13, [1])
    assert told["unexpected_files"] == 1
    size = sum(f.stat().st_size for f in (tmp_path / "shards").glob("*.parquet"))
    assert told["bytes"] == size
    assert told["ratio_to_2_bytes_per_token"] == round(size / 115 / 14 / 2, 4)
    assert (told["plan_hash"], told["cfg"], told["tokens_per_row"]) == (plan.hash, 2.0, 14)
    assert json.loads(json.dumps(told)) == told


def test_labels_and_tokens_are_counted_in_the_sound_shards(tmp_path: Path) -> None:
    plan = plan_of(count=30, num_classes=4, stages=(2, 2), vocab_size=8)
    trajectories = TrajectorySet.create(str(tmp_path), plan)
    for k in range(3):
        index = np.asarray(plan.shard_range(k))
        # Half of the tokens are 5; 1 and 2 share the rest evenly.
        trajectories.write_shard(k, index, plan.label(index), [[5, 1, 5, 2]] * 10)
    path = tmp_path / shard_name(1)
    path.write_bytes(path.read_bytes()[:-9])
    told = describe(str(tmp_path))
    assert list(told["damaged"]) == [shard_name(1)]
    assert told["labels"] == {
        "counted": "in the shards",
        "classes_present": 4,
        # Indices 0 to 9 and 20 to 29: classes 0 and 1 have three of each ten.
        "least_frequent": {"class": 2, "rows": 4},
        "most_frequent": {"class": 0, "rows": 6},
    }
    assert told["tokens"] == {
        "rows_looked_at": 20,
        "codes_used": 3,
        "codes": 8,
        "entropy_bits": 1.5,
        "entropy_bits_if_even": 3.0,
        "most_frequent_code": 5,
        "its_share": 0.5,
    }


def test_of_a_big_set_a_part_is_read_and_labels_are_counted_by_the_plan(tmp_path: Path) -> None:
    plan = plan_of(count=25_002, shard_rows=8334, num_classes=1000, stages=(1,))
    trajectories = TrajectorySet.create(str(tmp_path), plan)
    for k in range(3):
        index = np.asarray(plan.shard_range(k))
        trajectories.write_shard(k, index, plan.label(index), index[:, None] % 2)
    told = describe(str(tmp_path))
    assert told["tokens"]["rows_looked_at"] == 25_002
    assert told["labels"]["counted"] == "in the shards"

    larger = TrajectorySet.create(str(tmp_path), plan_of(**{**vars(plan), "count": 33_336}))
    index = np.asarray(larger.plan.shard_range(3))
    larger.write_shard(3, index, larger.plan.label(index), index[:, None] % 2)
    told = describe(str(tmp_path))
    assert told["tokens"]["rows_looked_at"] == 25_002
    assert told["labels"] == {
        "counted": "by the plan",
        "classes_present": 1000,
        "least_frequent": {"class": 336, "rows": 33},
        "most_frequent": {"class": 0, "rows": 34},
    }


def test_a_set_of_captions_has_no_classes(tmp_path: Path) -> None:
    plan = plan_of(conditioning="text", num_classes=0, count=2)
    trajectories = TrajectorySet.create(str(tmp_path), plan)
    trajectories.write_shard(0, [0, 1], ["a cat", "a dog"], np.zeros((2, 14), int))
    told = describe(str(tmp_path))
    assert (told["labels"], told["tokens"]["codes_used"]) == (None, 1)
    (told_of_captions,) = verify(str(tmp_path))
    assert told_of_captions.startswith("captions of shard 0: ")


# What is recomputed.


def test_random_batches_come_out_as_written(sampled: TrajectorySet) -> None:
    threads = torch.get_num_threads()
    outcome = recompute(sampled.uri, 5)
    assert outcome.ok
    # Batches of 4, or of 2 and 1 at the ends of the shards.
    assert 5 <= outcome.rows < 9
    assert outcome.tokens == 4 * outcome.rows
    assert outcome.lines() == [
        f"recomputed {outcome.rows} rows ({outcome.batches} batches) on {outcome.here.device}: "
        "all as written (made on an unknown kind of device)"
    ]
    assert recompute(sampled.uri, 5) == outcome
    everything = recompute(sampled.uri, 10**9)
    assert (everything.rows, everything.batches, everything.ok) == (25, 8, True)
    assert torch.get_num_threads() == threads


def test_a_changed_token_is_reported_by_index_and_stage(sampled: TrajectorySet) -> None:
    tokens = sampled.read_shard(1)[2]
    changed = tokens.copy()
    changed[3, 2:] = (tokens[3, 2:] + 1) % 8
    _rewrite(sampled, 1, tokens=changed)
    sampled.storage.write("summary.json", b'{"devices": ["cuda"]}')
    assert verify(sampled.uri) == []
    outcome = recompute(sampled.uri, 25)
    assert (outcome.differing_rows, outcome.differing_tokens) == (1, 2)
    assert outcome.lines() == [
        f"recomputed 25 rows (8 batches) on {outcome.here.device}: "
        "1 rows and 2 of 100 tokens differ "
        "(made on cuda)",
        "on another model of device some may: 98.0% of all tokens are equal, and of those with the "
        "same past 99.0%, where 90% must be; rows part first: 1 in stage 2",
        f"differs: index 13: first in stage 2, token 2: {changed[3, 2]} there, {tokens[3, 2]} here "
        "(1 of the stage's 1 tokens, 2 in all)",
    ]
    assert outcome.ok and not outcome.wrong_labels
    sampled.storage.write("summary.json", b"{}")
    assert not recompute(sampled.uri, 25).ok


def test_a_changed_label_is_reported(sampled: TrajectorySet) -> None:
    label = sampled.read_shard(0)[1]
    label[4] = 2
    _rewrite(sampled, 0, label=label)
    assert recompute(sampled.uri, 25).named == ["differs: index 4: label 2 there, 1 in the plan"]


def test_another_model_of_device_must_agree_on_most_tokens(sampled: TrajectorySet) -> None:
    here = maker_on(torch.device("cpu"))
    elsewhere = replace(here, device="CPU of another kind")
    older = replace(here, torch="2.0.0")

    def made_by(*makers: Maker) -> Any:
        told = {"devices": ["cpu"], "made_by": [asdict(maker) for maker in makers]}
        sampled.storage.write("summary.json", json.dumps(told).encode())
        return recompute(sampled.uri, 25)

    assert made_by(here).ok and made_by(elsewhere).ok
    tokens = sampled.read_shard(1)[2]
    changed = tokens.copy()
    changed[3, 2:] = (tokens[3, 2:] + 1) % 8
    _rewrite(sampled, 1, tokens=changed)
    # On the same model every bit counts, whatever else has changed, and that is said.
    assert not made_by(here).ok
    same = made_by(older)
    assert not same.ok
    assert same.lines()[0].endswith(
        f"(made on {here.device}; torch 2.0.0 there, {torch.__version__} here)"
    )
    outcome = made_by(elsewhere, here)
    assert outcome.ok and not outcome.comparable
    assert (outcome.with_same_past, outcome.equal_of_these) == (99, 98)
    assert outcome.parted == {2: 1}
    assert outcome.lines()[0].endswith(f"(made on {here.device}, CPU of another kind)")
    # A set of other noise, or of other weights, is none that a device has rounded.
    for k in range(3):
        _rewrite(sampled, k, tokens=(sampled.read_shard(k)[2] + 1) % 8)
    outcome = made_by(elsewhere)
    assert (outcome.ok, outcome.agreement) == (False, 0.0)


def test_a_summary_by_other_hands_says_nothing_of_makers(sampled: TrajectorySet) -> None:
    for text in ("[]", "no JSON", '{"made_by": 3}', '{"made_by": [{"kind": "cpu"}, "b"]}', "{}"):
        sampled.storage.write("summary.json", text.encode())
        assert makers_of(sampled.storage) == kinds_of(sampled.storage) == []


def test_makers_are_noted_once_and_beside_what_stands_there(sampled: TrajectorySet) -> None:
    here, storage = maker_on(torch.device("cpu")), sampled.storage
    other = replace(here, device="CPU of another kind")
    storage.write("summary.json", b'{"rows": 25}')
    fresh = MakersOfSet(storage, begun=False)
    for maker in (other, here, other):
        fresh.note(maker)
    assert makers_of(storage) == sorted([here, other])
    assert json.loads(storage.read("summary.json"))["rows"] == 25
    assert MakersOfSet(storage, begun=True).known == fresh.known
    # Whoever does not say spoils it, as do shards that nobody took note of.
    fresh.note(None)
    assert makers_of(storage) == []
    late = MakersOfSet(storage, begun=True)
    late.note(here)
    assert late.known == []


def test_only_the_first_differing_rows_are_named(sampled: TrajectorySet) -> None:
    for k in range(3):
        _rewrite(sampled, k, tokens=(sampled.read_shard(k)[2] + 1) % 8)
    outcome = recompute(sampled.uri, 25)
    assert (outcome.differing_rows, outcome.differing_tokens, len(outcome.named)) == (25, 100, 5)


def test_stages_of_many_tokens_are_told_apart(tmp_path: Path) -> None:
    trajectories = _sampled(tmp_path / "set", _write_teacher(tmp_path / "var", var=True))
    assert trajectories.plan.stages == (1, 4, 9) == tuple(n * n for n in VAR_SIZES["patch_nums"])
    tokens = trajectories.read_shard(0)[2]
    changed = tokens.copy()
    changed[0, [3, 4, 7]] ^= 1
    _rewrite(trajectories, 0, tokens=changed)
    line = recompute(trajectories.uri, 25).named[0]
    assert line.startswith("differs: index 0: first in stage 1, token 3: ")
    assert line.endswith("(2 of the stage's 4 tokens, 3 in all)")


def test_damaged_shards_are_passed_over(sampled: TrajectorySet) -> None:
    path = Path(sampled.uri) / shard_name(0)
    path.write_bytes(path.read_bytes()[:-9])
    sampled.storage.delete(shard_name(1))
    outcome = recompute(sampled.uri, 25)
    assert (outcome.rows, outcome.ok) == (5, True)
    sampled.storage.delete(shard_name(2))
    assert recompute(sampled.uri, 25).lines() == [
        "recomputed nothing: no batch of the set is there whole"
    ]


def test_a_teacher_of_other_weights_recomputes_nothing(
    sampled: TrajectorySet, tmp_path: Path
) -> None:
    _write_teacher(tmp_path / "teacher", seed=5)
    message = r"teacher has another network here \(sha256 .{12}\) than in the plan \(.{12}\); rest"
    for look in (lambda: recompute(sampled.uri, 1), lambda: write_picture(sampled.uri, "a.png")):
        with pytest.raises(ShardError, match=message) as error:
            look()
        assert "\n" not in str(error.value)


# What is drawn.


def test_a_picture_has_a_line_for_each_class(sampled: TrajectorySet, tmp_path: Path) -> None:
    path = tmp_path / "pictures" / "rows.png"
    write_picture(sampled.uri, str(path))
    first = path.read_bytes()
    image = Image.open(path)
    # Three lines of six images of 4 pixels, drawn 24-fold, and their titles.
    assert image.height > 3 * 96
    assert image.width > 6 * 96
    write_picture(sampled.uri, str(path))
    assert path.read_bytes() == first


def test_what_cannot_be_drawn_is_refused(sampled: TrajectorySet, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--picture 'rows.jpg': only PNG is written"):
        write_picture(sampled.uri, "rows.jpg")
    for k in range(3):
        sampled.storage.delete(shard_name(k))
    with pytest.raises(ShardError, match="holds no sound shard, so there is nothing to show"):
        write_picture(sampled.uri, str(tmp_path / "rows.png"))


# What is moved aside.


def test_damaged_and_unexpected_files_are_quarantined_and_none_is_lost(
    sampled: TrajectorySet,
) -> None:
    path = Path(sampled.uri) / shard_name(1)
    path.write_bytes(b"first damage")
    pd.DataFrame({"index": [1]}).to_parquet(path.with_name("foreign.parquet"))
    lines = quarantine(sampled, verified(sampled))
    assert lines == [
        "shards/shard-00001.parquet moved to quarantine/shard-00001.parquet.bad",
        "shards/foreign.parquet moved to quarantine/foreign.parquet.bad",
    ]
    path.write_bytes(b"second damage")
    assert quarantine(sampled, verified(sampled)) == [
        "shards/shard-00001.parquet moved to quarantine/shard-00001.parquet-1.bad"
    ]
    assert sampled.storage.read("quarantine/shard-00001.parquet.bad") == b"first damage"
    assert verify(sampled.uri) == [f"missing: {shard_name(1)}"]


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        (None, "no trajectory set at .*: it has no manifest.json; check the URI"),
        (b"", r"manifest.json: not JSON \(Expecting value.*\), so no ddray manifest"),
        (b'{"format": 1, "see', "manifest.json: not JSON"),
        (b'{"student": "x"}', "not a ddray manifest: it has no field 'format'"),
        (b'{"format": 2}', "format 2 is unknown; ddray .* reads format 1: use the ddray that wro"),
        (b'{"format": 1}', "not a plan: unknown fields"),
        (b"\xff\xfe", "manifest.json: not JSON"),
    ],
)
def test_what_is_no_set_is_one_line(manifest: bytes | None, message: str, tmp_path: Path) -> None:
    if manifest is not None:
        (tmp_path / "manifest.json").write_bytes(manifest)
    for look in (describe, verify):
        with pytest.raises(ShardError, match=message) as error:
            look(str(tmp_path))
        assert "\n" not in str(error.value)


def _truncated(path: Path, plan: TrajectoryPlan) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def _foreign(path: Path, plan: TrajectoryPlan) -> None:
    pd.DataFrame({"index": range(10)}).to_parquet(path)


def _of_another_plan(path: Path, plan: TrajectoryPlan) -> None:
    other = TrajectorySet.create(str(path.parents[2] / "other"), plan_of(seed=99))
    fill(other)
    path.write_bytes((Path(other.uri) / shard_name(1)).read_bytes())


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (_truncated, r"damaged or truncated \("),
        (_foreign, "not a shard that ddray wrote: its metadata names no plan"),
        (_of_another_plan, "it belongs to plan .{12}, the set to .{12}"),
    ],
)
def test_a_spoilt_shard_is_one_line(spoil: Any, reason: str, sampled: TrajectorySet) -> None:
    spoil(Path(sampled.uri) / shard_name(1), sampled.plan)
    (line,) = verify(sampled.uri)
    assert re.match(rf"damaged: {shard_name(1)}: {reason}", line)
    assert "\n" not in line
