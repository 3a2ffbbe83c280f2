"""Where Serve's log lies, and how it outlives a Ray of the command's own."""

import json
import logging
import os
import re
import shutil
import tempfile
import time
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any

import ray

from ddray.errors import ConfigError

_KEPT = 20
_OF_A_START = re.compile(r"\d{8}-\d{6}-port-\d+")

_access = logging.getLogger("ray.serve.access")


def keep_log(log_dir: str | None, port: int) -> Path:
    """The folder of Serve's log; must be called before Serve starts.

    A Ray of this command's own ends with its folder, so its log is written to another one.

    Args:
        log_dir: which that is; None = one of this start under the user's state folder, where those
            of the last starts are kept.
        port: of the service.

    Raises:
        ConfigError: if there cannot be such a folder, or a cluster decides.
    """
    about = ray.get_runtime_context()
    inside = Path(about.get_temp_dir(), about.get_session_name(), "logs", "serve")
    if os.environ.get("RAY_ADDRESS"):
        if log_dir is not None:
            raise ConfigError(
                f"log_dir={log_dir!r} is for a Ray that this command starts; in this one, Serve's "
                f"log lies in {inside} on each node"
            )
        return inside
    if inside.exists():  # Serve has begun one
        return inside
    folder = _default(port) if log_dir is None else _made(Path(log_dir))
    inside.parent.mkdir(parents=True, exist_ok=True)
    inside.symlink_to(folder)
    return folder


def _made(folder: Path) -> Path:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder.resolve()
    except OSError as error:
        raise ConfigError(
            f"log_dir={str(folder)!r} cannot be written: {error.strerror}; choose another"
        ) from error


def _default(port: int) -> Path:
    base = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    name = f"{time.strftime('%Y%m%d-%H%M%S')}-port-{port}"
    try:
        if not os.path.isabs(base):  # as where there is no home
            raise ConfigError(f"{base} is no place for a log")
        folder = _made(Path(base, "ddray", "serve", name))
    except ConfigError:
        return Path(tempfile.mkdtemp(prefix="ddray-serve-log-"))
    old = sorted(path for path in folder.parent.iterdir() if _OF_A_START.fullmatch(path.name))
    for path in old[:-_KEPT]:
        shutil.rmtree(path, ignore_errors=True)
    return folder


def open_access_log() -> None:
    """Give requests a file of their own beside the log of the replica that this process is.

    Each of its lines is one JSON object.
    """
    for handler in logging.getLogger("ray.serve").handlers:
        file = getattr(handler, "target", handler)
        if isinstance(file, RotatingFileHandler):
            path = Path(file.baseFilename)
            lines = RotatingFileHandler(
                path.with_name(f"{path.stem}_access.log"),
                maxBytes=file.maxBytes,
                backupCount=file.backupCount,
                delay=True,
            )
            lines.setFormatter(logging.Formatter("%(message)s"))
            _access.handlers[:] = [lines]
            _access.propagate = False
            return


def log_access(line: dict[str, Any]) -> None:
    """Note a request that has ended."""
    _access.info("%s", json.dumps(line))
