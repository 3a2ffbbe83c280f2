"""Facts about run folders: whose they are, and what is said to a run with other settings."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from ddray.errors import ConfigError, ShardError, StoppedError
from ddray.storage import open_storage
from ddray.storage.run_folder import CONFIG_FILE, EVENTS_FILE, EventLog, claim, write_json

IDENTITY = {"steps": 3, "sample": {"count": 10, "teacher": "t"}, "schedule": (0, 16)}


def test_the_same_run_takes_its_folder_up_again(tmp_path):
    storage = open_storage(str(tmp_path))
    for threads in (1, 2):
        claim(storage, {"threads": threads}, IDENTITY, "delete it")
    stored = json.loads((tmp_path / CONFIG_FILE).read_text())
    assert stored["threads"] == 2
    assert stored["identity"]["schedule"] == [0, 16]


def test_another_run_is_refused_with_every_difference(tmp_path):
    storage = open_storage(str(tmp_path))
    claim(storage, {}, IDENTITY, "delete it")
    before = (tmp_path / CONFIG_FILE).read_bytes()
    other = {**IDENTITY, "steps": 4, "sample": {"count": 11, "teacher": "t"}}
    message = r"\(steps: 3 then, 4 now; sample.count: 10 then, 11 now\); delete it"
    with pytest.raises(ConfigError, match=message):
        claim(storage, {}, other, "delete it")
    assert (tmp_path / CONFIG_FILE).read_bytes() == before


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"identity": 1}'])
def test_a_foreign_config_is_refused(tmp_path, content):
    (tmp_path / CONFIG_FILE).write_text(content)
    with pytest.raises(ConfigError, match="steps: None then, 3 now"):
        claim(open_storage(str(tmp_path)), {}, IDENTITY, "delete it")


def test_an_identity_stays_as_the_first_run_wrote_it_whatever_its_keys_are_called_now(tmp_path):
    storage = open_storage(tmp_path)
    first = claim(storage, {}, {"rate": 3}, "delete it")

    def now(identity):
        return {"lr": identity["rate"]}

    assert claim(storage, {}, {"lr": 3}, "delete it", now) == first == {"rate": 3}
    with pytest.raises(ConfigError, match="lr: 3 then, 4 now"):
        claim(storage, {}, {"lr": 4}, "delete it", now)
    assert json.loads((tmp_path / "config.json").read_text())["identity"] == {"rate": 3}


def test_json_is_written_for_people_too(tmp_path):
    write_json(open_storage(str(tmp_path)), "summary.json", {"rows": 1})
    assert (tmp_path / "summary.json").read_text() == '{\n  "rows": 1\n}\n'


def _events(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / EVENTS_FILE).read_text().splitlines()]


def test_events_of_all_runs_stand_in_one_file_each_with_its_time(tmp_path: Path) -> None:
    storage = open_storage(tmp_path)
    with EventLog(storage, missing=2) as events:
        events.add("shard", shard=0)
    with pytest.raises(ShardError), EventLog(storage, missing=1):
        raise ShardError("lost\nfor ever")
    found = _events(tmp_path)
    assert [event["event"] for event in found] == [
        "started",
        "shard",
        "finished",
        "started",
        "failed",
    ]
    assert found[0]["missing"] == 2 and found[1]["shard"] == 0
    assert found[-1]["reason"] == "lost for ever"
    assert [event["time"] for event in found] == sorted(event["time"] for event in found)


def test_an_error_is_told_even_where_its_event_cannot_be_written(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with pytest.raises(ShardError, match="lost"), EventLog(open_storage(folder)):
        shutil.rmtree(folder)
        folder.write_text("no folder any more")
        raise ShardError("lost")


def test_an_end_that_was_asked_for_is_no_failure(tmp_path: Path) -> None:
    storage = open_storage(tmp_path)
    with pytest.raises(StoppedError), EventLog(storage):
        raise StoppedError("stopped at step 3 of 9")
    last = json.loads(storage.read("events.jsonl").splitlines()[-1])
    assert (last["event"], last["reason"]) == ("stopped", "stopped at step 3 of 9")
