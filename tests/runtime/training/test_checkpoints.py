"""Facts about names and lists of checkpoints that need no training."""

import json
from pathlib import Path

import pytest

from ddray.runtime.training.checkpoints import checkpoint_name, without_a_cut_list
from ddray.storage import open_storage

pytestmark = pytest.mark.ray

LIST = "checkpoint_manager_snapshot.json"


def test_no_two_checkpoints_have_one_name() -> None:
    names: list[str] = []
    for step, workers in [(40, 1), (40, 1), (40, 2), (40, 1), (400, 1), (40, 12), (40, 1)]:
        names.append(checkpoint_name(step, workers, names))
    assert names[0] == "step-0000040-workers-1"
    assert len({*names}) == len(names)
    # Those in between may be gone by now.
    assert checkpoint_name(40, 1, names[-1:]) not in names


def test_a_cut_list_is_put_aside_and_what_lies_there_named(tmp_path: Path) -> None:
    storage, run = open_storage(tmp_path), tmp_path / "checkpoints-1"
    assert without_a_cut_list(storage, run.name) == []
    for name in ("step-0000020-workers-1", "step-0000040-workers-1"):
        storage.write(f"{run.name}/{name}/parts.json", b"{}")
    whole = json.dumps({"checkpoint_results": []}).encode()
    storage.write(f"{run.name}/{LIST}", whole)
    assert without_a_cut_list(storage, run.name) == []
    assert (run / LIST).read_bytes() == whole
    for cut in (whole[:9], b"", b"\xff\xfe"):
        storage.write(f"{run.name}/{LIST}", cut)
        assert without_a_cut_list(storage, run.name) == [
            "step-0000020-workers-1",
            "step-0000040-workers-1",
        ]
        assert not (run / LIST).exists()
        assert (run / f"damaged-{LIST}").read_bytes() == cut
