"""Which files of captions a location names, in which order: one, those of a folder, or a pattern.

The names are sorted letter by letter, as no storage's listing changes. Folders in a folder are not
looked into: features in millions of files may lie there.
"""

from __future__ import annotations

import posixpath
from fnmatch import fnmatchcase
from typing import Any

import pyarrow.fs as fs  # type: ignore[import-untyped, unused-ignore]

from ddray.errors import ConfigError, StorageError, one_line
from ddray.locations import absolute
from ddray.storage.arrow import arrow_filesystem
from ddray.storage.prompt_file import TEXT_ENDINGS

ENDINGS = (".parquet", ".jsonl", *TEXT_ENDINGS)
_WORDS = f"{', '.join(ENDINGS[:-1])} or {ENDINGS[-1]}"
_WILD = frozenset("*?[")


def caption_files(uri: str) -> list[str]:
    """The files that a path or s3:// URI names, absolute.

    Args:
        uri: of a file of ENDINGS, of a folder of such files, all of one kind, or with a pattern in
            place of its file's name: `*`, `?` and `[...]` as in a shell.

    Raises:
        ConfigError: for files of no such ending, or of several.
        StorageError: if a folder is not there, or cannot be listed.
    """
    place = absolute(uri)
    folder, _, name = place.rpartition("/")
    is_wild = bool(_WILD & {*name})
    if place.endswith(ENDINGS) and not is_wild:
        return [place]
    try:
        kind = _kind(place)
        if kind == fs.FileType.File and place.endswith(ENDINGS):
            return [place]
        if kind == fs.FileType.Directory:
            folder, names = place, [name for name in _names(place) if name.endswith(ENDINGS)]
        elif is_wild:
            names = [found for found in _names(folder) if fnmatchcase(found, name)]
        else:
            names = [name]
    except OSError as error:
        raise StorageError(f"cannot list captions {place}: {one_line(error)}") from error
    _check_one_kind(uri, folder, names)
    return [f"{folder}/{name}" for name in sorted(names)]


def _check_one_kind(uri: str, folder: str, names: list[str]) -> None:
    """Refuse names of which nobody knows what they are."""
    endings = sorted({posixpath.splitext(name)[1] for name in names})
    if not names:
        raise ConfigError(f"captions={uri!r}: {folder} holds no file of such a name, in {_WORDS}")
    if not {*endings} <= {*ENDINGS}:
        raise ConfigError(f"captions={uri!r} must end in {_WORDS}, or be a folder of such files")
    if len(endings) > 1:
        raise ConfigError(
            f"captions={uri!r} has files of {' and '.join(endings)}; say which by a pattern, such "
            f"as {folder}/*{endings[0]}"
        )


def _kind(place: str) -> Any:
    filesystem, path = arrow_filesystem(place)
    return filesystem.get_file_info([path])[0].type


def _names(folder: str) -> list[str]:
    """Of the files in a folder that people see."""
    filesystem, path = arrow_filesystem(folder)
    found = filesystem.get_file_info(fs.FileSelector(path))
    names = [info.base_name for info in found if info.type == fs.FileType.File]
    return [name for name in names if not name.startswith(".")]
