"""An S3 prefix as storage, by boto3, which is loaded when one is first used."""

from __future__ import annotations

import io
from collections.abc import Iterable
from typing import Any

from ddray.locations import S3
from ddray.storage.base import (
    PROBE,
    TEMPORARY,
    Stamp,
    Storage,
    checked_name,
    temporary_name,
)
from ddray.storage.s3_client import (
    PART_BYTES,
    media_type,
    new_client,
    read_object,
    read_part,
    s3_code,
    s3_errors,
)

# Of an object whose size nobody knows: ten are in memory at once, and 10,000 the most there may be.
_STREAMED_PART_BYTES = 32 * 2**20


class S3Storage(Storage):
    """A prefix of an S3 bucket, or of any service that speaks S3 with conditional PUT."""

    def __init__(self, uri: str) -> None:
        """Take `s3://bucket/prefix`, as `ddray.locations.absolute` gives it, apart."""
        self.uri = uri
        self.bucket, _, self.prefix = uri.removeprefix(S3).partition("/")
        self._lazy_client: Any = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave the client out: it holds sockets, and each process makes its own."""
        return {**self.__dict__, "_lazy_client": None}

    def read(self, name: str) -> bytes:
        """Return the content of `name`; see `Storage.read`."""
        with s3_errors("read", self.join(name)):
            return read_object(self._client(), Bucket=self.bucket, Key=self._key(name))

    def read_range(self, name: str, start: int, size: int) -> bytes:
        """Return a part of the content of `name` by one GET; see `Storage.read_range`."""
        where = {"Bucket": self.bucket, "Key": self._key(name)}
        if size <= 0:
            return b""
        with s3_errors("read", self.join(name)):
            return read_part(self._client(), start, size, **where)

    def link(self, name: str, expires_s: int, media_type: str) -> str:
        """A presigned link to `name`, whether it is there or not.

        Args:
            name: As for `read`.
            expires_s: For how long it is good.
            media_type: What it will be served as.

        Raises:
            StorageError: If there are no credentials to sign with.
        """
        answer = {"Bucket": self.bucket, "Key": self._key(name), "ResponseContentType": media_type}
        with s3_errors("link", self.join(name)):
            url: str = self._client().generate_presigned_url(
                "get_object", Params=answer, ExpiresIn=expires_s
            )
        return url

    def write(self, name: str, data: bytes, *, if_absent: bool = False) -> bool:
        """Write by one PUT, conditional if `if_absent`, or in parts; see `Storage.write`.

        A conditional PUT whose answer was lost is retried by botocore and then finds its
        own object: False says that `name` exists, not who wrote it.
        """
        where = {"Bucket": self.bucket, "Key": self._key(name)}
        kind = {"ContentType": media_type(name)}
        condition = {"IfNoneMatch": "*"} if if_absent else {}
        with s3_errors("write", self.join(name), conditional=if_absent):
            if len(data) > PART_BYTES and not if_absent:
                self._client().upload_fileobj(io.BytesIO(data), *where.values(), ExtraArgs=kind)
                return True
            try:
                self._client().put_object(**where, **kind, **condition, Body=data)
            except Exception as exc:
                if if_absent and s3_code(exc) in ("PreconditionFailed", "412"):
                    return False
                raise
        return True

    def write_stream(self, name: str, chunks: Iterable[bytes]) -> None:
        """Write in parts as they come; see `Storage.write_stream`."""
        from boto3.s3.transfer import (  # type: ignore[import-untyped, unused-ignore]
            TransferConfig,
        )

        stream = io.BufferedReader(_Chunks(chunks))
        config = TransferConfig(multipart_chunksize=_STREAMED_PART_BYTES)
        kind = {"ContentType": media_type(name)}
        with s3_errors("write", self.join(name)):
            self._client().upload_fileobj(
                stream, self.bucket, self._key(name), ExtraArgs=kind, Config=config
            )

    def stamps(self, prefix: str = "") -> dict[str, Stamp]:
        """Return name -> size and ETag of the keys below the prefix; see `Storage.stamps`."""
        start = len(self._key(""))
        found: dict[str, Stamp] = {}
        with s3_errors("list", self.uri):
            pages = self._client().get_paginator("list_objects_v2")
            for page in pages.paginate(Bucket=self.bucket, Prefix=self._key(prefix)):
                for entry in page.get("Contents", ()):
                    name = entry["Key"][start:]
                    is_temporary = name.rpartition("/")[2].startswith(TEMPORARY)
                    # Some tools mark a folder by an empty key that ends in a slash.
                    if name and not name.endswith("/") and not is_temporary:
                        found[name] = _stamp(entry)
        return dict(sorted(found.items()))

    def stamp(self, name: str) -> Stamp | None:
        """Return size and ETag of the object; see `Storage.stamp`."""
        key = self._key(checked_name(name))
        with s3_errors("read", self.join(name)):
            # A listing, and not HEAD, whose 404 does not tell a missing bucket from a
            # missing key. The key itself sorts first among all that begin with it.
            page = self._client().list_objects_v2(Bucket=self.bucket, Prefix=key, MaxKeys=1)
        return next((_stamp(e) for e in page.get("Contents", ()) if e["Key"] == key), None)

    def exists(self, name: str) -> bool:
        """Say whether `name` exists; see `Storage.exists`."""
        return self.stamp(name) is not None

    def version(self, name: str) -> str:
        """Return ETag and time of the object; see `Storage.version`."""
        with s3_errors("read", self.join(name)):
            head = self._client().head_object(Bucket=self.bucket, Key=self._key(name))
        return f"{head['ETag']}-{head['LastModified'].isoformat()}"

    def move(self, name: str, to: str) -> None:
        """Copy within the service, in parts if it is large, and delete; see `Storage.move`."""
        source = {"Bucket": self.bucket, "Key": self._key(checked_name(name))}
        with s3_errors("move", self.join(name)):
            self._client().copy(source, self.bucket, self._key(checked_name(to)))
        self.delete(name)

    def delete(self, name: str) -> None:
        """Delete `name`; see `Storage.delete`."""
        with s3_errors("delete", self.join(name)):
            self._client().delete_object(Bucket=self.bucket, Key=self._key(name))

    def check_writable(self) -> None:
        """Put, list and delete a probe: all three rights are needed; see `Storage`."""
        key = self._key(temporary_name())
        with s3_errors("write to", self.uri):
            client = self._client()
            client.put_object(Bucket=self.bucket, Key=key, Body=PROBE)
            try:
                client.list_objects_v2(Bucket=self.bucket, Prefix=key, MaxKeys=1)
            finally:
                client.delete_object(Bucket=self.bucket, Key=key)

    def _key(self, name: str) -> str:
        return f"{self.prefix}/{name}" if self.prefix else name

    def _client(self) -> Any:
        if self._lazy_client is None:
            self._lazy_client = new_client()
        return self._lazy_client


def _stamp(entry: Any) -> Stamp:
    return Stamp(int(entry["Size"]), str(entry.get("ETag", "")))


class _Chunks(io.RawIOBase):
    """Parts of a content, one after the other, as a file to read from."""

    def __init__(self, chunks: Iterable[bytes]):
        self._chunks, self._rest = iter(chunks), memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._rest:
            chunk = next(self._chunks, None)
            if chunk is None:
                return 0
            self._rest = memoryview(chunk)
        size = min(len(buffer), len(self._rest))
        buffer[:size], self._rest = self._rest[:size], self._rest[size:]
        return size
