"""The files that every run leaves: `config.json`, `summary.json`, `metrics.jsonl`.

A folder belongs to the run that its `config.json` describes. Imports ddray.errors and storage.
"""

import json
from collections.abc import Mapping
from typing import Any

from ddray.errors import ConfigError
from ddray.storage import Storage

CONFIG_FILE = "config.json"
SUMMARY_FILE = "summary.json"
METRICS_FILE = "metrics.jsonl"

_IDENTITY = "identity"


def claim(
    storage: Storage, config: Mapping[str, Any], identity: Mapping[str, Any], advice: str
) -> None:
    """Take a run folder, or take it up again.

    Args:
        storage: the folder.
        config: the resolved config, JSON values.
        identity: what makes two runs the same run: an earlier one must have had the same.
        advice: what to do where it had not.

    Raises:
        ConfigError: if the folder holds a run of another identity, with what differs.
        StorageError: if the folder cannot be written.
    """
    storage.check_writable()
    # As JSON would give it back: a tuple is a list.
    now = json.loads(json.dumps(identity))
    if storage.exists(CONFIG_FILE):
        then = _earlier_identity(storage)
        changed = "; ".join(_differences(then, now))
        if changed:
            raise ConfigError(
                f"{storage.uri} holds a run with other settings ({changed}); {advice}"
            )
    write_json(storage, CONFIG_FILE, {**config, _IDENTITY: now})


def write_json(storage: Storage, name: str, values: Mapping[str, Any]) -> None:
    """Write a file of JSON that people read too."""
    storage.write(name, (json.dumps(values, indent=2) + "\n").encode())


def _earlier_identity(storage: Storage) -> dict[str, Any]:
    try:
        identity = json.loads(storage.read(CONFIG_FILE))[_IDENTITY]
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
        elif before != value:
            found.append(f"{path}{key}: {before!r} then, {value!r} now")
    return found
