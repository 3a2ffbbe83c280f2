"""Facts about run folders: whose they are, and what is said to a run with other settings."""

import json

import pytest

from ddray.errors import ConfigError
from ddray.run_folder import CONFIG_FILE, claim, write_json
from ddray.storage import open_storage

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


def test_json_is_written_for_people_too(tmp_path):
    write_json(open_storage(str(tmp_path)), "summary.json", {"rows": 1})
    assert (tmp_path / "summary.json").read_text() == '{\n  "rows": 1\n}\n'
