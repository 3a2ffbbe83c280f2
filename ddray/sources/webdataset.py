"""WebDataset: tars of samples, of which the image members are taken.

Where the members lie is learned once, from the headers alone where they lie far apart. Whoever
reads then asks for the parts of a tar that hold its rows.
"""

import tarfile
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ddray.errors import ConfigError
from ddray.file_kind import explained
from ddray.locations import S3
from ddray.prefetch import in_order
from ddray.sources.base import BLOCK_BYTES, Content, ImageSource
from ddray.sources.listing import SUFFIXES, Listing, endings, is_hidden
from ddray.sources.pixels import PixelRules, PixelsError
from ddray.storage.base import Storage

_IMAGES = tuple(suffix for suffix in SUFFIXES["folder"] if suffix != ".bmp")
# Of a tar on disk, where skipping costs nothing, and of one that is asked for over a network.
_HEADER_BYTES, _FAR_HEADER_BYTES = 2**16, BLOCK_BYTES
_READERS = 4
# Between two images that are fetched at once.
_GAP_BYTES = 2**18


@dataclass(frozen=True)
class _Member:
    name: str
    start: int
    size: int


class WebDatasetSource(ImageSource):
    """Images of tars: these in the order of their names, members in that of their tar.

    Args:
        listing: that has the tars.
        rules: what is done to every image.
        ending: which member of a sample is its image, such as "png" or "target.png"; None = the
            one that is an image.

    Raises:
        ConfigError: if a tar is damaged, none holds an image, or a sample has two.
        StorageError: if one cannot be read.
    """

    kind: ClassVar[str] = "webdataset"

    def __init__(self, listing: Listing, rules: PixelRules, ending: str | None = None):
        self._storage, self._tars = listing.storage, listing.names("webdataset")
        sizes = [listing.files[name].size for name in self._tars]
        with ThreadPoolExecutor(_READERS) as readers:
            found = [
                *readers.map(
                    lambda name, size: _index(self._storage, name, size, ending),
                    self._tars,
                    sizes,
                )
            ]
        members = [member for images, _ in found for member in images]
        if not members:
            others = [name for _, names in found for name in names]
            held = endings(others) or "nothing"
            raise ConfigError(f"{listing.uri}: no images in {len(found)} tars, only {held}")
        self._tar = np.repeat(np.arange(len(found)), [len(images) for images, _ in found])
        self._start = np.array([member.start for member in members])
        self._size = np.array([member.size for member in members])
        self._names = [member.name for member in members]
        tars = [[name, *listing.files[name]] for name in self._tars]
        images = [[member.name, member.size] for member in members]
        super().__init__(listing.uri, len(members), tars + images, rules)

    def name(self, row: int) -> str:
        """Path of the tar, then of the member in it."""
        return f"{self._tars[self._tar[row]]}/{self._names[row]}"

    def _contents(self, rows: Sequence[int]) -> Generator[Content, None, None]:
        with ThreadPoolExecutor(_READERS) as readers:
            for contents in in_order(
                lambda run: readers.submit(self._fetch, run), self._runs(rows), _READERS
            ):
                yield from contents

    def _runs(self, rows: Sequence[int]) -> Iterator[list[int]]:
        """Rows that lie near enough to be fetched at once."""
        run: list[int] = []
        for row in rows:
            if run and not self._is_near(run, row):
                yield run
                run = []
            run.append(row)
        if run:
            yield run

    def _is_near(self, run: list[int], row: int) -> bool:
        return bool(
            self._tar[row] == self._tar[run[0]]
            and self._start[row] - self._end(run[-1]) <= _GAP_BYTES
            and self._end(row) - self._start[run[0]] <= BLOCK_BYTES
        )

    def _fetch(self, run: list[int]) -> list[Content]:
        first, end = int(self._start[run[0]]), self._end(run[-1])
        data = self._storage.read_range(self._tars[self._tar[run[0]]], first, end - first)
        contents: list[Content] = []
        for row in run:
            at = int(self._start[row]) - first
            file = data[at : at + int(self._size[row])]
            whole = len(file) == self._size[row]
            contents.append(file if whole else PixelsError("is cut: its tar is shorter now"))
        return contents

    def _end(self, row: int) -> int:
        return int(self._start[row] + self._size[row])


def _index(
    storage: Storage, name: str, size: int, ending: str | None
) -> tuple[list[_Member], list[str]]:
    """The image members of a tar, and the names of all others."""
    images: list[_Member] = []
    others: list[str] = []
    for member in _members(storage, name, size):
        if not _is_image(member.name, ending):
            others.append(member.name)
            continue
        sample = _sample(member.name)
        if images and _sample(images[-1].name) == sample:
            raise ConfigError(
                f"{storage.join(name)}: sample {sample} has two images, {images[-1].name} and "
                f"{member.name}; say which by --column, such as {_ending(member.name)}"
            )
        images.append(member)
    return images, others


def _members(storage: Storage, name: str, size: int) -> Iterator[_Member]:
    """The files of a tar but hidden ones.

    Raises:
        ConfigError: if it is damaged.
        StorageError: if it cannot be read.
    """
    is_far = storage.uri.startswith(S3)
    buffer = min(max(size, 1), _FAR_HEADER_BYTES if is_far else _HEADER_BYTES)
    try:
        with (
            closing(storage.open_file(name, size, buffer)) as file,
            tarfile.open(fileobj=file, mode="r:") as archive,
        ):
            while (member := archive.next()) is not None:
                # tarfile would keep all of them.
                archive.members = []  # type: ignore[attr-defined]
                if member.isfile() and not is_hidden(member.name.removeprefix("./")):
                    yield _Member(member.name, member.offset_data, member.size)
            # What is no header it takes for the end.
            file.seek(archive.offset)
            if any(file.read(tarfile.BLOCKSIZE)):
                raise tarfile.ReadError(f"no member at byte {archive.offset}")
    except (tarfile.TarError, EOFError, ValueError, OverflowError) as error:
        refusal = f"{storage.join(name)} is damaged, truncated or no tar"
        head = storage.read_range(name, 0, tarfile.BLOCKSIZE)
        raise ConfigError(explained(refusal, head, error, "tar")) from error


def _is_image(name: str, ending: str | None) -> bool:
    if ending is not None:
        return _ending(name) == ending.removeprefix(".")
    return name.lower().endswith(_IMAGES)


def _sample(name: str) -> str:
    """What the members of a sample have in common: all up to the first dot of the file's name."""
    folder, slash, file = name.rpartition("/")
    return folder + slash + file.partition(".")[0]


def _ending(name: str) -> str:
    return name.rpartition("/")[2].partition(".")[2]
