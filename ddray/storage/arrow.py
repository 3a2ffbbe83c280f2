"""Storage as a file system of Arrow, for those who read and write by one: Ray Train, Parquet.

Arrow's own client of S3 finds endpoint, region and credentials by other rules than botocore, and
takes the text of a URI for escaped: it would be another bucket, or another object.
"""

from __future__ import annotations

import posixpath
from collections.abc import Iterator
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped, unused-ignore]
import pyarrow.fs  # type: ignore[import-untyped, unused-ignore]

from ddray.locations import S3, absolute
from ddray.storage.base import NotFoundError, RangedFile
from ddray.storage.s3_client import PART_BYTES, media_type, new_client, read_part, s3_errors


def arrow_filesystem(uri: str) -> tuple[Any, str]:
    """The file system that holds a URI, and the path of the URI in it.

    The file system pickles; each process makes a client of its own.

    Raises:
        ConfigError: as `open_storage`.
    """
    place = absolute(uri)
    if not place.startswith(S3):
        return pa.fs.LocalFileSystem(), place
    return pa.fs.PyFileSystem(S3Handler()), place.removeprefix(S3)


class S3Handler(pa.fs.FileSystemHandler):  # type: ignore[misc, unused-ignore]
    """What Arrow asks of a file system, by the client that all of ddray uses.

    Paths are BUCKET/KEY, and nothing in them is escaped. A folder is there if a key lies in it.
    """

    def __init__(self) -> None:
        self._lazy_client: Any = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave the client out: it holds sockets."""
        return {"_lazy_client": None}

    def __eq__(self, other: object) -> bool:
        """All are the same: they differ by their process alone."""
        return isinstance(other, S3Handler)

    def __hash__(self) -> int:
        """As equal as they are."""
        return hash(S3Handler)

    def get_type_name(self) -> str:
        """For people."""
        return "s3"

    def normalize_path(self, path: str) -> str:
        """The path without a slash at its ends."""
        return path.strip("/")

    def get_file_info(self, paths: list[str]) -> list[Any]:
        """What lies at each path."""
        return [self._info(path.strip("/")) for path in paths]

    def get_file_info_selector(self, selector: Any) -> list[Any]:
        """What lies below a folder."""
        folder = selector.base_dir.strip("/")
        found, folders = [], set()
        for path, size in self._below(folder):
            inner = path[len(folder) + 1 :].split("/")
            depth = len(inner) if selector.recursive else 1
            folders |= {"/".join(inner[:n]) for n in range(1, depth + 1) if n < len(inner)}
            if len(inner) == depth:
                found.append(_file(path, size))
        if not found and not folders and not selector.allow_not_found:
            raise FileNotFoundError(f"no such folder: {S3}{folder}")
        return found + [_folder(f"{folder}/{name}") for name in sorted(folders)]

    def create_dir(self, path: str, recursive: bool) -> None:
        """Nothing: a folder comes with its first file."""

    def delete_dir(self, path: str) -> None:
        """Delete a folder with all that is in it."""
        for file, _ in list(self._below(path.strip("/"))):
            self.delete_file(file)

    def delete_dir_contents(self, path: str, missing_dir_ok: bool = False) -> None:
        """As `delete_dir`: an empty folder is none."""
        self.delete_dir(path)

    def delete_root_dir_contents(self) -> None:
        """Refuse to delete all buckets."""
        raise NotImplementedError("the root holds all buckets")

    def delete_file(self, path: str) -> None:
        """Delete a file."""
        bucket, key = _split(path)
        with s3_errors("delete", S3 + path):
            # One by one: requests for many need a checksum that some services do not know.
            self._client().delete_object(Bucket=bucket, Key=key)

    def move(self, src: str, dest: str) -> None:
        """Copy a file, then delete it."""
        self.copy_file(src, dest)
        self.delete_file(src)

    def copy_file(self, src: str, dest: str) -> None:
        """Copy a file within the service."""
        (bucket, key), (to, as_key) = _split(src), _split(dest)
        with s3_errors("copy", S3 + src):
            self._client().copy({"Bucket": bucket, "Key": key}, to, as_key)

    def open_input_stream(self, path: str) -> Any:
        """A file to be read from its beginning."""
        return self.open_input_file(path)

    def open_input_file(self, path: str) -> Any:
        """A file to be read anywhere."""
        info = self._info(path.strip("/"))
        if info.type != pa.fs.FileType.File:
            raise FileNotFoundError(f"no such file: {S3}{path}")
        client, (bucket, key) = self._client(), _split(path)

        def read(start: int, size: int) -> bytes:
            try:
                with s3_errors("read", S3 + path):
                    return read_part(client, start, size, Bucket=bucket, Key=key)
            except NotFoundError as exc:
                raise FileNotFoundError(str(exc)) from exc

        return pa.PythonFile(RangedFile(read, info.size), mode="r")

    def open_output_stream(self, path: str, metadata: Any) -> Any:
        """A file to be written, there when it is closed."""
        return pa.PythonFile(_Writer(self._client(), path), mode="w")

    def open_append_stream(self, path: str, metadata: Any) -> Any:
        """Refuse: objects do not grow."""
        raise NotImplementedError("S3 cannot append to an object")

    def _client(self) -> Any:
        if self._lazy_client is None:
            self._lazy_client = new_client()
        return self._lazy_client

    def _info(self, path: str) -> Any:
        bucket, key = _split(path)
        with s3_errors("read", S3 + path):
            # The key itself sorts first among all that begin with it.
            pages = self._client().list_objects_v2(Bucket=bucket, Prefix=key, MaxKeys=1)
        for entry in pages.get("Contents", ()) if key else ():
            if entry["Key"] == key:
                return _file(path, entry["Size"])
        is_folder = not key or next(self._below(path), None) is not None
        return _folder(path) if is_folder else pa.fs.FileInfo(path, pa.fs.FileType.NotFound)

    def _below(self, folder: str) -> Iterator[tuple[str, int]]:
        """Path and size of all files in a folder and its folders."""
        bucket, key = _split(folder)
        with s3_errors("list", S3 + folder):
            pages = self._client().get_paginator("list_objects_v2")
            for page in pages.paginate(Bucket=bucket, Prefix=f"{key}/" if key else ""):
                for entry in page.get("Contents", ()):
                    # Some tools mark a folder by an empty key that ends in a slash.
                    if not entry["Key"].endswith("/"):
                        yield f"{bucket}/{entry['Key']}", entry["Size"]


def _split(path: str) -> tuple[str, str]:
    bucket, _, key = path.strip("/").partition("/")
    return bucket, key


def _file(path: str, size: int) -> Any:
    return pa.fs.FileInfo(path, pa.fs.FileType.File, size=size)


def _folder(path: str) -> Any:
    return pa.fs.FileInfo(path, pa.fs.FileType.Directory)


class _Writer:
    """An object that is written from its beginning to its end: by one PUT, or in parts.

    No class of io, which would take what was left half written for finished when it is forgotten.
    """

    def __init__(self, client: Any, path: str) -> None:
        self.closed = False
        self._client, self._path = client, path
        self._where = dict(zip(("Bucket", "Key"), _split(path), strict=True))
        self._rest, self._size = bytearray(), 0
        self._upload: str | None = None
        self._parts: list[dict[str, Any]] = []

    def write(self, data: Any) -> int:
        self._rest += data
        self._size += len(data)
        while len(self._rest) >= PART_BYTES:
            self._send(bytes(self._rest[:PART_BYTES]))
            del self._rest[:PART_BYTES]
        return len(data)

    def tell(self) -> int:
        return self._size

    def flush(self) -> None:
        """Nothing: an object is there whole, or not at all."""

    def close(self) -> None:
        if self.closed:
            return
        self.closed = True
        kind = media_type(posixpath.basename(self._path))
        if self._upload is None:
            with s3_errors("write", S3 + self._path):
                body = bytes(self._rest)
                self._client.put_object(**self._where, Body=body, ContentType=kind)
            return
        if self._rest:
            self._send(bytes(self._rest))
        with s3_errors("write", S3 + self._path):
            whole = {"UploadId": self._upload, "MultipartUpload": {"Parts": self._parts}}
            self._client.complete_multipart_upload(**self._where, **whole)

    def _send(self, data: bytes) -> None:
        with s3_errors("write", S3 + self._path):
            if self._upload is None:
                kind = media_type(posixpath.basename(self._path))
                begun = self._client.create_multipart_upload(**self._where, ContentType=kind)
                self._upload = begun["UploadId"]
            part = {"UploadId": self._upload, "PartNumber": len(self._parts) + 1}
            try:
                sent = self._client.upload_part(**self._where, **part, Body=data)
            except BaseException:
                self.closed = True
                self._client.abort_multipart_upload(**self._where, UploadId=self._upload)
                raise
        self._parts.append({"ETag": sent["ETag"], "PartNumber": part["PartNumber"]})
