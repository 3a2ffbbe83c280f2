"""`arr_0` of an .npz: the images that ADM and those after it publish, 2 GB in one array.

Of a stored array any part can be read. A compressed one is read through: whoever asks for rows
behind those that he has had goes on from there.

Shapes: N images, H and W pixels.
"""

import io
import lzma
import struct
import zipfile
import zlib
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, closing
from typing import IO, Any, ClassVar

import numpy as np

from ddray.errors import ConfigError, StorageError, one_line
from ddray.file_kind import explained
from ddray.sources.base import BLOCK_BYTES, Content, ImageSource
from ddray.sources.listing import Listing
from ddray.sources.pixels import PixelRules
from ddray.storage.image_array import IMAGES, image_shape

_ENTRY = f"{IMAGES}.npy"
# What stands before an entry in a zip, up to its name.
_ZIP_HEADER = "<4s5H3I2H"
_UNREADABLE = (
    *(zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error, EOFError),
    *(ValueError, NotImplementedError, RuntimeError),
)


class NpzSource(ImageSource):
    """Images of an array.

    Args:
        listing: that has the one file.
        rules: what is done to every image.

    Raises:
        ConfigError: if there are several files, or the file has no such array.
        StorageError: if it cannot be read.
    """

    kind: ClassVar[str] = "npz"
    # All have one size, and none is a file that could be damaged.
    _LOOKED_AT: ClassVar[int] = 1

    def __init__(self, listing: Listing, rules: PixelRules):
        names = listing.names("npz")
        if len(names) > 1:
            raise ConfigError(
                f"{listing.uri} holds {len(names)} .npz files, {names[0]}, {names[1]} and so on; "
                "give one of them"
            )
        (self._name,), self._storage = names, listing.storage
        stamp = listing.files[self._name]
        self._file_size, self._where = stamp.size, listing.storage.join(self._name)
        try:
            self._shape, entry = self._look_inside()
        except ConfigError:
            raise
        except _UNREADABLE as error:
            refusal = f"{self._where} is no array of images (.npz with {IMAGES})"
            head = self._storage.read_range(self._name, 0, 4096)
            raise ConfigError(explained(refusal, head, error, "archive")) from error
        count, *size = self._shape
        self._bytes = int(np.prod(size))
        # A compressed array that was read so far, and the row that comes next.
        self._reading: tuple[ExitStack, IO[bytes], int] | None = None
        super().__init__(listing.uri, count, [[self._name, *stamp, self._shape, entry.CRC]], rules)
        if not self._bytes * count:
            raise ConfigError(f"{self._where}: {IMAGES} is {[*self._shape]}, which has no pixels")

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what is open."""
        return {**self.__dict__, "_reading": None}

    def name(self, row: int) -> str:
        """Path of the file, and the row in its array."""
        return f"{self._name} row {row}"

    def _look_inside(self) -> tuple[tuple[int, int, int, int], zipfile.ZipInfo]:
        """Shape of the array and its entry; says where the pixels of a stored one begin."""
        with closing(self._open()) as file, zipfile.ZipFile(file) as archive:
            if _ENTRY not in archive.namelist():
                held = ", ".join(archive.namelist()[:5]) or "nothing"
                raise ConfigError(f"{self._where} has no {IMAGES}; it holds {held}")
            entry = archive.getinfo(_ENTRY)
            with archive.open(entry) as array:
                shape = image_shape(array)
                in_entry = array.tell()
            # The directory tells another length of the extra field than stands before the entry.
            file.seek(entry.header_offset)
            *_, name_length, extra_length = struct.unpack(_ZIP_HEADER, file.read(30))
            self._pixels_at: int | None = None
            if entry.compress_type == zipfile.ZIP_STORED:
                self._pixels_at = file.tell() + name_length + extra_length + in_entry
            return shape, entry

    def _contents(self, rows: Sequence[int]) -> Generator[Content, None, None]:
        blocks = [*self._runs(rows)]
        for block, data in zip(blocks, self._blocks(blocks), strict=True):
            if len(data) < len(block) * self._bytes:
                raise StorageError(f"{self._where} is cut: {IMAGES} ends before its last image")
            yield from np.frombuffer(data, np.uint8).reshape(len(block), *self._shape[1:])

    def _runs(self, rows: Sequence[int]) -> Iterator[range]:
        """Rows that follow on each other, as many as are read at once."""
        run = range(0)
        for row in rows:
            if run and (row > run.stop or (len(run) + 1) * self._bytes > BLOCK_BYTES):
                yield run
                run = range(0)
            run = range(run.start if run else row, row + 1)
        if run:
            yield run

    def _blocks(self, blocks: list[range]) -> Iterator[bytes]:
        if self._pixels_at is not None:
            for block in blocks:
                start = self._pixels_at + block.start * self._bytes
                yield self._storage.read_range(self._name, start, len(block) * self._bytes)
            return
        (opened, array, at), self._reading = self._reading or self._begun(), None
        if blocks and at > blocks[0].start:
            opened.close()
            opened, array, at = self._begun()
        try:
            for block in blocks:
                while at < block.start:
                    skipped = min(block.start - at, max(1, BLOCK_BYTES // self._bytes))
                    array.read(skipped * self._bytes)
                    at += skipped
                yield array.read(len(block) * self._bytes)
                at = block.stop
        except _UNREADABLE as error:
            raise StorageError(f"{self._where} is damaged: {one_line(error)}") from error
        self._reading = opened, array, at

    def _begun(self) -> tuple[ExitStack, IO[bytes], int]:
        """The compressed array, opened at its first image."""
        opened = ExitStack()
        file = opened.enter_context(closing(self._open()))
        array = opened.enter_context(opened.enter_context(zipfile.ZipFile(file)).open(_ENTRY))
        image_shape(array)
        return opened, array, 0

    def _open(self) -> io.BufferedReader:
        return self._storage.open_file(self._name, self._file_size)
