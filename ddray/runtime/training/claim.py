"""Whose a run folder is: the identity of a run, and what becomes of an earlier one."""

import hashlib
import json
import re
import sys
import time
from functools import partial
from typing import Any

from ddray.config.distillation import DistillConfig
from ddray.config.loading import in_todays_keys
from ddray.distillation.log import TENSORBOARD_FOLDER
from ddray.errors import ConfigError
from ddray.evaluation.student_check import BEST_FOLDER, PICTURES_FOLDER
from ddray.runtime.training.worker import STUDENT_FOLDER
from ddray.storage import open_storage
from ddray.storage.base import Storage
from ddray.storage.run_folder import (
    CONFIG_FILE,
    EVALUATIONS_FILE,
    EVENTS_FILE,
    METRICS_FILE,
    SUMMARY_FILE,
    claim,
    read_summary,
    written_identity,
)

_REPLACED = "replaced-"
_OTHER_OUT = "use another out, or --fresh to start over"

# What a run writes into its folder, and --fresh sets aside; other things may lie beside it.
_RUN_FILES = (
    CONFIG_FILE,
    EVENTS_FILE,
    METRICS_FILE,
    SUMMARY_FILE,
    EVALUATIONS_FILE,
    "bad-steps/",
    f"{BEST_FOLDER}/",
    f"{PICTURES_FOLDER}/",
    f"{STUDENT_FOLDER}/",
    f"{TENSORBOARD_FOLDER}/",
    "checkpoints-",
)

# What may differ between the runs that share a folder: where and how, but not what.
_FREE_TO_CHANGE = {
    "out",
    "workers",
    "threads",
    "use_gpu",
    "node_pool",
    "wait_s",
    "activation_checkpointing",
    "compile",
    "checkpoint_every",
    "keep_checkpoints",
    "log_every",
    "evaluate_every",
    "evaluate_count",
    "evaluate_gpus",
    "evaluate",
    "patience",
    "max_failures",
    "max_bad_steps",
    "step_timeout_s",
    "stall_timeout_s",
    "fresh",
    "allow_partial",
}


def run_identity(
    config: DistillConfig, lanes: int, shards: list[int] | None, plan_hash: str
) -> dict[str, Any]:
    """What makes two runs the same run."""
    # The set is known by its plan, wherever it lies.
    fixed = config.model_dump(mode="json", exclude=_FREE_TO_CHANGE | {"data"})
    part = "all" if shards is None else f"{len(shards)}, {_digest(shards)}"
    return {**fixed, "lanes": lanes, "shards": part, "plan_hash": plan_hash}


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:12]


def check_claim(config: DistillConfig, identity: dict[str, Any]) -> None:
    """Refuse a folder of a run with other settings, or with files that the new run will read."""
    storage = open_storage(config.out)
    if not config.fresh:
        written_identity(storage, identity, _OTHER_OUT, partial(in_todays_keys, DistillConfig))
        return
    for key in ("init", "teacher", "data"):
        place = getattr(config, key) or ""
        _, inside, name = place.partition(f"{storage.uri}/")
        # With a slash, so that a folder of the run is among them itself.
        if inside and f"{name}/".startswith(_RUN_FILES):
            raise ConfigError(
                f"{key}={place} lies in the run that --fresh replaces; copy it elsewhere, or use "
                "another out"
            )


def claim_folder(config: DistillConfig, identity: dict[str, Any]) -> str:
    """Take the run folder, or take it up again; refuse one of a run with other settings.

    Returns:
        Name of the folder of its checkpoints, the same for every start of the run.
    """
    identity = claim(
        open_storage(config.out),
        config.model_dump(mode="json"),
        identity,
        _OTHER_OUT,
        partial(in_todays_keys, DistillConfig),
    )
    return f"checkpoints-{_digest(identity)}"


def set_aside(storage: Storage) -> None:
    """Move an earlier run away, in one piece, until the new one has something to go on from."""
    names = [name for name in storage.list() if name.startswith(_RUN_FILES)]
    if not names:
        return
    aside = f"{_REPLACED}{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}"
    # The config comes last: whose folder it is stays clear until all has moved.
    for name in sorted(names, key=CONFIG_FILE.__eq__):
        storage.move(name, f"{aside}/{name}")
    print(
        f"ddray: the earlier run lies in {storage.join(aside)} until the new one has written a "
        "checkpoint",
        file=sys.stderr,
        flush=True,
    )


def drop_replaced(storage: Storage) -> None:
    """Delete runs that were set aside: the one that has taken their place can go on by itself."""
    for folder in {name.partition("/")[0] for name in storage.list(_REPLACED)}:
        if re.fullmatch(rf"{_REPLACED}\d+-\d+", folder):
            storage.delete_folder(folder)


def finished_summary(storage: Storage) -> dict[str, Any] | None:
    """What an earlier run has left that has nothing more to do."""
    if storage.exists(SUMMARY_FILE) and storage.exists(f"{STUDENT_FOLDER}/{CONFIG_FILE}"):
        return read_summary(storage)
    return None
