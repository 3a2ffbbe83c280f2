"""Facts about trajectory sets: the plan, what is on disk, extension, damage and repair."""

import dataclasses
import hashlib
import json
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest

from ddray import __version__
from ddray.errors import ConfigError, ShardError, StorageError
from ddray.sets.plan import SCHEMA_FORMAT
from ddray.sets.sharded_set import shard_name
from ddray.sets.trajectories.plan import TrajectoryPlan
from ddray.sets.trajectories.trajectory_set import TrajectorySet

ARGUMENTS: dict[str, Any] = {
    "teacher": "digits-llamagen",
    "teacher_fingerprint": "a" * 64,
    "tokenizer_fingerprint": "b" * 64,
    "conditioning": "class",
    "num_classes": 10,
    "seed": 7,
    "noise_scheme": "philox-1",
    "cfg": 2.0,
    "top_k": 0,
    "top_p": 1.0,
    "temperature": 1.0,
    "solver": "ab2",
    "num_evals": 24,
    "dtype": "float32",
    "threads": 1,
    "count": 25,
    "shard_rows": 10,
    "batch_size": 4,
    "stages": (1, 4, 9),
    "vocab_size": 256,
}


def plan_of(**changes: Any) -> TrajectoryPlan:
    """Return a small plan with some fields changed."""
    return TrajectoryPlan(**{**ARGUMENTS, **changes})


def tokens_of(plan: TrajectoryPlan, index: range) -> np.ndarray:
    """Return tokens that belong to the index alone, as the real ones do."""
    rows = [np.random.default_rng(i).integers(0, plan.vocab_size, plan.num_tokens) for i in index]
    return np.stack(rows)


def fill(trajectories: TrajectorySet) -> list[int]:
    """Write what is missing, as a run does, and return which shards these were."""
    plan, missing = trajectories.plan, trajectories.missing()
    for k in missing:
        index = plan.shard_range(k)
        trajectories.write_shard(k, index, plan.label(index), tokens_of(plan, index))
    return missing


@pytest.fixture
def full(tmp_path: Path) -> TrajectorySet:
    """Give a complete set of 25 rows in 3 shards."""
    trajectories = TrajectorySet.create(str(tmp_path / "set"), plan_of())
    assert fill(trajectories) == [0, 1, 2]
    return trajectories


def path_of(trajectories: TrajectorySet, k: int) -> Path:
    """Return the file of shard `k`."""
    return Path(trajectories.uri) / shard_name(k)


# The plan.


def test_shards_and_batches_cut_the_indices_once() -> None:
    plan = plan_of()
    assert plan.num_shards == 3
    assert [plan.shard_range(k) for k in range(3)] == [range(10), range(10, 20), range(20, 25)]
    assert plan.batches(1) == [range(10, 14), range(14, 18), range(18, 20)]
    assert plan.batches(2) == [range(20, 24), range(24, 25)]
    assert plan_of(count=20).num_shards == 2
    for k in (-1, 3):
        with pytest.raises(ShardError, match=rf"shard {k} does not exist; the plan has 0 to 2"):
            plan.shard_range(k)


def test_labels_are_balanced_and_belong_to_the_index() -> None:
    plan = plan_of(count=1000)
    labels = plan.label(np.arange(1000))
    assert labels.dtype == np.int32
    assert np.bincount(labels).tolist() == [100] * 10
    assert plan.label([999, 3]).tolist() == [9, 3]
    with pytest.raises(ConfigError, match="has no class labels; give captions"):
        plan_of(conditioning="text", num_classes=0).label([0])


def test_classes_come_in_turn_and_as_often_as_they_stand_in_the_list() -> None:
    plan = plan_of(classes=(5, 1, 5), count=1000)
    assert plan.label(range(7)).tolist() == [5, 1, 5, 5, 1, 5, 5]
    assert plan.label([998]).dtype == np.int32
    # Any run of three indices has the list once: every shard, every extension is balanced.
    for start in range(0, 990, 11):
        counts = np.bincount(plan.label(range(start, start + 9)), minlength=10)
        assert counts.tolist() == [0, 3, 0, 0, 0, 6, 0, 0, 0, 0]
    assert np.array_equal(plan_of(classes=(*range(10),)).label(range(30)), np.arange(30) % 10)


