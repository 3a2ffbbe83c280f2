"""Which checkpoint a run goes on from: the newest that is whole, whatever has happened to others.

Ray Train keeps the list of them; what lies in a checkpoint is written by
ddray.runtime.training.engine and ddray.runtime.training.worker.
"""

import contextlib
import json
import re
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from ddray.errors import CheckpointError, one_line
from ddray.runtime.training.engine import check_parts
from ddray.storage.base import NotFoundError, Storage

STATE_FILE = "training.json"
_LIST_FILE = "checkpoint_manager_snapshot.json"
_ADVICE = "restore one of them, or rerun with --fresh to start over"


def without_a_cut_list(storage: Storage, run: str) -> list[str]:
    """Put Train's list of checkpoints aside if it is cut: Train does not write it atomically.

    Args:
        storage: the run folder.
        run: name of the run in it.

    Returns:
        Names of the checkpoints that lie there, of which Train knows none then; none, where it
        knows all.
    """
    name = f"{run}/{_LIST_FILE}"
    try:
        json.loads(storage.read(name))
        return []
    except NotFoundError:
        return []
    except ValueError:
        storage.write(f"{run}/damaged-{_LIST_FILE}", storage.read(name))
        storage.delete(name)
    inside = {name.split("/")[1] for name in storage.list(f"{run}/") if name.count("/") > 1}
    return sorted(name for name in inside if name.startswith("step-"))


def checkpoint_name(step: int, workers: int, others: Sequence[str]) -> str:
    """Name of a checkpoint that no other has, by which Train would delete both.

    Args:
        step: it is of.
        workers: whose parts it holds: those of others, left by an upload that never ended, are not
            to lie among them.
        others: names of checkpoints that are there, damaged ones too.
    """
    name = f"step-{step:07d}-workers-{workers}"
    again = [int(match[1] or 1) for other in others if (match := _again(name, other))]
    return f"{name}-again-{max(again) + 1}" if again else name


def _again(name: str, other: str) -> re.Match[str] | None:
    return re.fullmatch(rf"{name}(?:-again-(\d+))?", other)


def known_checkpoints(earlier: Sequence[str] = ()) -> dict[str, Any]:
    """Name -> checkpoint of this run, the newest first; every worker is told the same.

    Args:
        earlier: names of others that lie in the run's folder.
    """
    import ray.train
    from ray.train import Checkpoint, CheckpointConsistencyMode

    reported = ray.train.get_all_reported_checkpoints(
        consistency_mode=CheckpointConsistencyMode.COMMITTED
    )
    known = {Path(kept.checkpoint.path).name: kept.checkpoint for kept in reported}
    last = ray.train.get_checkpoint()
    if last is not None:
        known[Path(last.path).name] = last
    storage = ray.train.get_context().get_storage()
    for name in earlier:
        path = storage.build_checkpoint_path_from_name(name)
        known.setdefault(name, Checkpoint(path, storage.storage_filesystem))
    return dict(sorted(known.items(), key=_age, reverse=True))


def _age(item: tuple[str, Any]) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", item[0])]


@contextlib.contextmanager
def newest_whole(
    known: dict[str, Any], rank: int, world: int, tell: Callable[[str], object]
) -> Iterator[str | None]:
    """The folder of the newest checkpoint that is whole on every worker; all of them must call.

    Args:
        known: see `known_checkpoints`.
        rank: of this worker.
        world: number of workers.
        tell: is told why one is left out, on rank 0.

    Yields:
        Where it lies on this machine; None = there is none yet.

    Raises:
        CheckpointError: there are some, and none is whole.
    """
    reasons: list[str] = []
    for checkpoint in known.values():
        with contextlib.ExitStack() as stack:
            folder, mine = _opened(stack, checkpoint, rank, world)
            reason = _said_by_any(mine, world)
            if reason is None:
                for left_out in reasons if rank == 0 else ():
                    tell(left_out)
                yield folder
                return
            reasons.append(reason)
    if reasons:
        raise CheckpointError(f"{reasons[0]}; no other checkpoint is whole; {_ADVICE}")
    yield None


def _opened(
    stack: contextlib.ExitStack, checkpoint: Any, rank: int, world: int
) -> tuple[str, str | None]:
    """Folder of a checkpoint, and what is wrong with the part that this worker looks at."""
    try:
        folder = stack.enter_context(checkpoint.as_directory())
        check_parts(folder, checkpoint.path)
        _check_content(folder, checkpoint.path, rank, world)
    except FileNotFoundError as error:
        return "", f"the checkpoint {checkpoint.path} is gone: {one_line(error)}"
    except CheckpointError as error:
        return "", one_line(error)
    return folder, None


def _check_content(folder: str, uri: str, rank: int, world: int) -> None:
    """Refuse a file whose bytes are not those that were written; each worker looks at its share."""
    for file in sorted(Path(folder).rglob("*.pt"))[rank::world]:
        try:
            with zipfile.ZipFile(file) as archive:
                damaged = archive.testzip()
        except (zipfile.BadZipFile, OSError) as error:
            damaged = one_line(error)
        if damaged is not None:
            raise CheckpointError(f"the checkpoint {uri} is damaged in {file.name} ({damaged})")
    try:
        json.loads((Path(folder) / STATE_FILE).read_bytes())
    except ValueError as error:
        raise CheckpointError(f"the checkpoint {uri} is damaged in {STATE_FILE}") from error


def _said_by_any(reason: str | None, world: int) -> str | None:
    """The first worker's reason, on every worker."""
    reasons: list[str | None] = [reason] * world
    if world > 1:
        torch.distributed.all_gather_object(reasons, reason)
    return next((said for said in reasons if said is not None), None)
