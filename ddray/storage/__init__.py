"""Bytes at a URI, whole or absent: one small interface over a local folder and an S3 prefix."""

from __future__ import annotations

import os
import re
from urllib.parse import unquote

from ddray.errors import ConfigError
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
    text = os.fspath(uri)
    if not text.strip():
        raise ConfigError("uri is empty; give a path, file:///path or s3://bucket/prefix")
    if text.startswith("s3://"):
        return S3Storage(text)
    if text.startswith("file://"):
        path = text.removeprefix("file://").removeprefix("localhost")
        if not path.startswith("/"):
            raise ConfigError(f"uri {text!r} names a host or a relative path; use file:///path")
        return LocalStorage(unquote(path))
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]*):/", text)
    if scheme:
        raise ConfigError(
            f"uri {text!r} has the scheme {scheme[1]!r}; "
            "give a path, file:///path or s3://bucket/prefix"
        )
    return LocalStorage(text)