def test_fields_that_joined_later_leave_older_sets_as_they_are() -> None:
    text = plan_of(conditioning="text", num_classes=0)
    for older, newer in (
        (plan_of(), {"classes": (0, 1)}),
        (text, {"text_encoder": "google/flan-t5-xl"}),
    ):
        assert not newer.keys() & json.loads(older.to_json()).keys()
        plan = dataclasses.replace(older, **newer)
        assert plan.hash != older.hash
        assert TrajectoryPlan.from_json(plan.to_json()) == plan
        assert TrajectoryPlan.from_json(older.to_json()).classes == ()


def test_a_set_of_some_classes_is_whole_and_no_set_of_all(tmp_path: Path) -> None:
    some = TrajectorySet.create(str(tmp_path), plan_of(classes=[3, 8]))
    assert fill(some) == [0, 1, 2]
    assert TrajectorySet.open(str(tmp_path)).verify().ok
    assert some.rows(0, 25)[1].tolist() == [3, 8] * 12 + [3]
    with pytest.raises(ConfigError, match=r"classes is \(3, 8\) there and \(\) here"):
        TrajectorySet.create(str(tmp_path), plan_of())


def test_the_hash_leaves_out_the_count_and_nothing_else() -> None:
    changes = {
        **dict.fromkeys(("num_classes", "seed", "top_k", "num_evals", "threads"), 3),
        **dict.fromkeys(("shard_rows", "batch_size", "vocab_size"), 3),
        **dict.fromkeys(("teacher", "teacher_fingerprint", "tokenizer_fingerprint"), "z"),
        **dict.fromkeys(("noise_scheme", "solver", "dtype"), "z"),
        **dict.fromkeys(("top_p", "temperature"), 0.5),
        "cfg": None,
        "conditioning": "text",
        "stages": (14,),
    }
    assert changes.keys() == ARGUMENTS.keys() - {"count"}
    hashes = {plan_of(**{name: value}).hash for name, value in changes.items()}
    assert len(hashes | {plan_of().hash}) == len(changes) + 1
    assert plan_of(count=1000).hash == plan_of().hash
    assert plan_of(cfg=2, seed=np.int64(7), stages=[1, 4, 9]) == plan_of()
    assert plan_of(cfg=2, seed=np.int64(7), stages=[1, 4, 9]).hash == plan_of().hash


def test_the_hash_of_format_1_never_changes() -> None:
    # Another value would orphan every set that exists.
    text = json.dumps(
        {name: value for name, value in ARGUMENTS.items() if name != "count"},
        sort_keys=True,
        separators=(",", ":"),
    )
    assert SCHEMA_FORMAT == 1
    assert plan_of().hash == hashlib.sha256(text.encode()).hexdigest()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"classes": (1, 10)}, "plan: classes=[1, 10] holds 10; the teacher's classes are 0 to 9"),
        ({"classes": (-1,)}, "plan: classes=-1 must be an integer of at least 0"),
        ({"classes": 3}, "plan: classes=3 must be a tuple of integers"),
        ({"classes": (0,), "conditioning": "text"}, "classes=[0], but the teacher takes captions"),
        ({"text_encoder": "t5"}, "plan: text_encoder='t5' is for captions; the teacher takes"),
        ({"text_encoder": None}, "plan: text_encoder=None must be a text"),
        ({"count": 0}, "plan: count=0 must be an integer of at least 1"),
        ({"count": -5}, "plan: count=-5 must be an integer of at least 1"),
        ({"shard_rows": 0}, "plan: shard_rows=0 must be an integer of at least 1"),
        ({"batch_size": 0}, "plan: batch_size=0 must be an integer of at least 1"),
        ({"count": 2.5}, "plan: count=2.5 must be an integer"),
        ({"count": True}, "plan: count=True must be an integer"),
        ({"num_evals": None}, "plan: num_evals=None must be an integer of at least 1"),
        ({"seed": -1}, "plan: seed=-1 must be an integer of at least 0"),
        ({"seed": 2**63}, f"plan: seed={2**63} must be an integer"),
        ({"temperature": 0}, "plan: temperature=0 must be a finite number above 0"),
        ({"top_p": 1.5}, "plan: top_p=1.5 must be a finite number above 0 and at most 1"),
        ({"cfg": float("nan")}, "plan: cfg=nan must be a finite number"),
        ({"cfg": "4"}, "plan: cfg='4' must be a finite number"),
        ({"stages": ()}, "plan: stages=() must hold the token count of each AR step"),
        ({"stages": 256}, "plan: stages=256 must be a tuple of integers"),
        ({"stages": (4, 0)}, "plan: stages=0 must be an integer of at least 1"),
        ({"conditioning": "image"}, "plan: conditioning='image' must be class or text"),
        ({"num_classes": 0}, "plan: num_classes=0 must be at least 1 for class conditioning"),
        ({"teacher": Path("x")}, "must be a text"),
    ],
)
def test_bad_plans_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        plan_of(**changes)


