"""Bytes at a URI, whole or absent: one small interface over a local folder and an S3 prefix."""

from __future__ import annotations

import os

from ddray.errors import ConfigError
from ddray.locations import S3, absolute
from ddray.storage.base import Storage
from ddray.storage.local import LocalStorage
from ddray.storage.s3 import S3Storage


def open_storage(uri: str | os.PathLike[str]) -> Storage:
    """Return the storage behind a URI; nothing is created or contacted yet.

    Args:
        uri: A local path, `file:///path` or `s3://bucket/prefix`. The S3 endpoint and
            credentials come from the usual AWS environment and files.

    Raises:
        ConfigError: If the URI is empty, malformed or of another scheme.
    """
    place = absolute(uri)
    return S3Storage(place) if place.startswith(S3) else LocalStorage(place)


def open_beside(file: str | os.PathLike[str]) -> tuple[Storage, str]:
    """The storage that holds one file at a URI, and the file's name in it.

    Raises:
        ConfigError: As `open_storage`, and if the URI names no file.
    """
    place = absolute(file)
    folder, _, name = place.rpartition("/")
    if not name or folder == S3[:-1] or os.fsdecode(file).endswith("/"):
        raise ConfigError(f"uri {os.fsdecode(file)!r} names no file")
    return open_storage(folder or "/"), name
