"""The one client of S3 that all readers and writers share, and what its errors mean.

Endpoint, region, credentials, addressing style and checksums are what botocore makes of the AWS
environment and files. Nothing else in ddray asks them.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ddray.errors import StorageError, one_line
from ddray.storage.base import NotFoundError

# Of a request, the first included.
ATTEMPTS = 6
# One PUT takes 5 GB at most, and a failure in it costs all of it.
PART_BYTES = 64 * 2**20

_CHECKSUMS = ("request_checksum_calculation", "response_checksum_validation")

_MEDIA_TYPES = {
    "html": "text/html; charset=utf-8",
    "json": "application/json",
    "jsonl": "application/x-ndjson",
    "parquet": "application/vnd.apache.parquet",
    "png": "image/png",
    "tar": "application/x-tar",
    "webp": "image/webp",
}


def new_client() -> Any:
    """A client of boto3's, which threads may share; processes must not.

    Raises:
        botocore's own errors; see `s3_errors`.
    """
    import boto3  # type: ignore[import-untyped, unused-ignore]
    import botocore.session  # type: ignore[import-untyped, unused-ignore]
    from botocore.config import Config  # type: ignore[import-untyped, unused-ignore]

    core = botocore.session.Session()
    core.register_component("data_loader", _descriptions(core.get_config_variable("data_path")))
    config = Config(
        retries={"mode": "standard", "max_attempts": ATTEMPTS},
        connect_timeout=10,
        read_timeout=60,
        # Links of us-east-1 would otherwise be signed in a way that new buckets refuse.
        signature_version="s3v4",
        **_checksums(core.get_scoped_config()),
    )
    # A session of its own: boto3's default session is not safe between threads.
    session = boto3.session.Session(botocore_session=core, region_name=_region())
    return session.client("s3", config=config)


@functools.cache
def _descriptions(folders: str | None) -> Any:
    """The loader of botocore's descriptions of services, which takes longest of a client's making.

    It keeps what it has read. By itself each session would have its own.
    """
    from botocore.loaders import create_loader  # type: ignore[import-untyped, unused-ignore]

    return create_loader(folders)


def _checksums(profile: dict[str, Any]) -> dict[str, str]:
    """Checksums only where S3 asks for them, unless the user has said otherwise.

    Services that are not Amazon's, and older ones, refuse the headers of the others.
    """
    said = {key for key in _CHECKSUMS if key in profile or os.environ.get(f"AWS_{key.upper()}")}
    return {key: "when_required" for key in _CHECKSUMS if key not in said}


def _region() -> str | None:
    """The region that the environment names; None = the profile's."""
    # botocore reads the first alone, all other tools of AWS the second.
    names = ("AWS_DEFAULT_REGION", "AWS_REGION")
    return next((os.environ[name] for name in names if os.environ.get(name)), None)


def media_type(name: str) -> str:
    """What an object is served as, by the ending of its name."""
    return _MEDIA_TYPES.get(name.rpartition(".")[2], "application/octet-stream")


def read_object(client: Any, **request: Any) -> bytes:
    """The content that a GET answers with, begun again where it breaks off.

    Args:
        client: of `new_client`.
        **request: as `get_object` takes it.
    """
    from botocore.exceptions import (  # type: ignore[import-untyped, unused-ignore]
        HTTPClientError,
        IncompleteReadError,
        ResponseStreamingError,
    )

    for attempt in range(ATTEMPTS):
        response = client.get_object(**request)
        try:
            return bytes(response["Body"].read())
        # botocore tries again until an answer begins, not when it breaks off.
        except (HTTPClientError, IncompleteReadError, ResponseStreamingError):
            if attempt == ATTEMPTS - 1:
                raise
    raise AssertionError("the last attempt returns or raises")


def read_part(client: Any, start: int, size: int, **request: Any) -> bytes:
    """`size` bytes of a content from byte `start` on; fewer where it ends before.

    Args:
        client: of `new_client`.
        start: at least 0.
        size: at least 1.
        **request: as `get_object` takes it.
    """
    try:
        return read_object(client, Range=f"bytes={start}-{start + size - 1}", **request)
    except Exception as exc:
        # There is nothing from `start` on.
        if s3_code(exc) in ("InvalidRange", "416"):
            return b""
        raise


_DENIED = "access denied; these credentials need the rights to get, put, list and delete objects"
_REFUSED = "the credentials are refused; renew them, or check AWS_ENDPOINT_URL"
_NO_CREDENTIALS = (
    "no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, "
    "on every machine"
)
_UNREACHABLE = "the endpoint cannot be reached; check the network and AWS_ENDPOINT_URL"
_OTHER_REGION = "the bucket is in another region; set AWS_DEFAULT_REGION to it"
_CHECKSUM = (
    "; if it speaks of checksums, unset AWS_REQUEST_CHECKSUM_CALCULATION or set it to "
    "when_required; docs/storage.md says what services need"
)
_UNCONDITIONAL = (
    "the service does not know conditional writes (If-None-Match), by which two writers of one set "
    "are kept apart; use a newer version of it, or another service"
)
# By error code of the service, or by class name of the client's own errors.
_REASONS = {
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
# A service that does not know a header, or what is asked: its own words tell which.
_UNKNOWN_REQUEST = {
    "InvalidArgument",
    "InvalidRequest",
    "NotImplemented",
    "MethodNotAllowed",
    "XAmzContentSHA256Mismatch",
    "400",
    "405",
    "501",
}


def s3_code(exc: BaseException) -> str:
    """The service's error code, or else the name of the exception's class."""
    response = getattr(exc, "response", None) or {}
    return str(response.get("Error", {}).get("Code") or type(exc).__name__)


@contextmanager
def s3_errors(action: str, uri: str, *, conditional: bool = False) -> Iterator[None]:
    """Turns botocore's errors into ours.

    Args:
        action: What is done to the URI, such as "read".
        uri: Of the object, or of what is listed.
        conditional: Whether it is a write that must not replace.

    Raises:
        NotFoundError: If there is no such object.
        StorageError: With the reason, and what to do.
    """
    from botocore.exceptions import (  # type: ignore[import-untyped, unused-ignore]
        BotoCoreError,
        ClientError,
    )

    try:
        yield
    # ValueError: boto3's answer to a malformed endpoint.
    except (BotoCoreError, ClientError, ValueError) as exc:
        code = s3_code(exc)
        if code in ("NoSuchKey", "404"):
            raise NotFoundError(f"cannot {action} {uri}: no such object") from exc
        raise StorageError(f"cannot {action} {uri}: {_reason(code, exc, conditional)}") from exc


def _reason(code: str, exc: Exception, conditional: bool) -> str:
    if code not in _UNKNOWN_REQUEST:
        return _REASONS.get(code) or one_line(exc)
    if conditional and code in ("NotImplemented", "501"):
        return f"{_UNCONDITIONAL} ({one_line(exc)})"
    return one_line(exc) + _CHECKSUM