def test_a_plan_survives_its_manifest() -> None:
    plan = plan_of(cfg=None)
    written = json.loads(plan.to_json())
    assert TrajectoryPlan.from_json(plan.to_json()) == plan
    assert (written["format"], written["ddray_version"]) == (1, __version__)
    assert written["plan_hash"] == plan.hash
    # The version that wrote it is a note and binds nobody.
    assert TrajectoryPlan.from_json(json.dumps({**written, "ddray_version": "9.9"})) == plan


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 2}, f"format 2 is unknown; ddray {__version__} reads format 1"),
        ({"colour": 1}, "not a plan: unknown fields ['colour'], absent fields []"),
        ({"seed": 8}, "plan_hash does not fit the fields: it was edited"),
        ({"top_p": 7}, "plan: top_p=7 must be"),
    ],
)
def test_foreign_manifests_are_refused(changes: dict[str, Any], message: str) -> None:
    text = json.dumps({**json.loads(plan_of().to_json()), **changes})
    with pytest.raises(ShardError, match=re.escape(message)):
        TrajectoryPlan.from_json(text)


def test_what_is_no_manifest_is_refused() -> None:
    with pytest.raises(ShardError, match="not JSON"):
        TrajectoryPlan.from_json(b"{")
    with pytest.raises(ShardError, match="it has no field 'format'"):
        TrajectoryPlan.from_json("[]")
    with pytest.raises(ShardError, match=r"absent fields \['batch_size', 'cfg'"):
        TrajectoryPlan.from_json('{"format": 1}')


# What is on disk.


def test_rows_come_back_as_written(full: TrajectorySet) -> None:
    index, label, tokens = TrajectorySet.open(full.uri).read_shard(2)
    assert (index.dtype, label.dtype, tokens.dtype) == (np.int64, np.int32, np.uint16)
    assert index.tolist() == [20, 21, 22, 23, 24]
    assert label.tolist() == [0, 1, 2, 3, 4]
    assert np.array_equal(tokens, tokens_of(full.plan, range(20, 25)))
    assert tokens.flags.writeable


def test_a_range_of_rows_crosses_shards(full: TrajectorySet) -> None:
    for start, stop in ((8, 23), (0, 25), (10, 20), (3, 4)):
        index, label, tokens = full.rows(start, stop)
        assert index.tolist() == list(range(start, stop))
        assert np.array_equal(label, full.plan.label(index))
        assert np.array_equal(tokens, tokens_of(full.plan, range(start, stop)))
    for start, stop in ((-1, 3), (3, 3), (0, 26)):
        with pytest.raises(ShardError, match=rf"rows \[{start}, {stop}\) are not within \[0, 25\)"):
            full.rows(start, stop)


