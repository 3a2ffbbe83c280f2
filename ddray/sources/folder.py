"""A folder of image files, flat or in folders by class."""

from collections.abc import Generator, Sequence
from contextlib import closing
from typing import ClassVar

from ddray.sources.base import Content, ImageSource
from ddray.sources.listing import Listing
from ddray.sources.pixels import PixelRules, PixelsError
from ddray.storage.base import read_ahead


class FolderSource(ImageSource):
    """Image files, in the order of their names.

    Args:
        listing: that has them.
        rules: what is done to every image.
    """

    kind: ClassVar[str] = "folder"

    def __init__(self, listing: Listing, rules: PixelRules):
        self._storage, self._names = listing.storage, listing.names("folder")
        facts = ([name, *listing.files[name]] for name in self._names)
        super().__init__(listing.uri, len(self._names), facts, rules)

    def name(self, row: int) -> str:
        """Path of the file below the folder."""
        return self._names[row]

    def _contents(self, rows: Sequence[int]) -> Generator[Content, None, None]:
        with closing(read_ahead(self._storage, [self._names[row] for row in rows])) as files:
            for data in files:
                yield PixelsError("is no longer there") if data is None else data
