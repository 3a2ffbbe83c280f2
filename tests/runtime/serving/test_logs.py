"""Where the log of a service lies, and what its lines are."""

import json
import logging
import re
from collections.abc import Iterator
from logging.handlers import MemoryHandler, RotatingFileHandler
from pathlib import Path

import pytest

from ddray.errors import ConfigError
from ddray.runtime.serving import logs
from ddray.runtime.serving.logs import log_access, open_access_log

pytestmark = pytest.mark.ray


def test_each_start_has_a_folder_under_the_users_state_and_the_last_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    starts = tmp_path / "ddray" / "serve"
    for day in range(1, 26):
        (starts / f"202601{day:02}-120000-port-8000").mkdir(parents=True)
    (starts / "of-somebody-else").mkdir()
    folder = logs._default(8123)
    assert folder.parent == starts
    assert re.fullmatch(r"\d{8}-\d{6}-port-8123", folder.name)
    assert folder.stat().st_mode & 0o777 == 0o700
    kept = sorted(path.name for path in starts.iterdir())
    assert len(kept) == logs._KEPT + 1
    assert {folder.name, "of-somebody-else", "20260125-120000-port-8000"} <= set(kept)


def test_without_a_place_for_state_it_is_a_temporary_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(logs.tempfile, "tempdir", str(tmp_path))
    for state in (str(tmp_path / "file"), "not/absolute"):
        monkeypatch.setenv("XDG_STATE_HOME", state)
        assert logs._default(8000).parent == tmp_path


def test_a_folder_that_cannot_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"log_dir='.*file/log' cannot be written: Not a dir"):
        logs._made(tmp_path / "file" / "log")


@pytest.fixture
def replica_log(tmp_path: Path) -> Iterator[Path]:
    """The log of a replica as Serve sets it up."""
    path = tmp_path / "replica_ddray_ingress_abc.log"
    file = RotatingFileHandler(path, maxBytes=10_000, backupCount=2)
    file.setFormatter(logging.Formatter("INFO %(asctime)s -- %(message)s"))
    handler, logger = MemoryHandler(1, target=file), logging.getLogger("ray.serve")
    before, level = list(logger.handlers), logger.level
    logger.handlers[:] = [handler]
    logger.setLevel(logging.INFO)
    yield path
    logger.handlers[:] = before
    logger.setLevel(level)
    access = logging.getLogger("ray.serve.access")
    for opened in (*access.handlers, file):
        opened.close()
    access.handlers.clear()
    access.propagate = True


def test_requests_have_a_file_of_their_own_of_json_alone(replica_log: Path) -> None:
    open_access_log()
    for k in range(600):
        log_access({"request_id": f"id-{k}", "path": "/\n'\"\ud800", "status": 200})
    logging.getLogger("ray.serve").warning("something else")
    files = sorted(replica_log.parent.glob("*_access.log*"))
    assert files[0].name == "replica_ddray_ingress_abc_access.log"
    assert len(files) == 3  # it is turned over as its neighbour is
    for file in files:
        for line in file.read_text().splitlines():
            assert json.loads(line)["path"] == "/\n'\"\ud800"
    assert "id-0" not in replica_log.read_text()
    assert "something else" in replica_log.read_text()
