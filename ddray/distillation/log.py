"""What a training shows while it runs: `metrics.jsonl`, and the same for TensorBoard."""

import contextlib
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ddray.errors import StorageError
from ddray.storage import open_storage
from ddray.storage.run_folder import METRICS_FILE

TENSORBOARD_FOLDER = "tensorboard"
_FLUSH_EVERY_S = 30.0


def draw(out: str, line: dict[str, Any], picture: npt.NDArray[np.uint8]) -> None:
    """Give TensorBoard the figures and the picture of an evaluation.

    Args:
        out: URI of the run.
        line: of `evaluations.jsonl`.
        picture: uint8 [H, W, C].
    """
    from tensorboardX import SummaryWriter

    with tempfile.TemporaryDirectory(prefix="ddray-") as folder:
        with SummaryWriter(folder, filename_suffix=f".step-{line['step']}") as board:
            _add_scalars(board, {"step": line["step"], **_figures(line["quality"])})
            board.add_image("same_noise", picture, line["step"], dataformats="HWC")
        _copy(folder, out)


def _figures(quality: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Curves of all rows: a student's end in its steps, such as fid_1."""
    found: dict[str, float] = {}
    for row in quality:
        whose = row["steps"] if row["generator"].startswith("student") else "teacher"
        figures = {k: v for k, v in row.items() if k not in ("generator", "steps", "images")}
        found |= {f"{key}_{whose}": v for key, v in figures.items() if v is not None}
    return found


def _add_scalars(board: Any, line: dict[str, Any]) -> None:
    for name, value in line.items():
        if name != "step":
            board.add_scalar(name, value, line["step"])


def _copy(folder: str, out: str) -> None:
    storage = open_storage(out)
    for file in Path(folder).iterdir():
        storage.write(f"{TENSORBOARD_FOLDER}/{file.name}", file.read_bytes())


class TrainingLog:
    """The lines of a run, from its first step on, whoever made them.

    Files are written anew every half minute at most: an object store cannot append. Where they
    cannot be written the training goes on; its checkpoints carry the lines too.

    Args:
        out: URI of the run.
        lines: what an earlier attempt had logged up to its last checkpoint.
    """

    def __init__(self, out: str, lines: list[dict[str, Any]]):
        from tensorboardX import SummaryWriter

        self.lines = lines
        self._storage = open_storage(out)
        # Below the current folder: a worker's is Ray's, which deletes it, whoever dies.
        self._folder = tempfile.TemporaryDirectory(prefix="ddray-", dir=Path.cwd())
        purge = int(lines[-1]["step"]) + 1 if lines else 0
        self._board = SummaryWriter(self._folder.name, purge_step=purge)
        self._written_at = 0.0

    def add(self, line: dict[str, Any]) -> None:
        """Log one line; it has a "step", and all its numbers are drawn over that."""
        self.lines.append(line)
        _add_scalars(self._board, line)
        if time.monotonic() - self._written_at >= _FLUSH_EVERY_S:
            self.flush()

    def flush(self) -> None:
        """Write the files, if that can be done; TensorBoard's may lack the latest figures."""
        self._board.flush()
        self._write()

    def _write(self) -> None:
        lines = "".join(json.dumps(line) + "\n" for line in self.lines)
        with contextlib.suppress(StorageError):
            self._storage.write(METRICS_FILE, lines.encode())
            _copy(self._folder.name, self._storage.uri)
        self._written_at = time.monotonic()

    def close(self) -> None:
        """Write what is left."""
        # tensorboardX writes in a thread, for which closing waits and flushing does not.
        self._board.close()
        self._write()
        self._folder.cleanup()
