"""What is asked of a student for a data set: batches of a shard's rows, one request each.

Whoever asks need not load a model, nor torch.

Shapes: N rows of a batch, T caption positions, D feature width.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ddray.errors import ShardError
from ddray.sets.captions import padded, read_captions
from ddray.sets.images.image_set import ImageSet


@dataclass(frozen=True)
class RowsOrder:
    """A batch of a data set: the rows of one seed and schedule, in one pass.

    Attributes:
        model: the student's name.
        labels: classes, int [N], or N captions.
        index: of the noise, int64 [N].
        seed: of the noise.
        schedule: such as "0" or "0,16".
        content: pixels, or the ids of tokens.
        features: of the captions, float32 [N, T, D] and their mask [N, T]; None where there are
            classes, or an encoder.
    """

    model: str
    labels: npt.NDArray[Any]
    index: npt.NDArray[np.int64]
    seed: int
    schedule: str
    content: Literal["pixels", "tokens"] = "pixels"
    features: tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]] | None = None


def orders_of(images: ImageSet, k: int, model: str = "") -> Iterator[RowsOrder]:
    """Shard `k` in the plan's batches, each made when it is taken; captions are read before.

    Args:
        images: the set.
        k: which shard.
        model: name of the student where it is asked.

    Raises:
        ShardError: if captions are missing or damaged.
        StorageError: if they cannot be read.
    """
    plan, index, features = images.plan, np.asarray(images.plan.shard_range(k)), None
    if plan.conditioning == "class":
        labels: npt.NDArray[Any] = plan.label(index)
    else:
        captions = read_captions(images.storage, k, len(index))
        labels, features = np.array(captions.captions, dtype=object), captions.features
        if features is None and not plan.text_encoder:
            raise ShardError(f"captions in {images.uri} lack the features that its plan tells of")
    cuts = [slice(i, i + plan.batch_size) for i in range(0, len(index), plan.batch_size)]
    return (
        RowsOrder(
            model,
            labels[rows],
            index[rows],
            plan.seed,
            plan.schedule,
            "tokens" if plan.content == "tokens" else "pixels",
            None if features is None else padded(features[rows]),
        )
        for rows in cuts
    )
