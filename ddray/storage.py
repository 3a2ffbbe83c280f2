"""URIs and atomic writes: one small interface over a local folder and an S3 prefix.

Imports from ddray only the errors; boto3 is loaded when an S3 URI is first used.
"""

from __future__ import annotations

import errno
import os
import re
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any
from urllib.parse import unquote

from ddray.errors import ConfigError, StorageError

# A temporary file begins with this and ends in random digits: no reader that globs for
# *.parquet or *.json takes one for data, and `list` leaves it out.
_TEMPORARY = ".tmp-"
# The probe of `check_writable` fills a disk block, so that a full disk is noticed.
_PROBE = bytes(4096)


class NotFoundError(StorageError):
    """A name that the storage does not hold."""


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
        return f"{self.uri.rstrip('/')}/{_checked_name(name)}"

    @abstractmethod
    def read(self, name: str) -> bytes:
        """Return the content of `name`.

        Raises:
            NotFoundError: If there is no such name.
            StorageError: If it cannot be read.
        """

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
    def list(self, prefix: str = "") -> dict[str, int]:
        """Return name -> size in bytes of all names that begin with `prefix`, sorted.

        Temporary names are left out. A folder that does not exist is empty.

        Raises:
            StorageError: If the URI cannot be listed.
        """

    @abstractmethod
    def exists(self, name: str) -> bool:
        """Say whether `name` exists.

        Raises:
            StorageError: If the URI cannot be reached.
        """

    @abstractmethod
    def delete(self, name: str) -> None:
        """Delete `name`; a name that does not exist is no error.

        Raises:
            StorageError: If it cannot be deleted.
        """

    @abstractmethod
    def check_writable(self) -> None:
        """Write and delete a probe, so that a bad URI shows before any work starts.

        Raises:
            StorageError: If the URI cannot be written, with the reason and what to do.
        """


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


class LocalStorage(Storage):
    """A folder of a local or shared file system."""

    def __init__(self, path: str) -> None:
        """Take `path` as the root; it is made absolute because workers run elsewhere."""
        self.uri = os.path.abspath(os.path.expanduser(path))

    def read(self, name: str) -> bytes:
        """Return the content of `name`; see `Storage.read`."""
        path = self.join(name)
        with _local_errors("read", path), open(path, "rb") as file:
            return file.read()

    def write(self, name: str, data: bytes, *, if_absent: bool = False) -> bool:
        """Write by a temporary name, fsync and rename; see `Storage.write`."""
        path = self.join(name)
        folder = os.path.dirname(path)
        temporary = os.path.join(folder, _temporary_name())
        with _local_errors("write", path):
            if if_absent and os.path.lexists(path):
                return False
            _make_folder(folder)
            try:
                _write_durably(temporary, data)
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

    def list(self, prefix: str = "") -> dict[str, int]:
        """Return name -> size of the files below the root; see `Storage.list`."""
        start = os.path.join(self.uri, os.path.dirname(prefix))
        sizes = {}
        with _local_errors("list", start):
            for folder, _, files in os.walk(start, onerror=_raise_unless_gone):
                for file in files:
                    path = os.path.join(folder, file)
                    name = os.path.relpath(path, self.uri)
                    if name.startswith(prefix) and not file.startswith(_TEMPORARY):
                        # A file may vanish between the listing and the look at its size.
                        with suppress(FileNotFoundError):
                            sizes[name] = os.stat(path).st_size
        return dict(sorted(sizes.items()))

    def exists(self, name: str) -> bool:
        """Say whether `name` exists; see `Storage.exists`."""
        path = self.join(name)
        with _local_errors("read", path):
            try:
                os.stat(path)
            except FileNotFoundError:
                return False
        return True

    def delete(self, name: str) -> None:
        """Delete `name`; see `Storage.delete`."""
        path = self.join(name)
        with _local_errors("delete", path), suppress(FileNotFoundError):
            os.unlink(path)

    def check_writable(self) -> None:
        """Probe the root, or the folder in which it would be made; see `Storage`."""
        folder = self.uri
        with _local_errors("write to", self.uri):
            while not os.path.lexists(folder):
                folder = os.path.dirname(folder)
            probe = os.path.join(folder, _temporary_name())
            try:
                _write_durably(probe, _PROBE)
            finally:
                with suppress(FileNotFoundError, NotADirectoryError):
                    os.unlink(probe)


