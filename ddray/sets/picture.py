"""A picture of random rows of a set: a line of images for each of up to ten classes, or a caption.

Shapes: N rows, L tokens of a row, C channels, H and W pixels.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ddray.errors import ConfigError, ShardError
from ddray.method.model import Model
from ddray.report.image_file import encode_png
from ddray.report.pictures import labelled_grid
from ddray.sets.plan import SetPlan
from ddray.sets.sharded_set import ShardedSet
from ddray.storage import open_beside
from ddray.storage.base import Storage

_LINES, _COLUMNS = 10, 6
# Shards that the rows may come from: enough for some of each class, few enough to read.
_SHARDS = 16
_DECODED_TOGETHER = 12
_CAPTION_LETTERS = 40
# Images are enlarged by a whole factor, up to so many pixels.
_PIXELS_SHOWN = 96

# Of a shard: index [N], label [N] (or captions), and N of what a row holds.
Columns = tuple[npt.NDArray[Any], npt.NDArray[Any], Any]


def picture_place(path: str) -> tuple[Storage, str]:
    """Where a picture is written, and its name there.

    Args:
        path: path or URI of the picture, which ends in .png.

    Raises:
        ConfigError: for another ending.
    """
    if not path.endswith(".png"):
        raise ConfigError(f"--picture {path!r}: only PNG is written; give a name that ends in .png")
    return open_beside(path)


def draw_rows(
    opened: ShardedSet[Any, Any],
    columns: Callable[[Any], Columns],
    decode: Callable[[list[Any]], npt.NDArray[np.float32]],
    class_names: Sequence[str] = (),
) -> bytes:
    """Draw random rows of a set, as a PNG.

    The choice is a function of the plan and of which shards are there. Of a text set, each line is
    a row with the beginning of its caption.

    Args:
        opened: the set.
        columns: takes apart what the set reads of a shard.
        decode: makes images, float [N, C, H, W] in [0, 1], of what N rows hold.
        class_names: a name for each class, or none.

    Raises:
        ShardError: if there is nothing to draw.
        StorageError: if the set cannot be read.
    """
    lines = _lines(opened, columns, class_names)
    if not lines:
        raise ShardError(f"{opened.uri} holds no sound shard, so there is nothing to show")
    decoded = [(title, decode(rows)) for title, rows in lines]
    scale = max(1, _PIXELS_SHOWN // max(decoded[0][1].shape[2:]))
    page = labelled_grid(decoded, columns=_COLUMNS, scale=scale)
    return encode_png(np.asarray(page))


def decode_tokens(model: Model, rows: list[npt.NDArray[Any]]) -> npt.NDArray[np.float32]:
    """Images float32 [N, C, H, W] in [0, 1] of N rows of tokens [L], by a model's tokenizer."""
    tokens_NL = torch.from_numpy(np.stack(rows).astype(np.int64))
    images = [model.decode(part).cpu() for part in tokens_NL.split(_DECODED_TOGETHER)]
    return torch.cat(images).numpy()


def _lines(
    opened: ShardedSet[Any, Any], columns: Callable[[Any], Columns], class_names: Sequence[str]
) -> list[tuple[str, list[Any]]]:
    """(Title, what its rows hold) of each line, classes in their order."""
    plan = opened.plan
    wanted = _rows_to_show(plan, list(opened.listing().sizes))
    lines: dict[Any, list[Any]] = {}
    for k in np.unique(wanted // plan.shard_rows).tolist():
        try:
            index, label, content = columns(opened.read_shard(k))
        except ShardError:
            continue
        for row in np.flatnonzero(np.isin(index, wanted)):
            lines.setdefault(label[row], []).append(content[row])

    def title(label: Any) -> str:
        if plan.conditioning == "text":
            return str(label)[:_CAPTION_LETTERS]
        return str(class_names[label]) if class_names else f"class {label}"

    return [(title(label), lines[label]) for label in sorted(lines)]


def _rows_to_show(plan: SetPlan, shards: list[int]) -> npt.NDArray[np.int64]:
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
