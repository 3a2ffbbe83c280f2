"""The files that runs leave: `config.json`, `summary.json`, `metrics.jsonl`, `events.jsonl`.

A folder belongs to the run that its `config.json` describes.
"""

import contextlib
import json
import time
from collections.abc import Callable, Mapping
from typing import Any, Self

from ddray.errors import ConfigError, StoppedError, StorageError, one_line
from ddray.file_kind import explained, json_value
from ddray.locations import same_place
from ddray.storage.base import NotFoundError, Storage

CONFIG_FILE = "config.json"
SUMMARY_FILE = "summary.json"
METRICS_FILE = "metrics.jsonl"
EVENTS_FILE = "events.jsonl"
EVALUATIONS_FILE = "evaluations.jsonl"
_FLUSH_EVERY_S = 30.0

_IDENTITY = "identity"


def claim(
    storage: Storage,
    config: Mapping[str, Any],
    identity: Mapping[str, Any],
    advice: str,
    in_todays_keys: Callable[[dict[str, Any]], dict[str, Any]] = dict,
) -> dict[str, Any]:
    """Take a run folder, or take it up again.

    Args:
        storage: the folder.
        config: the resolved config, JSON values.
        identity: what makes two runs the same run: an earlier one must have had the same.
        advice: what to do where it had not.
        in_todays_keys: gives the identity that an earlier ddray wrote the keys of this one.

    Returns:
        The identity as the first run of the folder wrote it, which is kept for ever: what is named
        after it stays found.

    Raises:
        ConfigError: if the folder holds a run of another identity, with what differs.
        StorageError: if the folder cannot be written.
    """
    storage.check_writable()
    written = written_identity(storage, identity, advice, in_todays_keys)
    write_json(storage, CONFIG_FILE, {**config, _IDENTITY: written})
    return written


def written_identity(
    storage: Storage,
    identity: Mapping[str, Any],
    advice: str,
    in_todays_keys: Callable[[dict[str, Any]], dict[str, Any]] = dict,
) -> dict[str, Any]:
    """The identity of the run that holds a folder, or of the one that would; changes nothing.

    Args and errors are those of `claim`.
    """
    # As JSON would give it back: a tuple is a list.
    now: dict[str, Any] = json.loads(json.dumps(identity))
    if not storage.exists(CONFIG_FILE):
        return now
    written = _earlier_identity(storage)
    changed = "; ".join(_differences(in_todays_keys(written) if written else {}, now))
    if changed:
        raise ConfigError(f"{storage.uri} holds a run with other settings ({changed}); {advice}")
    return written


def write_json(storage: Storage, name: str, values: Mapping[str, Any]) -> None:
    """Write a file of JSON that people read too."""
    storage.write(name, (json.dumps(values, indent=2) + "\n").encode())


def read_lines(storage: Storage, name: str) -> list[dict[str, Any]]:
    """What a file of lines of JSON holds; nothing where there is none.

    Raises:
        StorageError: if it cannot be read, or a line is something else.
    """
    if not storage.exists(name):
        return []
    lines = []
    for number, line in enumerate(storage.read(name).splitlines(), 1):
        try:
            lines.append(dict(json_value(line)))
        except (ValueError, TypeError) as error:
            refusal = f"line {number} of {storage.join(name)} is no object of JSON"
            told = explained(refusal, line, error, "JSON")
            raise StorageError(f"{told}; restore the file, or delete it") from error
    return lines


def read_summary(storage: Storage) -> dict[str, Any]:
    """What `summary.json` holds.

    Raises:
        StorageError: if it cannot be read, or is no JSON object.
    """
    data = storage.read(SUMMARY_FILE)
    try:
        return dict(json_value(data))
    except (ValueError, TypeError) as error:
        refusal = f"{storage.join(SUMMARY_FILE)} is no summary"
        told = explained(refusal, data, error, "JSON")
        raise StorageError(f"{told}; restore it, or rerun with --fresh") from error


class LineLog:
    """A file of one line of JSON for each thing noted, over all runs of a folder.

    It is written anew every half minute at most: an object store cannot append. A log that cannot
    be written is no reason to end the work that it tells of, save at the start.

    Args:
        storage: the folder.
        name: of the file.
    """

    def __init__(self, storage: Storage, name: str):
        self._storage, self._name = storage, name
        try:
            self._lines = storage.read(name).splitlines(keepends=True)
        except NotFoundError:
            self._lines = []
        self._written_at = time.monotonic()

    def add(self, **values: Any) -> None:
        """Note some values, with the time in Unix seconds."""
        line = json.dumps({"time": round(time.time(), 3), **values})
        self._lines.append(line.encode() + b"\n")
        if time.monotonic() - self._written_at >= _FLUSH_EVERY_S:
            self.flush()

    def flush(self) -> None:
        """Write the file, if that can be done."""
        with contextlib.suppress(StorageError):
            self.write()

    def write(self) -> None:
        """Write the file.

        Raises:
            StorageError: if it cannot be written.
        """
        self._storage.write(self._name, b"".join(self._lines))
        self._written_at = time.monotonic()


class EventLog:
    """`events.jsonl`: what happened when.

    As a context it ends with "finished", or with "stopped" or "failed" and the reason.

    Args:
        storage: the folder.
        **values: of the first event, "started".

    Raises:
        StorageError: if the folder cannot be written.
    """

    def __init__(self, storage: Storage, **values: Any):
        self._log = LineLog(storage, EVENTS_FILE)
        self.add("started", **values)
        self._log.write()

    def add(self, event: str, **values: Any) -> None:
        """Note an event."""
        self._log.add(event=event, **values)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None:
            self.add("finished")
        else:
            ended = "stopped" if isinstance(error, StoppedError) else "failed"
            self.add(ended, reason=one_line(error))
        self._log.flush()


def _earlier_identity(storage: Storage) -> dict[str, Any]:
    try:
        identity = json_value(storage.read(CONFIG_FILE))[_IDENTITY]
    except (ValueError, KeyError, TypeError):
        return {}
    return identity if isinstance(identity, dict) else {}


def _differences(then: Mapping[str, Any], now: Mapping[str, Any], path: str = "") -> list[str]:
    """One text for every key of `now` that was another then, nested ones by their path."""
    found = []
    for key, value in now.items():
        before = then.get(key)
        if isinstance(value, dict) and isinstance(before, dict):
            found += _differences(before, value, f"{path}{key}.")
        elif before != value and not same_place(before, value):
            found.append(f"{path}{key}: {before!r} then, {value!r} now")
    return found
