"""Image sets, formats 1 and 2: a plan and its shards of generated images, or of their tokens.

Legend: N rows of a shard, L tokens each.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from ddray.errors import ShardError
from ddray.sets.images.plan import IN_FILES, ImagePlan
from ddray.sets.images.shard import (
    FORMATS,
    ImageRows,
    ShardFormat,
    metadata_name,
    stray_images,
)
from ddray.sets.sharded_set import Listing, ShardedSet

# What is made of all shards of an encoding, once they are there: all pixels, or all captions.
SAMPLES, CAPTIONS, RESULT = "samples.npz", "captions.txt", "result.jsonl"
_MADE_OF_ALL = {"npz": (SAMPLES,), "coco": (CAPTIONS, RESULT)}
_STATISTICS = "statistics/"


class ImageSet(ShardedSet[ImagePlan, ImageRows]):
    """A set of images, or of their tokens.

    Attributes:
        statistics: whose features' statistics a shard must have beside it, or it counts as missing:
            "digits", or the name of a feature network; "" for none.
    """

    PLAN = ImagePlan
    statistics = ""

    @property
    def suffix(self) -> str:
        """Ending of the shards' names."""
        return self._format.SUFFIX

    def listing(self) -> Listing:
        """Return what is there and what is not; see `ShardedSet.listing`.

        Raises:
            StorageError: If the storage cannot be listed.
        """
        found = super().listing()
        if not self.statistics:
            return found
        there = self.storage.list(_STATISTICS)
        lacking = {k for k in found.sizes if self.statistics_name(k) not in there}
        sizes = {k: size for k, size in found.sizes.items() if k not in lacking}
        return Listing(sizes, sorted({*found.missing, *lacking}), found.unexpected)

    def statistics_name(self, k: int) -> str:
        """Return the name of the statistics of shard `k`, of as many images as it has now."""
        # The digits' came first, and have no name.
        network = "" if self.statistics == "digits" else f"-{self.statistics}"
        rows = len(self.plan.shard_range(k))
        return f"{_STATISTICS}shard-{k:05d}-{rows}{network}.safetensors"

    def write_shard(
        self,
        k: int,
        label: npt.NDArray[Any],
        content: Sequence[bytes] | npt.NDArray[Any],
        statistics: bytes | None = None,
    ) -> None:
        """Commit a shard, replacing one that is there.

        Args:
            k: Which shard.
            label: Classes int32 [N], or N captions.
            content: N image files of the plan's format, or tokens, integers [N, L].
            statistics: Of the images; written first, so that a shard never lacks them.

        Raises:
            ShardError: If the rows are not those of the plan.
            StorageError: If the shard cannot be written; none is left behind then.
        """
        index = np.asarray(self.plan.shard_range(k))
        if not len(label) == len(content) == len(index):
            raise ShardError(
                f"shard {k} not written: it takes {len(index)} rows, got {len(label)} labels and "
                f"{len(content)} {self.plan.content}"
            )
        data = self._format.encode(k, ImageRows(index, label, content))
        if statistics is not None:
            self.storage.write(self.statistics_name(k), statistics)
        self.storage.write(self.shard_name(k), data)

    @cached_property
    def _format(self) -> ShardFormat:
        return FORMATS[self.plan.encoding](self.plan, self.storage)

    def lacking(self) -> list[str]:
        """Return what is made of all shards and is not there; see `ShardedSet`.

        Raises:
            StorageError: If the storage cannot be looked at.
        """
        plan = self.plan
        if plan.encoding == "geneval":
            there = self.storage.list("images/")
            prompts = range(plan.count // plan.samples_per_prompt)
            return [name for name in map(metadata_name, prompts) if name not in there]
        names = _MADE_OF_ALL.get(plan.encoding, ())
        return [name for name in names if not self.storage.exists(name)]

    def begin(self) -> None:
        """Make ready for shards to be written: what was made of fewer rows goes.

        Raises:
            StorageError: If it cannot be deleted.
        """
        for name in _MADE_OF_ALL.get(self.plan.encoding, ()):
            self.storage.delete(name)

    def _strays(self) -> list[str]:
        return stray_images(self.plan, self.storage) if self.plan.encoding in IN_FILES else []

    def _num_rows(self, k: int, data: bytes) -> int | None:
        return self._format.num_rows(data)

    def _decode(self, k: int, data: bytes) -> ImageRows:
        return self._format.decode(k, data)
