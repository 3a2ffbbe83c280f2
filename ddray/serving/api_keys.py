"""Who may use the image service: keys, of which only digests travel and are kept."""

import hashlib
import hmac
import os
import re
from collections.abc import Iterable
from pathlib import Path

from ddray.errors import ConfigError
from ddray.file_kind import kind_of

VARIABLE = "DDRAY_API_KEYS"
_LEAST_CHARACTERS = 16


def read_keys(file: str | None) -> tuple[str, ...]:
    """Digests of the keys in a file, one a line, or in the environment variable.

    Args:
        file: its path; None = the variable `DDRAY_API_KEYS`, separated by commas or spaces.

    Returns:
        sha256 of each key as hexadecimal; none, and the service is open, where there is neither.

    Raises:
        ConfigError: for a file that cannot be read or holds no key, or a key that could be guessed
            or does not fit into a header. The key is not repeated.
    """
    if file is None:
        where, keys = VARIABLE, re.split(r"[,\s]+", os.environ.get(VARIABLE, "").strip())
        if keys == [""]:
            return ()
    else:
        try:
            where, data = file, Path(file).read_bytes()
            keys = data.decode("utf-8-sig").split()
        except (OSError, ValueError) as error:
            raise ConfigError(f"api_keys_file={file} cannot be read: {error}") from error
        kind = kind_of(data)
        if kind is not None and kind.name.endswith("pointer"):
            raise ConfigError(f"api_keys_file={file} is {kind.name}; {kind.advice}")
    if not keys:
        raise ConfigError(f"{where} holds no key; write one a line")
    for number, key in enumerate(keys, 1):
        if not re.fullmatch(rf"[\x21-\x7e]{{{_LEAST_CHARACTERS},}}", key):
            raise ConfigError(
                f"key {number} in {where} must have at least {_LEAST_CHARACTERS} characters, all "
                "of them printable ASCII"
            )
    return tuple(_digest(key) for key in keys)


def is_known(authorization: str, digests: Iterable[str]) -> bool:
    """Whether a header `Authorization: Bearer KEY` holds one of the keys.

    It takes as long for a nearly right key as for any other.
    """
    scheme, _, key = authorization.partition(" ")
    given = _digest(key.strip())
    found = [hmac.compare_digest(given, digest) for digest in digests]
    return any(found) and scheme.lower() == "bearer"


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()