def test_plain_pyarrow_and_pandas_read_the_set(full: TrajectorySet) -> None:
    table = pyarrow.dataset.dataset(Path(full.uri) / "shards").to_table()
    assert [str(item.type) for item in table.schema] == [
        "int64",
        "int32",
        "fixed_size_list<element: uint16>[14]",
    ]
    assert table["index"].to_pylist() == list(range(25))
    frame = pd.read_parquet(path_of(full, 1))
    assert list(frame.columns) == ["index", "label", "tokens"]
    assert np.array_equal(np.stack(frame["tokens"]), tokens_of(full.plan, range(10, 20)))
    metadata = pq.read_metadata(path_of(full, 1)).metadata
    assert metadata[b"ddray.plan_hash"].decode() == full.plan.hash
    assert metadata[b"ddray.shard"] == b"1"
    assert len(metadata[b"ddray.rows_sha256"]) == 64


def test_the_bytes_of_a_shard_belong_to_its_rows(full: TrajectorySet) -> None:
    before = path_of(full, 0).read_bytes()
    full.storage.delete(shard_name(0))
    assert fill(full) == [0]
    assert path_of(full, 0).read_bytes() == before


@pytest.mark.parametrize(
    ("vocab_size", "dtype"), [(4096, "uint16"), (65536, "uint16"), (65537, "uint32")]
)
def test_tokens_take_few_bytes(tmp_path: Path, vocab_size: int, dtype: str) -> None:
    plan = plan_of(count=400, shard_rows=400, stages=(256,), vocab_size=vocab_size)
    trajectories = TrajectorySet.create(str(tmp_path), plan)
    tokens = np.random.default_rng(0).integers(0, vocab_size, (400, 256))
    tokens[0, 0] = vocab_size - 1
    trajectories.write_shard(0, np.arange(400), plan.label(np.arange(400)), tokens)
    read = trajectories.read_shard(0)[2]
    assert read.dtype == dtype
    assert np.array_equal(read, tokens)
    # Uniform tokens are the worst case. A uint32 with 17 bits in use has one bit more to pack.
    assert path_of(trajectories, 0).stat().st_size <= 1.16 * 2 * 256 * 400
    if vocab_size <= 65536:
        assert path_of(trajectories, 0).stat().st_size <= 1.15 * 2 * 256 * 400


def test_captions_stand_in_place_of_labels(tmp_path: Path) -> None:
    plan = plan_of(conditioning="text", num_classes=0, count=2)
    trajectories = TrajectorySet.create(str(tmp_path), plan)
    tokens = tokens_of(plan, range(2))
    captions = ["ein Hünd", 'two, "three"']
    trajectories.write_shard(0, [0, 1], captions, tokens)
    assert trajectories.read_shard(0)[1].tolist() == captions
    assert pd.read_parquet(path_of(trajectories, 0))["caption"].tolist() == captions
    assert trajectories.verify().ok
    with pytest.raises(ShardError, match="captions must be strings"):
        trajectories.write_shard(0, [0, 1], [3, 4], tokens)


def test_rows_that_are_not_the_plans_are_not_written(full: TrajectorySet) -> None:
    index, label, tokens = full.read_shard(0)
    too_large, negative = tokens.astype(np.int64), tokens.astype(np.int64)
    too_large[3, 3], negative[3, 3] = 256, -1
    shuffled = np.array([1, 0, *range(2, 10)])
    for rows, message in (
        ((index[:5], label[:5], tokens[:5]), r"shapes \(5,\), \(5,\), \(5, 14\); the plan has"),
        ((index, label, tokens[:, :7]), r"the plan has \(10,\), \(10,\), \(10, 14\)"),
        ((index + 1, label, tokens), "index reaches from 1 to 10; allowed is 0 to 9"),
        ((shuffled, label, tokens), "index is not 0 to 9 in order"),
        ((index, label, too_large), "tokens reaches from . to 256; allowed is 0 to 255"),
        ((index, label, negative), "tokens reaches from -1 to"),
        ((index, label + 5, tokens), "label reaches from 5 to 14; allowed is 0 to 9"),
        ((index, label, tokens / 2), "tokens has dtype float64; integers are needed"),
    ):
        with pytest.raises(ShardError, match=f"shard 0 not written: .*{message}"):
            full.write_shard(0, *rows)
    with pytest.raises(ShardError, match="shard 3 not written: shard 3 does not exist"):
        full.write_shard(3, index, label, tokens)
    assert full.verify().ok


