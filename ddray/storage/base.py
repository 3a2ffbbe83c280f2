"""What every storage does: named blobs under one URI, written whole or not at all."""

from __future__ import annotations

import io
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from ddray.errors import StorageError
from ddray.prefetch import in_order

# A temporary file begins with this and ends in random digits: no reader that globs for
# *.parquet or *.json takes one for data, and `list` leaves it out.
TEMPORARY = ".tmp-"
# The probe of `check_writable` fills a disk block, so that a full disk is noticed.
PROBE = bytes(4096)
# Of a file that is read here and there: a request for less takes as long.
BUFFER_BYTES = 2**20
# Reads under way at once in `read_ahead`: S3 takes tens of milliseconds to begin each of them.
_READERS = 8


class NotFoundError(StorageError):
    """A name that the storage does not hold."""


class Stamp(NamedTuple):
    """What a listing tells of a name.

    Attributes:
        size: In bytes.
        etag: A word of the service's that changes with the content; empty for files on disk.
    """

    size: int
    etag: str


class Storage(ABC):
    """Named blobs under one URI, written whole or not at all.

    Names are relative paths with forward slashes, such as `shards/shard-00000.parquet`.
    Objects pickle, so that Ray can ship them to workers.

    Attributes:
        uri: The URI, without a trailing slash; local paths are absolute.
    """

    uri: str

    def join(self, name: str) -> str:
        """Return the full URI of `name`.

        Raises:
            StorageError: If `name` is absolute or leaves the URI.
        """
        return f"{self.uri.rstrip('/')}/{checked_name(name)}"

    @abstractmethod
    def read(self, name: str) -> bytes:
        """Return the content of `name`.

        Raises:
            NotFoundError: If there is no such name.
            StorageError: If it cannot be read.
        """

    @abstractmethod
    def read_range(self, name: str, start: int, size: int) -> bytes:
        """Return `size` bytes of `name` from byte `start` on; fewer where it ends before.

        Raises:
            NotFoundError: If there is no such name.
            StorageError: If it cannot be read.
        """

    def open_file(self, name: str, size: int, buffer: int = BUFFER_BYTES) -> io.BufferedReader:
        """Return `name` as a file to be read anywhere; reading raises as `read_range` does.

        Args:
            name: As for `read`.
            size: Of the content, as a listing tells it.
            buffer: Bytes that are read at once.
        """
        ranged = RangedFile(lambda start, count: self.read_range(name, start, count), size)
        return io.BufferedReader(ranged, buffer)

    @abstractmethod
    def write(self, name: str, data: bytes, *, if_absent: bool = False) -> bool:
        """Write `name` atomically and durably; replace it unless `if_absent`.

        Args:
            name: Where to write.
            data: The whole content.
            if_absent: Leave an existing `name` alone, even one that another writer makes
                at this moment.

        Returns:
            False when `if_absent` and `name` exists, else True.

        Raises:
            StorageError: If it cannot be written; nothing is left behind then.
        """

    @abstractmethod
    def write_stream(self, name: str, chunks: Iterable[bytes]) -> None:
        """Write `name` atomically and durably from parts, which are never held all at once.

        Args:
            name: Where to write; what is there is replaced.
            chunks: The content, in order. What they raise is raised here.

        Raises:
            StorageError: If it cannot be written; nothing is left behind then.
        """

    @abstractmethod
    def stamps(self, prefix: str = "") -> dict[str, Stamp]:
        """Return what a listing tells of all names that begin with `prefix`, sorted.

        Temporary names are left out. A folder that does not exist is empty.

        Raises:
            StorageError: If the URI cannot be listed.
        """

    @abstractmethod
    def stamp(self, name: str) -> Stamp | None:
        """Return what a listing tells of one name; None if there is no such file.

        Raises:
            StorageError: If the URI cannot be reached.
        """

    def list(self, prefix: str = "") -> dict[str, int]:
        """Return name -> size in bytes; see `stamps`.

        Raises:
            StorageError: If the URI cannot be listed.
        """
        return {name: stamp.size for name, stamp in self.stamps(prefix).items()}

    @abstractmethod
    def exists(self, name: str) -> bool:
        """Say whether `name` exists.

        Raises:
            StorageError: If the URI cannot be reached.
        """

    @abstractmethod
    def version(self, name: str) -> str:
        """Return a word that is another one when `name` has been written again.

        Raises:
            NotFoundError: If there is no such name.
            StorageError: If it cannot be looked at.
        """

    @abstractmethod
    def move(self, name: str, to: str) -> None:
        """Give `name` another name, under which nothing lies yet.

        Raises:
            NotFoundError: If there is no such name.
            StorageError: If it cannot be moved; it lies under one of the names then.
        """

    @abstractmethod
    def delete(self, name: str) -> None:
        """Delete `name`; a name that does not exist is no error.

        Raises:
            StorageError: If it cannot be deleted.
        """

    def delete_folder(self, folder: str) -> None:
        """Delete all names below `folder`; that there is none is no error.

        Raises:
            StorageError: If one cannot be deleted.
        """
        for name in self.list(f"{checked_name(folder)}/"):
            self.delete(name)

    @abstractmethod
    def check_writable(self) -> None:
        """Write and delete a probe, so that a bad URI shows before any work starts.

        Raises:
            StorageError: If the URI cannot be written, with the reason and what to do.
        """


class RangedFile(io.RawIOBase):
    """A content of known size as a file, read by ranges.

    Args:
        read: Gives so many bytes from a start on.
        size: Of the content.
    """

    def __init__(self, read: Callable[[int, int], bytes], size: int) -> None:
        self._read, self._size, self._at = read, size, 0

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is."""
        return True

    def tell(self) -> int:
        """Where the next byte lies."""
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a byte."""
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = max(0, start + offset)
        return self._at

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer, as far as the content goes."""
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def read(self, size: int | None = -1) -> bytes:
        """The next bytes, in one piece."""
        left = max(0, self._size - self._at)
        wanted = left if size is None or size < 0 else min(size, left)
        data = self._read(self._at, wanted) if wanted else b""
        self._at += len(data)
        return data


def read_ahead(storage: Storage, names: Iterable[str]) -> Generator[bytes | None, None, None]:
    """Yield the contents of the names in their order, reading a few of them ahead.

    Yields:
        The content, or None for a name that the storage does not hold.

    Raises:
        StorageError: If a name cannot be read.
    """

    def read(name: str) -> bytes | None:
        try:
            return storage.read(name)
        except NotFoundError:
            return None

    with ThreadPoolExecutor(_READERS) as readers:
        yield from in_order(lambda name: readers.submit(read, name), names, 2 * _READERS)


def checked_name(name: str) -> str:
    """The name itself.

    Raises:
        StorageError: If it is absolute, or would leave the URI.
    """
    if any(part in ("", ".", "..") for part in name.split("/")):
        raise StorageError(f"name {name!r} is not a plain relative path such as shards/a.parquet")
    return name


def temporary_name() -> str:
    """A name that no other writer uses, and no reader takes for data."""
    return f"{TEMPORARY}{uuid.uuid4().hex}"
