"""One process at a time in a run folder: a lease that is renewed while its holder lives.

Leases are files `lease-<generation>.json`. Each is made by a conditional write, and the highest
holds: a stale one is taken over by making the next. Whether a holder lives is seen from its file,
which changes with every beat, and not from clocks, which differ between machines; on the holder's
own machine it is seen at once from its process.
"""

import contextlib
import json
import os
import re
import socket
import sys
import threading
import time
import uuid
from pathlib import Path
from typing import Any, Self

import psutil

from ddray.errors import StorageError
from ddray.storage.base import NotFoundError, Storage

_PREFIX = "lease-"
_BEAT_S = 5.0
_STALE_S = 30.0


class Lease:
    """A run folder, held as long as the context lasts.

    Args:
        storage: the folder.
        beat_s: how often the file is written anew.
        stale_s: a file that has not changed for so long is nobody's.

    Attributes:
        is_lost: whether another process has taken over, which it does when this one has stood
            still for too long; what this one writes now would lie among the other's.
    """

    def __init__(self, storage: Storage, beat_s: float = _BEAT_S, stale_s: float = _STALE_S):
        self._storage, self._beat_s, self._stale_s = storage, beat_s, stale_s
        self._holder = {"owner": uuid.uuid4().hex, **_this_process()}
        self._generation, self._beats, self.is_lost = 0, 0, False
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep, daemon=True, name="lease")

    def __enter__(self) -> Self:
        """Take the folder.

        Raises:
            StorageError: a living process holds it; waits for as long as that is in doubt.
                or the folder cannot be written.
        """
        others = self._leases()
        last = max(others, default=0)
        if others and not self._is_stale(last, others[last]):
            raise self._refusal(others[last])
        self._generation = last + 1
        if not self._write(if_absent=True):
            raise self._refusal(self._leases().get(self._generation, {}))
        # Somebody who saw the folder at another moment may hold another generation by now.
        for generation, holder in self._leases().items():
            if generation != self._generation and others.get(generation) != holder:
                self._delete(self._generation)
                raise self._refusal(holder)
        for generation in others:
            self._delete(generation)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        if not self.is_lost:
            with contextlib.suppress(StorageError):
                self._delete(self._generation)

    def require(self) -> None:
        """Refuse to go on where another process has taken over.

        Raises:
            StorageError: this one had stood still for too long.
        """
        if self.is_lost:
            raise StorageError(
                f"{self._storage.uri} was taken over by another process while this one stood "
                "still; what that makes is whole without it"
            )

    def _keep(self) -> None:
        while not self._ended.wait(self._beat_s):
            # A storage that is away for a while is no reason to end the work; it is asked again.
            with contextlib.suppress(StorageError):
                if max(self._generations(), default=0) > self._generation:
                    self.is_lost = True
                    return
                self._beats += 1
                self._write()

    def _is_stale(self, generation: int, holder: dict[str, Any]) -> bool:
        """Whether a lease is nobody's any more; takes as long as it is in doubt."""
        lives = _lives(holder)
        if lives is not None:
            return not lives
        print(
            f"ddray: {self._storage.uri} is held by {_described(holder)}; looking for up to "
            f"{self._stale_s:g} s whether that is alive",
            file=sys.stderr,
            flush=True,
        )
        name = _name(generation)
        seen, until = self._version(name), time.monotonic() + self._stale_s
        while time.monotonic() < until:
            time.sleep(min(1.0, self._beat_s))
            if self._version(name) != seen:
                return False
        return True

    def _version(self, name: str) -> str:
        try:
            return self._storage.version(name)
        except NotFoundError:
            return ""

    def _leases(self) -> dict[int, dict[str, Any]]:
        """Generation -> who holds it."""
        found = {}
        for generation in self._generations():
            with contextlib.suppress(NotFoundError):
                found[generation] = _holder(self._storage.read(_name(generation)))
        return found

    def _generations(self) -> list[int]:
        numbers = re.compile(rf"{_PREFIX}(\d{{6,}})\.json")
        return [int(m[1]) for name in self._storage.list(_PREFIX) if (m := numbers.fullmatch(name))]

    def _write(self, *, if_absent: bool = False) -> bool:
        value = json.dumps({**self._holder, "beats": self._beats}).encode()
        return self._storage.write(_name(self._generation), value, if_absent=if_absent)

    def _delete(self, generation: int) -> None:
        self._storage.delete(_name(generation))

    def _refusal(self, holder: dict[str, Any]) -> StorageError:
        return StorageError(
            f"{self._storage.uri} is in use by {_described(holder)}; wait until that has ended, or "
            "use another out"
        )


def _holder(content: bytes) -> dict[str, Any]:
    try:
        holder = json.loads(content)
        del holder["beats"]
    except (ValueError, KeyError, TypeError):
        return {}
    return dict(holder)


def _name(generation: int) -> str:
    return f"{_PREFIX}{generation:06d}.json"


def _described(holder: dict[str, Any]) -> str:
    if "pid" not in holder:
        return "another process"
    return f"process {holder['pid']} on {holder.get('host', 'another machine')}"


def _this_process() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "machine": _machine(),
        "pid": os.getpid(),
        "started": psutil.Process().create_time(),
    }


def _machine() -> str:
    """A word for what numbers processes: this start of a machine, and its container."""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    return f"{uuid.getnode():x} {int(psutil.boot_time())}"


def _lives(holder: dict[str, Any]) -> bool | None:
    """Whether a process lives; None = it is not for this machine to say."""
    if holder.get("machine") != _machine():
        return None
    try:
        return bool(psutil.Process(holder["pid"]).create_time() == holder["started"])
    except (psutil.Error, KeyError, TypeError, ValueError):
        return False