def test_a_set_pickles(full: TrajectorySet) -> None:
    copy = pickle.loads(pickle.dumps(full))
    assert copy.plan == full.plan
    assert copy.verify().ok


# Going on, and extension.


def test_a_rerun_fills_gaps_only(full: TrajectorySet) -> None:
    full.storage.delete(shard_name(1))
    path_of(full, 2).write_bytes(b"")
    before = path_of(full, 0).stat().st_mtime_ns
    again = TrajectorySet.create(full.uri, plan_of())
    assert fill(again) == [1, 2]
    assert path_of(full, 0).stat().st_mtime_ns == before
    assert again.verify().ok


def test_an_extension_replaces_the_short_last_shard_only(full: TrajectorySet) -> None:
    before = path_of(full, 1).read_bytes()
    larger = TrajectorySet.create(full.uri, plan_of(count=48))
    assert larger.missing() == [2, 3, 4]
    with pytest.raises(ShardError, match="shard-00002.parquet: it has 5 of 10 rows; delete it"):
        larger.read_shard(2)
    assert fill(larger) == [2, 3, 4]
    assert path_of(full, 1).read_bytes() == before
    report = TrajectorySet.open(full.uri).verify()
    assert report.ok
    assert report.rows == 48


def test_an_extension_within_the_last_shard_and_one_of_whole_shards(full: TrajectorySet) -> None:
    for count, missing in ((28, [2]), (30, [2]), (50, [3, 4]), (51, [5])):
        assert fill(TrajectorySet.create(full.uri, plan_of(count=count))) == missing
        assert TrajectorySet.open(full.uri).missing() == []


def test_extensions_that_were_not_filled_are_remembered(full: TrajectorySet) -> None:
    middle = TrajectorySet.create(full.uri, plan_of(count=35))
    index = middle.plan.shard_range(3)
    middle.write_shard(3, index, middle.plan.label(index), tokens_of(middle.plan, index))
    larger = TrajectorySet.create(full.uri, plan_of(count=50))
    assert larger.missing() == [2, 3, 4]
    assert fill(TrajectorySet.create(full.uri, plan_of(count=50))) == [2, 3, 4]
    assert larger.verify().ok


def test_a_smaller_count_is_refused(full: TrajectorySet) -> None:
    with pytest.raises(ConfigError, match="count=24 is below the 25 rows of the set at .*at least"):
        TrajectorySet.create(full.uri, plan_of(count=24))


def test_another_plan_is_refused_with_the_differences(full: TrajectorySet) -> None:
    before = (Path(full.uri) / "manifest.json").read_bytes()
    message = (
        "holds a trajectory set of another plan: seed is 7 there and 8 here; "
        "cfg is 2.0 there and None here. Choose another URI, or delete that set"
    )
    with pytest.raises(ConfigError, match=re.escape(message)):
        TrajectorySet.create(full.uri, plan_of(seed=8, cfg=None, count=99))
    assert (Path(full.uri) / "manifest.json").read_bytes() == before


def test_shards_without_a_manifest_are_not_adopted(full: TrajectorySet) -> None:
    (Path(full.uri) / "manifest.json").unlink()
    with pytest.raises(ShardError, match="shards holds files, but there is no manifest.json"):
        TrajectorySet.create(full.uri, plan_of())


def test_opening_what_is_no_set_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match=r"no trajectory set at .*; check the URI, or run `ddray"):
        TrajectorySet.open(str(tmp_path / "nothing"))
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(ShardError, match=r"manifest.json: not a ddray manifest"):
        TrajectorySet.open(str(tmp_path))
    with pytest.raises(StorageError, match="a part of the path is not a directory"):
        TrajectorySet.create(str(tmp_path / "manifest.json"), plan_of())


# Damage.


