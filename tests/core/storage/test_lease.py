"""Facts about leases: one holder at a time, whoever comes when; the dead do not hold for ever."""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ddray.errors import StorageError
from ddray.storage import open_storage
from ddray.storage.base import Storage
from ddray.storage.lease import Lease
from tests.patience import PATIENCE_S, wait_until
from tests.s3_server import BUCKET

HELD = """
import sys, time
from ddray.storage import open_storage
from ddray.storage.lease import Lease
with Lease(open_storage(sys.argv[1])):
    print("held", flush=True)
    time.sleep(1000)
"""


@pytest.fixture(params=["local", "s3"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "local":
        return open_storage(tmp_path / "run")
    request.getfixturevalue("s3_endpoint")
    return open_storage(f"s3://{BUCKET}/{tmp_path.name}")


def _elsewhere(storage: Storage) -> Callable[..., None]:
    """Rewrites the lease as one of another machine, whose processes cannot be looked at."""
    (name,) = storage.list("lease-")
    holder = {**json.loads(storage.read(name)), "machine": "another", "host": "far"}

    def beat(beats: int = 0) -> None:
        storage.write(name, json.dumps({**holder, "beats": beats}).encode())

    return beat


def test_a_second_process_is_refused_and_told_by_whom(storage: Storage) -> None:
    with Lease(storage):
        with pytest.raises(StorageError, match=r"is in use by process \d+ on .*; wait until"):
            Lease(storage).__enter__()
        assert len(storage.list("lease-")) == 1
    assert not storage.list()
    with Lease(storage) as again:
        assert not again.is_lost


def test_one_who_was_killed_holds_no_longer(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HELD, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(StorageError, match=f"process {holder.pid} on"):
        Lease(open_storage(tmp_path)).__enter__()
    holder.kill()
    holder.wait(PATIENCE_S)
    holder.stdout.close()
    began = time.monotonic()
    with Lease(open_storage(tmp_path), stale_s=PATIENCE_S):
        assert time.monotonic() - began < PATIENCE_S / 2  # nobody waited for it to grow stale
        assert len(list(tmp_path.iterdir())) == 1


def test_of_another_machine_it_is_seen_by_its_beats(
    storage: Storage, capsys: pytest.CaptureFixture[str]
) -> None:
    with Lease(storage, beat_s=PATIENCE_S):
        beat, ended = _elsewhere(storage), threading.Event()
        beat()

        def keep() -> None:
            beats = 0
            while not ended.wait(0.05):
                beat(beats := beats + 1)

        keeping = threading.Thread(target=keep, daemon=True)
        keeping.start()
        with pytest.raises(StorageError, match="on far; wait"):
            Lease(storage, beat_s=0.05, stale_s=PATIENCE_S).__enter__()
        ended.set()
        keeping.join()
        with Lease(storage, beat_s=0.05, stale_s=0.3):
            assert len(storage.list("lease-")) == 1
    assert "on far; looking for up to 0.3 s whether that is alive" in capsys.readouterr().err


def test_one_that_stood_still_learns_that_it_has_lost(storage: Storage) -> None:
    with Lease(storage, beat_s=0.05) as first:
        (name,) = storage.list("lease-")
        storage.write("lease-000009.json", b'{"owner": "another"}')
        wait_until(lambda: first.is_lost, "first holder to notice")
        with pytest.raises(StorageError, match="was taken over by another process while this"):
            first.require()
    # What is another's is left alone.
    assert "lease-000009.json" in storage.list()
    assert name in storage.list()


def test_a_damaged_lease_is_nobodys(storage: Storage) -> None:
    for damaged in (b"", b"[]", b"{"):
        storage.write("lease-000003.json", damaged)
        with Lease(storage, beat_s=0.05, stale_s=0.1):
            assert [*storage.list("lease-")] == ["lease-000004.json"]


def test_of_many_at_once_one_gets_in(tmp_path: Path) -> None:
    storage, inside, most = open_storage(tmp_path / "run"), 0, 0
    got_in, lock, start = [], threading.Lock(), threading.Barrier(8)

    def enter() -> None:
        nonlocal inside, most
        start.wait()
        for _ in range(10):
            try:
                with Lease(storage):
                    with lock:
                        inside += 1
                        most = max(most, inside)
                        got_in.append(1)
                    time.sleep(0.001)
                    with lock:
                        inside -= 1
            except StorageError:
                continue

    threads = [threading.Thread(target=enter) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1
    assert got_in
    assert not storage.list()