class S3Storage(Storage):
    """A prefix of an S3 bucket, or of any service that speaks S3 with conditional PUT."""

    def __init__(self, uri: str) -> None:
        """Take `s3://bucket/prefix` apart.

        Raises:
            ConfigError: If there is no bucket, or the URI carries credentials or options.
        """
        bucket, _, prefix = uri.removeprefix("s3://").partition("/")
        if "@" in bucket:
            # The URI is not repeated: it may hold a secret.
            raise ConfigError(
                "an s3 uri holds credentials; give them by AWS_ACCESS_KEY_ID and "
                "AWS_SECRET_ACCESS_KEY, and s3://bucket/prefix as the uri"
            )
        if not bucket or "?" in uri:
            raise ConfigError(
                f"uri {uri!r} is not s3://bucket/prefix; an endpoint goes into AWS_ENDPOINT_URL"
            )
        self.bucket = bucket
        self.prefix = prefix.strip("/")
        self.uri = f"s3://{bucket}/{self.prefix}".rstrip("/")
        self._lazy_client: Any = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave the client out: it holds sockets, and each process makes its own."""
        return {**self.__dict__, "_lazy_client": None}

    def read(self, name: str) -> bytes:
        """Return the content of `name`; see `Storage.read`."""
        with _s3_errors("read", self.join(name)):
            response = self._client().get_object(Bucket=self.bucket, Key=self._key(name))
            content: bytes = response["Body"].read()
        return content

    def write(self, name: str, data: bytes, *, if_absent: bool = False) -> bool:
        """Write by one PUT, a conditional one if `if_absent`; see `Storage.write`.

        A conditional PUT whose answer was lost is retried by botocore and then finds its
        own object: False says that `name` exists, not who wrote it.
        """
        condition = {"IfNoneMatch": "*"} if if_absent else {}
        with _s3_errors("write", self.join(name)):
            try:
                self._client().put_object(
                    Bucket=self.bucket, Key=self._key(name), Body=data, **condition
                )
            except Exception as exc:
                if if_absent and _s3_code(exc) in ("PreconditionFailed", "412"):
                    return False
                raise
        return True

    def list(self, prefix: str = "") -> dict[str, int]:
        """Return name -> size of the keys below the prefix; see `Storage.list`."""
        start = len(self._key(""))
        sizes: dict[str, int] = {}
        with _s3_errors("list", self.uri):
            pages = self._client().get_paginator("list_objects_v2")
            for page in pages.paginate(Bucket=self.bucket, Prefix=self._key(prefix)):
                for entry in page.get("Contents", ()):
                    name = entry["Key"][start:]
                    is_temporary = name.rpartition("/")[2].startswith(_TEMPORARY)
                    # Some tools mark a folder by an empty key that ends in a slash.
                    if name and not name.endswith("/") and not is_temporary:
                        sizes[name] = int(entry["Size"])
        return dict(sorted(sizes.items()))

    def exists(self, name: str) -> bool:
        """Say whether `name` exists; see `Storage.exists`."""
        key = self._key(_checked_name(name))
        with _s3_errors("read", self.join(name)):
            # A listing, and not HEAD, whose 404 does not tell a missing bucket from a
            # missing key. The key itself sorts first among all that begin with it.
            page = self._client().list_objects_v2(Bucket=self.bucket, Prefix=key, MaxKeys=1)
        return any(entry["Key"] == key for entry in page.get("Contents", ()))

    def delete(self, name: str) -> None:
        """Delete `name`; see `Storage.delete`."""
        with _s3_errors("delete", self.join(name)):
            self._client().delete_object(Bucket=self.bucket, Key=self._key(name))

    def check_writable(self) -> None:
        """Put, list and delete a probe: all three rights are needed; see `Storage`."""
        key = self._key(_temporary_name())
        with _s3_errors("write to", self.uri):
            client = self._client()
            client.put_object(Bucket=self.bucket, Key=key, Body=_PROBE)
            try:
                client.list_objects_v2(Bucket=self.bucket, Prefix=key, MaxKeys=1)
            finally:
                client.delete_object(Bucket=self.bucket, Key=key)

    def _key(self, name: str) -> str:
        return f"{self.prefix}/{name}" if self.prefix else name

    def _client(self) -> Any:
        if self._lazy_client is None:
            import boto3  # type: ignore[import-untyped, unused-ignore]
            from botocore.config import (  # type: ignore[import-untyped, unused-ignore]
                Config,
            )

            config = Config(
                retries={"mode": "standard", "max_attempts": 6},
                connect_timeout=10,
                read_timeout=60,
            )
            # A session of its own: boto3's default session is not safe between threads.
            self._lazy_client = boto3.session.Session().client("s3", config=config)
        return self._lazy_client


def _checked_name(name: str) -> str:
    if any(part in ("", ".", "..") for part in name.split("/")):
        raise StorageError(f"name {name!r} is not a plain relative path such as shards/a.parquet")
    return name


def _temporary_name() -> str:
    return f"{_TEMPORARY}{uuid.uuid4().hex}"


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


def _write_durably(path: str, data: bytes) -> None:
    # "x" and not tempfile, whose files only their owner may read.
    with open(path, "xb") as file:
        file.write(data)
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


_DENIED = "access denied; these credentials need the rights to get, put, list and delete objects"
_REFUSED = "the credentials are refused; renew them, or check AWS_ENDPOINT_URL"
_NO_CREDENTIALS = (
    "no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, "
    "on every machine"
)
_UNREACHABLE = "the endpoint cannot be reached; check the network and AWS_ENDPOINT_URL"
_OTHER_REGION = "the bucket is in another region; set AWS_DEFAULT_REGION to it"
# By error code of the service, or by class name of the client's own errors.
_S3_REASONS = {
    "NoSuchBucket": "no such bucket; create it, or correct the URI",
    "AccessDenied": _DENIED,
    "403": _DENIED,
    "InvalidAccessKeyId": _REFUSED,
    "SignatureDoesNotMatch": _REFUSED,
    "ExpiredToken": _REFUSED,
    "InvalidToken": _REFUSED,
    "PermanentRedirect": _OTHER_REGION,
    "301": _OTHER_REGION,
    "AuthorizationHeaderMalformed": _OTHER_REGION,
    "ConditionalRequestConflict": "another writer is writing it now; run again",
    "NoCredentialsError": _NO_CREDENTIALS,
    "PartialCredentialsError": _NO_CREDENTIALS,
    "CredentialRetrievalError": _NO_CREDENTIALS,
    "EndpointConnectionError": _UNREACHABLE,
    "ConnectTimeoutError": _UNREACHABLE,
    "ReadTimeoutError": _UNREACHABLE,
}


def _s3_code(exc: Exception) -> str:
    """Return the service's error code, or else the name of the exception's class."""
    response = getattr(exc, "response", None) or {}
    return str(response.get("Error", {}).get("Code") or type(exc).__name__)


@contextmanager
def _s3_errors(action: str, uri: str) -> Iterator[None]:
    from botocore.exceptions import (  # type: ignore[import-untyped, unused-ignore]
        BotoCoreError,
        ClientError,
    )

    try:
        yield
    # ValueError: boto3's answer to a malformed endpoint.
    except (BotoCoreError, ClientError, ValueError) as exc:
        code = _s3_code(exc)
        if code in ("NoSuchKey", "404"):
            raise NotFoundError(f"cannot {action} {uri}: no such object") from exc
        reason = _S3_REASONS.get(code) or " ".join(str(exc).split())
        raise StorageError(f"cannot {action} {uri}: {reason}") from exc
