"""What every source of images is: so many of them in one order, decoded ahead of the reader.

Shapes: H and W pixels.
"""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from ddray.errors import ConfigError
from ddray.prefetch import Prefetch, in_order
from ddray.sources.pixels import PixelRules, PixelsError

# Pillow leaves the interpreter to others while it decodes.
_DECODERS = 8
# Images that are fetched, and decoded, before they are asked for.
_FETCHED, _DECODED = 32, 2 * _DECODERS
# Of a file or a run of images that are fetched at once, unless one image is larger.
BLOCK_BYTES = 8 * 2**20

# An image file, its pixels uint8 [H, W, 3], or why there is neither.
Content = bytes | npt.NDArray[np.uint8] | PixelsError


@dataclass(frozen=True)
class BrokenImage:
    """An image that cannot be used.

    Attributes:
        index: its row.
        name: of its file or member, or of the row of a table.
        reason: what is wrong, as what follows the name.
    """

    index: int
    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name} {self.reason}"


class ImageSource(ABC):
    """Images in a fixed order. Pickles with what it knows, so that a worker need not look again.

    Args:
        uri: absolute.
        count: images.
        facts: what is there in its order, as JSON values, for the fingerprint.
        rules: what is done to every image.

    Attributes:
        kind: "folder", "webdataset", "parquet", "npz" or "image set".
        fingerprint: sha256 over names and sizes of all that is there, in its order; on S3 over the
            ETags too. Not over the rules.
    """

    kind: ClassVar[str]
    # Images that are looked at before work starts.
    _LOOKED_AT: ClassVar[int] = 8

    def __init__(self, uri: str, count: int, facts: Iterable[object], rules: PixelRules):
        self.uri, self.count, self.rules = uri, count, rules
        self.fingerprint = _sha256(chain([self.kind], facts))
        self._first: tuple[str, tuple[int, int, int]] | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """H, W and 3 of every image, once one was looked at."""
        if self.rules.size is not None:
            return (self.rules.size, self.rules.size, 3)
        assert self._first is not None
        return self._first[1]

    def look(self) -> None:
        """Learn the size that all images must have, from the first of a few that can be used.

        Raises:
            ConfigError: if most of these cannot be used: it would be so of all.
            StorageError: if they cannot be fetched.
        """
        some = np.linspace(0, self.count - 1, min(self._LOOKED_AT, self.count)).astype(int)
        broken = []
        for row in some.tolist():
            (found,) = self.read(range(row, row + 1))
            if isinstance(found, BrokenImage):
                broken.append(found)
            elif self._first is None and self.rules.size is None:
                height, width, _ = found.shape
                self._first = self.name(row), (height, width, 3)
        if 2 * len(broken) > len(some):
            raise ConfigError(
                f"{self.uri}: of {len(some)} images looked at {len(broken)} cannot be used; "
                f"{broken[0]}"
            )

    def read(self, rows: Sequence[int]) -> Iterator[npt.NDArray[np.uint8] | BrokenImage]:
        """Images one after the other, of which a few are fetched and decoded ahead.

        Args:
            rows: ascending, such as a range.

        Yields:
            uint8 [H, W, 3] of each row, or why it cannot be used.

        Raises:
            StorageError: if they cannot be fetched.
        """
        if not _ascend(rows, self.count):
            raise ValueError(f"{rows} are no ascending rows of {self.count}")
        with (
            ThreadPoolExecutor(_DECODERS, "decode") as pool,
            closing(self._contents(rows)) as contents,
            Prefetch(zip(rows, contents, strict=True), _FETCHED) as fetched,
        ):
            yield from in_order(lambda item: pool.submit(self._image, *item), fetched, _DECODED)

    @abstractmethod
    def name(self, row: int) -> str:
        """What to call an image in a message."""

    @abstractmethod
    def _contents(self, rows: Sequence[int]) -> Generator[Content, None, None]:
        """What is there of each row; another thread than the reader's asks for it."""

    def _image(self, row: int, content: Content) -> npt.NDArray[np.uint8] | BrokenImage:
        try:
            if isinstance(content, PixelsError):
                raise content
            if isinstance(content, bytes):
                pixels = self.rules.decode(content)
            else:
                pixels = self.rules.crop(content)
            self._check_size(pixels)
        except PixelsError as error:
            return BrokenImage(row, self.name(row), str(error))
        return pixels

    def _check_size(self, pixels: npt.NDArray[np.uint8]) -> None:
        if self._first is None or pixels.shape == self._first[1]:
            return
        name, (height, width, _) = self._first
        raise PixelsError(
            f"is {pixels.shape[1]} x {pixels.shape[0]} pixels, and {name} is {width} x {height}; "
            "--size crops and resizes all of them alike"
        )


def _ascend(rows: Sequence[int], count: int) -> bool:
    if not rows:
        return True
    inside = rows[0] >= 0 and rows[-1] < count
    return inside and all(after > row for row, after in pairwise(rows))


def _sha256(facts: Iterable[object]) -> str:
    digest = hashlib.sha256()
    for fact in facts:
        digest.update(json.dumps(fact).encode() + b"\n")
    return digest.hexdigest()