def test_damage_is_reported_by_file_and_reason(full: TrajectorySet) -> None:
    path = path_of(full, 1)
    whole = path.read_bytes()
    advice = f"delete it and rerun `ddray sample`, or run `ddray inspect {full.uri} --repair`"
    for damaged in (
        whole[: len(whole) // 2],
        whole[:-1],
        whole[:5],
        b"",
        b"PAR1" + bytes(len(whole) - 8) + b"PAR1",
    ):
        path.write_bytes(damaged)
        with pytest.raises(ShardError, match="shard-00001.parquet: damaged or trunc") as caught:
            full.read_shard(1)
        assert str(caught.value).endswith(advice)
        assert "\n" not in str(caught.value)
    path.unlink()
    with pytest.raises(ShardError, match="shard-00001.parquet is missing; rerun `ddray sample`"):
        full.read_shard(1)


def test_a_flipped_byte_never_changes_what_is_read(full: TrajectorySet) -> None:
    path = path_of(full, 1)
    whole = path.read_bytes()
    rows = full.read_shard(1)
    num_refused = 0
    for at in range(0, len(whole), 7):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x55]) + whole[at + 1 :])
        # A flip in what nobody needs, such as the name of the writer, may read as before.
        try:
            read = full.read_shard(1)
        except ShardError:
            num_refused += 1
            continue
        assert all(np.array_equal(a, b) for a, b in zip(read, rows, strict=True))
    assert num_refused > len(whole) / 7 / 4


def test_foreign_shards_are_refused(full: TrajectorySet, tmp_path: Path) -> None:
    other = TrajectorySet.create(str(tmp_path / "other"), plan_of(seed=8))
    fill(other)
    path = path_of(full, 1)
    path.write_bytes(path_of(other, 1).read_bytes())
    message = f"it belongs to plan {other.plan.hash[:12]}, the set to {full.plan.hash[:12]}; delete"
    with pytest.raises(ShardError, match=message):
        full.read_shard(1)
    path.write_bytes(path_of(full, 0).read_bytes())
    with pytest.raises(ShardError, match="it is shard 0, renamed; delete it"):
        full.read_shard(1)
    pd.DataFrame({"index": range(10)}).to_parquet(path)
    with pytest.raises(ShardError, match="not a shard that ddray wrote"):
        full.read_shard(1)


def rewrite(path: Path, tokens: np.ndarray) -> None:
    """Replace the tokens of a shard and keep its metadata, as a forger would."""
    table = pq.read_table(path)
    flat = pyarrow.array(tokens.astype(np.uint16).reshape(-1))
    column = pyarrow.FixedSizeListArray.from_arrays(flat, tokens.shape[1])
    pq.write_table(table.set_column(2, table.schema.field(2), column), path)


def test_changed_rows_do_not_fit_their_hash(full: TrajectorySet) -> None:
    tokens = full.read_shard(0)[2]
    rewrite(path_of(full, 0), tokens)
    assert full.verify().ok
    rewrite(path_of(full, 0), tokens ^ 1)
    with pytest.raises(ShardError, match="the rows do not fit their sha256"):
        full.read_shard(0)


def test_verify_finds_everything_and_quarantine_makes_room(full: TrajectorySet) -> None:
    assert dataclasses.asdict(full.verify()) == {
        "num_shards": 3,
        "missing": [],
        "damaged": {},
        "rows": 25,
        "unexpected": [],
    }
    path_of(full, 0).unlink()
    damaged = path_of(full, 1).read_bytes()[:-9]
    path_of(full, 1).write_bytes(damaged)
    full.storage.write("shards/copy of shard-00002.parquet", path_of(full, 2).read_bytes())
    report = full.verify()
    assert not report.ok
    assert (report.missing, report.rows) == ([0], 5)
    assert report.damaged.keys() == {1}
    assert report.damaged[1].startswith("damaged or truncated (")
    assert report.unexpected == ["shards/copy of shard-00002.parquet"]

    assert full.quarantine(shard_name(1)) == "quarantine/shard-00001.parquet.bad"
    assert full.storage.read("quarantine/shard-00001.parquet.bad") == damaged
    full.storage.delete(report.unexpected[0])
    assert fill(TrajectorySet.create(full.uri, plan_of())) == [0, 1]
    assert full.verify().ok
    full.storage.delete(shard_name(1))
    with pytest.raises(StorageError, match="no such file"):
        full.quarantine(shard_name(1))
