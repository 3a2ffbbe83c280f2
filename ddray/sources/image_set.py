"""A set that `ddray generate` wrote, whatever its format: its images by their indices."""

from collections.abc import Generator, Sequence
from itertools import groupby
from typing import ClassVar

from ddray.errors import ConfigError, ShardError
from ddray.sets.images.image_set import ImageSet
from ddray.sources.base import Content, ImageSource
from ddray.sources.pixels import PixelRules


class GeneratedSource(ImageSource):
    """Images of a set of ours, which are read by whole shards and checked.

    Args:
        uri: of the set.
        rules: what is done to every image.

    Raises:
        ConfigError: if it holds tokens.
        ShardError: if shards are missing, or it cannot be read as a set.
        StorageError: if the storage cannot be read.
    """

    kind: ClassVar[str] = "image set"
    # All have one size, and to look at one is to read a shard.
    _LOOKED_AT: ClassVar[int] = 1

    def __init__(self, uri: str, rules: PixelRules):
        self._images = ImageSet.open(uri)
        plan, found = self._images.plan, self._images.listing()
        if plan.content != "images":
            raise ConfigError(
                f"{self._images.uri} is a set of {plan.content}; generate one of images"
            )
        if found.missing:
            raise ShardError(
                f"{self._images.uri} lacks {len(found.missing)} of {plan.num_shards} shards; "
                f"rerun `{plan.MADE_BY}` to fill them"
            )
        facts = [plan.hash, plan.count, [[k, size] for k, size in found.sizes.items()]]
        super().__init__(self._images.uri, plan.count, facts, rules)

    def name(self, row: int) -> str:
        """Name of the shard, and the row of the set."""
        return f"{self._images.shard_name(row // self._images.plan.shard_rows)} row {row}"

    def _contents(self, rows: Sequence[int]) -> Generator[Content, None, None]:
        size = self._images.plan.shard_rows
        for k, wanted in groupby(rows, lambda row: row // size):
            files = self._images.read_shard(k).content
            yield from (bytes(files[row - k * size]) for row in wanted)
