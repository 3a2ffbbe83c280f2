"""Named runs: what a preset sets on top of the defaults.

`default` is what the README shows; `tiny` goes through every stage in under two minutes, for tests.
"""

import difflib
from collections.abc import Mapping
from typing import Any

from ddray.errors import ConfigError

# Measured figures stand in the model cards and in the README, beside their protocol.
PRESETS: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "sample": {
        "default": {},
        "tiny": {"count": 200, "shard_rows": 100, "batch_size": 50},
    },
    "distill": {
        "default": {},
        "tiny": {"steps": 20, "batch_size": 16, "checkpoint_every": 20, "log_every": 5},
    },
    "generate": {
        "default": {},
        "tiny": {"count": 100, "shard_rows": 50},
    },
    "evaluate": {
        "default": {},
        "tiny": {
            "count": 100,
            "speed_batches": [1, 8],
            "speed_seconds": 0.2,
            "transport_count": 20,
        },
    },
    "encode": {"default": {}, "tiny": {"count": 100, "shard_rows": 50}},
    "reference": {"default": {}, "tiny": {"images": 100, "shard_rows": 50}},
    "serve": {"default": {}, "tiny": {"max_batch_size": 8}},
    "doctor": {"default": {}, "tiny": {}},
}

# Small batches and a late descent of the rate: what a run of minutes learns most by.
_QUICKSTART_DEFAULT: Mapping[str, Any] = {
    "sample": {"count": 10000},
    "distill": {"steps": 3300, "checkpoint_every": 1650},
    "generate": {"count": 500, "shard_rows": 250},
    "evaluate": {"speed_seconds": 0.5, "transport_count": 100},
}


def preset(verb: str, name: str) -> Mapping[str, Any]:
    """Values of a preset.

    Args:
        verb: one that takes a config, such as "sample".
        name: "default" or "tiny".

    Raises:
        ConfigError: for an unknown name.
    """
    parts = ("sample", "distill", "generate", "evaluate")
    names = PRESETS["sample"]
    if name not in names:
        near = difflib.get_close_matches(name, names, 1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ConfigError(f"unknown preset {name!r}; {hint}known are {', '.join(names)}")
    if verb != "quickstart":
        return PRESETS[verb][name]
    if name == "default":
        return _QUICKSTART_DEFAULT
    return {part: PRESETS[part][name] for part in parts}
