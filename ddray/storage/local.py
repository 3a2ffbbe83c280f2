"""A folder as storage: files appear whole, durable and, if asked, only once."""

from __future__ import annotations

import errno
import os
import shutil
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress

from ddray.errors import StorageError
from ddray.storage.base import PROBE, TEMPORARY, NotFoundError, Stamp, Storage, temporary_name


class LocalStorage(Storage):
    """A folder of a local or shared file system."""

    def __init__(self, path: str) -> None:
        """Take an absolute path as the root."""
        self.uri = path

    def read(self, name: str) -> bytes:
        """Return the content of `name`; see `Storage.read`."""
        path = self.join(name)
        with _local_errors("read", path), open(path, "rb") as file:
            return file.read()

    def read_range(self, name: str, start: int, size: int) -> bytes:
        """Return a part of the content of `name`; see `Storage.read_range`."""
        path = self.join(name)
        with _local_errors("read", path), open(path, "rb") as file:
            file.seek(start)
            return file.read(size)

    def write(self, name: str, data: bytes, *, if_absent: bool = False) -> bool:
        """Write by a temporary name, fsync and rename; see `Storage.write`."""
        return self._write(name, (data,), if_absent)

    def write_stream(self, name: str, chunks: Iterable[bytes]) -> None:
        """Write likewise, part by part; see `Storage.write_stream`."""
        self._write(name, chunks, if_absent=False)

    def _write(self, name: str, chunks: Iterable[bytes], if_absent: bool) -> bool:
        path = self.join(name)
        folder = os.path.dirname(path)
        temporary = os.path.join(folder, temporary_name())
        with _local_errors("write", path):
            if if_absent and os.path.lexists(path):
                return False
            _make_folder(folder)
            try:
                _write_durably(temporary, chunks)
                if not if_absent:
                    os.replace(temporary, path)
                elif not _link(temporary, path):
                    return False
                _sync_folder(folder)
            finally:
                # After a rename the name is gone already.
                with suppress(OSError):
                    os.unlink(temporary)
        return True

    def stamps(self, prefix: str = "") -> dict[str, Stamp]:
        """Return name -> size of the files below the root; see `Storage.stamps`."""
        start = os.path.join(self.uri, os.path.dirname(prefix))
        found = {}
        with _local_errors("list", start):
            for folder, _, files in os.walk(start, onerror=_raise_unless_gone):
                for file in files:
                    path = os.path.join(folder, file)
                    name = os.path.relpath(path, self.uri)
                    if name.startswith(prefix) and not file.startswith(TEMPORARY):
                        # A file may vanish between the listing and the look at its size.
                        with suppress(FileNotFoundError):
                            found[name] = Stamp(os.stat(path).st_size, "")
        return dict(sorted(found.items()))

    def stamp(self, name: str) -> Stamp | None:
        """Return the size of a file; see `Storage.stamp`."""
        path = self.join(name)
        with _local_errors("read", path), suppress(FileNotFoundError, NotADirectoryError):
            found = os.stat(path)
            return Stamp(found.st_size, "") if stat.S_ISREG(found.st_mode) else None
        return None

    def exists(self, name: str) -> bool:
        """Say whether `name` exists; see `Storage.exists`."""
        path = self.join(name)
        with _local_errors("read", path):
            try:
                os.stat(path)
            except FileNotFoundError:
                return False
        return True

    def version(self, name: str) -> str:
        """Return number, size and time of the file; see `Storage.version`."""
        path = self.join(name)
        with _local_errors("read", path):
            file = os.stat(path)
        return f"{file.st_ino}-{file.st_size}-{file.st_mtime_ns}"

    def move(self, name: str, to: str) -> None:
        """Rename the file; see `Storage.move`."""
        source, target = self.join(name), self.join(to)
        with _local_errors("read" if not os.path.lexists(source) else "move", source):
            _make_folder(os.path.dirname(target))
            os.rename(source, target)
            _sync_folder(os.path.dirname(target))
            self._drop_empty(os.path.dirname(source))

    def delete(self, name: str) -> None:
        """Delete `name`; see `Storage.delete`."""
        path = self.join(name)
        with _local_errors("delete", path), suppress(FileNotFoundError):
            os.unlink(path)

    def delete_folder(self, folder: str) -> None:
        """Delete the folder itself too; see `Storage.delete_folder`."""
        path = self.join(folder)
        with _local_errors("delete", path), suppress(FileNotFoundError):
            shutil.rmtree(path)

    def _drop_empty(self, folder: str) -> None:
        """Remove a folder and those above it, up to the root, as far as nothing lies in them."""
        with suppress(OSError):
            while folder.startswith(f"{self.uri}{os.sep}"):
                os.rmdir(folder)
                folder = os.path.dirname(folder)

    def check_writable(self) -> None:
        """Probe the root, or the folder in which it would be made; see `Storage`."""
        folder = self.uri
        with _local_errors("write to", self.uri):
            while not os.path.lexists(folder):
                folder = os.path.dirname(folder)
            probe = os.path.join(folder, temporary_name())
            try:
                _write_durably(probe, (PROBE,))
            finally:
                with suppress(FileNotFoundError, NotADirectoryError):
                    os.unlink(probe)


def _make_folder(folder: str) -> None:
    """Make `folder` and its parents, each of them durable."""
    if os.path.isdir(folder):
        return
    parent = os.path.dirname(folder)
    _make_folder(parent)
    try:
        os.mkdir(folder)
    except FileExistsError:
        # Another writer made it, unless it is no folder at all.
        if not os.path.isdir(folder):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR)) from None
    else:
        _sync_folder(parent)


def _write_durably(path: str, chunks: Iterable[bytes]) -> None:
    # "x" and not tempfile, whose files only their owner may read.
    with open(path, "xb") as file:
        file.writelines(chunks)
        file.flush()
        os.fsync(file.fileno())


def _link(temporary: str, path: str) -> bool:
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    return True


def _sync_folder(folder: str) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as exc:
        # Some network file systems know no fsync of a folder; they are durable or not without it.
        if exc.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def _raise_unless_gone(exc: OSError) -> None:
    if not isinstance(exc, FileNotFoundError):
        raise exc


_OS_REASONS = {
    errno.ENOSPC: "no space left on device; free some, or choose another URI",
    errno.EDQUOT: "disk quota exceeded; free some space, or choose another URI",
    errno.EFBIG: "the file size limit is reached; raise it (ulimit -f), or write smaller shards",
    errno.EACCES: "permission denied; choose another URI, or change the folder's permissions",
    errno.EPERM: "the file system does not permit it; choose another URI",
    errno.EROFS: "the file system is read-only; choose another URI",
    errno.ENOTDIR: "a part of the path is not a directory; choose another URI",
    errno.EISDIR: "it is a directory; choose another URI, or move the directory away",
    errno.ENOENT: "no such file or directory, and none can be made there; check the path",
    errno.ENOTSUP: "the file system lacks hard links; choose another URI",
}


@contextmanager
def _local_errors(action: str, path: str) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        if isinstance(exc, FileNotFoundError) and action == "read":
            raise NotFoundError(f"cannot read {path}: no such file") from exc
        reason = _OS_REASONS.get(exc.errno or 0) or exc.strerror or str(exc)
        raise StorageError(f"cannot {action} {path}: {reason}") from exc
