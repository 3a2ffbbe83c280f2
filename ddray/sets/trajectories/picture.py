"""A picture of random rows of a trajectory set, decoded by its teacher's tokenizer.

Shapes: N rows, L tokens of a row, C channels, H and W pixels.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ddray.errors import ConfigError, ShardError
from ddray.method.teacher import Teacher
from ddray.report.image_file import encode_png
from ddray.report.pictures import labelled_grid
from ddray.sets.trajectories.making import planned_teacher
from ddray.sets.trajectories.plan import TrajectoryPlan
from ddray.sets.trajectories.trajectory_set import TrajectorySet
from ddray.storage import open_beside

_LINES, _COLUMNS = 10, 6
# Shards that the rows may come from: enough for some of each class, few enough to read.
_SHARDS = 16
_DECODED_TOGETHER = 12
_CAPTION_LETTERS = 40
# Images are enlarged by a whole factor, up to so many pixels.
_PIXELS_SHOWN = 96


def write_picture(uri: str, path: str) -> None:
    """Decode random rows into a picture: a line of images for each of up to ten classes.

    The choice is a function of the plan and of which shards are there. Of a text set, each line is
    a row with the beginning of its caption.

    Args:
        uri: of the set.
        path: path or URI of the picture, which ends in .png.

    Raises:
        ConfigError: for another ending, or a teacher that is not here.
        ShardError: if the teacher has other weights, or there is nothing to decode.
        StorageError: if the picture cannot be written.
    """
    if not path.endswith(".png"):
        raise ConfigError(f"--picture {path!r}: only PNG is written; give a name that ends in .png")
    storage, name = open_beside(path)
    trajectories = TrajectorySet.open(uri)
    storage.check_writable()
    teacher = planned_teacher(trajectories.plan)
    lines = _lines(trajectories, teacher.config.get("class_names", ()))
    if not lines:
        raise ShardError(f"{trajectories.uri} holds no sound shard, so there is nothing to show")
    decoded = [(title, _decode(teacher, tokens_NL)) for title, tokens_NL in lines]
    scale = max(1, _PIXELS_SHOWN // max(decoded[0][1].shape[2:]))
    page = labelled_grid(decoded, columns=_COLUMNS, scale=scale)
    storage.write(name, encode_png(np.asarray(page)))


def _lines(
    trajectories: TrajectorySet, class_names: Any
) -> list[tuple[str, list[npt.NDArray[Any]]]]:
    """(Title, rows of tokens [L]) of each line, classes in their order."""
    plan = trajectories.plan
    wanted = _rows_to_show(plan, list(trajectories.listing().sizes))
    lines: dict[Any, list[npt.NDArray[Any]]] = {}
    for k in np.unique(wanted // plan.shard_rows).tolist():
        try:
            index, label, tokens = trajectories.read_shard(k)
        except ShardError:
            continue
        for row in np.flatnonzero(np.isin(index, wanted)):
            lines.setdefault(label[row], []).append(tokens[row])

    def title(label: Any) -> str:
        if plan.conditioning == "text":
            return str(label)[:_CAPTION_LETTERS]
        return str(class_names[label]) if class_names else f"class {label}"

    return [(title(label), lines[label]) for label in sorted(lines)]


def _rows_to_show(plan: TrajectoryPlan, shards: list[int]) -> npt.NDArray[np.int64]:
    """Indices of the rows, from a few of the shards that are there."""
    choice = plan.random_choice()
    some = choice.permutation(shards)[:_SHARDS].tolist()
    index = choice.permutation(np.array([i for k in some for i in plan.shard_range(k)], np.int64))
    if plan.conditioning == "text" or not some:
        return index[:_LINES]
    label = plan.label(index)
    classes = np.unique(label)
    even = np.linspace(0, len(classes) - 1, min(_LINES, len(classes))).round().astype(int)
    return np.concatenate([index[label == class_id][:_COLUMNS] for class_id in classes[even]])


def _decode(teacher: Teacher, rows: list[npt.NDArray[Any]]) -> npt.NDArray[np.float32]:
    """Images float32 [N, C, H, W] in [0, 1] of N rows of tokens [L]."""
    tokens_NL = torch.from_numpy(np.stack(rows).astype(np.int64))
    images = [teacher.decode(part).cpu() for part in tokens_NL.split(_DECODED_TOGETHER)]
    return torch.cat(images).numpy()
