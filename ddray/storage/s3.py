"""An S3 prefix as storage, by boto3, which is loaded when one is first used."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from ddray.errors import ConfigError, StorageError, one_line
from ddray.storage.base import (
    PROBE,
    TEMPORARY,
    NotFoundError,
    Storage,
    checked_name,
    temporary_name,
)

_ATTEMPTS = 6
# One PUT takes 5 GB at most, and a failure in it costs all of it.
_PART_BYTES = 64 * 2**20
# Of an object whose size nobody knows: ten are in memory at once, and 10,000 the most there may be.
_STREAMED_PART_BYTES = 32 * 2**20


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
        from botocore.exceptions import (  # type: ignore[import-untyped, unused-ignore]
            HTTPClientError,
            IncompleteReadError,
            ResponseStreamingError,
        )

        with _s3_errors("read", self.join(name)):
            for attempt in range(_ATTEMPTS):
                response = self._client().get_object(Bucket=self.bucket, Key=self._key(name))
                try:
                    content: bytes = response["Body"].read()
                    break
                # botocore tries again until an answer begins, not when it breaks off.
                except (HTTPClientError, IncompleteReadError, ResponseStreamingError):
                    if attempt == _ATTEMPTS - 1:
                        raise
        return content

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
        with _s3_errors("link", self.join(name)):
            url: str = self._client().generate_presigned_url(
                "get_object", Params=answer, ExpiresIn=expires_s
            )
        return url

    def write(self, name: str, data: bytes, *, if_absent: bool = False) -> bool:
        """Write by one PUT, conditional if `if_absent`, or in parts; see `Storage.write`.

        A conditional PUT whose answer was lost is retried by botocore and then finds its
        own object: False says that `name` exists, not who wrote it.
        """
        condition = {"IfNoneMatch": "*"} if if_absent else {}
        with _s3_errors("write", self.join(name)):
            if len(data) > _PART_BYTES and not if_absent:
                self._client().upload_fileobj(io.BytesIO(data), self.bucket, self._key(name))
                return True
            try:
                self._client().put_object(
                    Bucket=self.bucket, Key=self._key(name), Body=data, **condition
                )
            except Exception as exc:
                if if_absent and _s3_code(exc) in ("PreconditionFailed", "412"):
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
        with _s3_errors("write", self.join(name)):
            self._client().upload_fileobj(stream, self.bucket, self._key(name), Config=config)

    def list(self, prefix: str = "") -> dict[str, int]:
        """Return name -> size of the keys below the prefix; see `Storage.list`."""
        start = len(self._key(""))
        sizes: dict[str, int] = {}
        with _s3_errors("list", self.uri):
            pages = self._client().get_paginator("list_objects_v2")
            for page in pages.paginate(Bucket=self.bucket, Prefix=self._key(prefix)):
                for entry in page.get("Contents", ()):
                    name = entry["Key"][start:]
                    is_temporary = name.rpartition("/")[2].startswith(TEMPORARY)
                    # Some tools mark a folder by an empty key that ends in a slash.
                    if name and not name.endswith("/") and not is_temporary:
                        sizes[name] = int(entry["Size"])
        return dict(sorted(sizes.items()))

    def exists(self, name: str) -> bool:
        """Say whether `name` exists; see `Storage.exists`."""
        key = self._key(checked_name(name))
        with _s3_errors("read", self.join(name)):
            # A listing, and not HEAD, whose 404 does not tell a missing bucket from a
            # missing key. The key itself sorts first among all that begin with it.
            page = self._client().list_objects_v2(Bucket=self.bucket, Prefix=key, MaxKeys=1)
        return any(entry["Key"] == key for entry in page.get("Contents", ()))

    def version(self, name: str) -> str:
        """Return ETag and time of the object; see `Storage.version`."""
        with _s3_errors("read", self.join(name)):
            head = self._client().head_object(Bucket=self.bucket, Key=self._key(name))
        return f"{head['ETag']}-{head['LastModified'].isoformat()}"

    def delete(self, name: str) -> None:
        """Delete `name`; see `Storage.delete`."""
        with _s3_errors("delete", self.join(name)):
            self._client().delete_object(Bucket=self.bucket, Key=self._key(name))

    def check_writable(self) -> None:
        """Put, list and delete a probe: all three rights are needed; see `Storage`."""
        key = self._key(temporary_name())
        with _s3_errors("write to", self.uri):
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
            import boto3  # type: ignore[import-untyped, unused-ignore]
            from botocore.config import (  # type: ignore[import-untyped, unused-ignore]
                Config,
            )

            config = Config(
                retries={"mode": "standard", "max_attempts": _ATTEMPTS},
                connect_timeout=10,
                read_timeout=60,
                # Links of us-east-1 would otherwise be signed in a way that new buckets refuse.
                signature_version="s3v4",
            )
            # A session of its own: boto3's default session is not safe between threads.
            self._lazy_client = boto3.session.Session().client("s3", config=config)
        return self._lazy_client


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
        reason = _S3_REASONS.get(code) or one_line(exc)
        raise StorageError(f"cannot {action} {uri}: {reason}") from exc
