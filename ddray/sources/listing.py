"""The files of a source, by a path or a pattern: which there are, of which kind, in which order.

Names are sorted letter by letter, relative to the folder, `/` being a letter like others: an order
that no storage's listing changes. What begins with a dot is no part of a source, nor what macOS
keeps in `__MACOSX`.
"""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from ddray.errors import ConfigError, StorageError
from ddray.locations import S3, absolute
from ddray.storage import open_beside, open_storage
from ddray.storage.base import Stamp, Storage

SUFFIXES = {
    "folder": (".png", ".jpg", ".jpeg", ".webp", ".bmp"),
    "webdataset": (".tar",),
    "parquet": (".parquet",),
    "npz": (".npz",),
}
_WORDS = {"folder": "image", "webdataset": "tar", "parquet": "Parquet file", "npz": ".npz file"}
_WILD = frozenset("*?[")
_ENDINGS_SHOWN = 5


@dataclass(frozen=True)
class Listing:
    """Files at a path, or of a pattern.

    Attributes:
        uri: the path or pattern, absolute.
        storage: that holds the files.
        files: what there is, sorted by name.
    """

    uri: str
    storage: Storage
    files: Mapping[str, Stamp]

    @classmethod
    def of(cls, uri: str) -> "Listing":
        """The files of a folder and the folders in it, one file, or those of a pattern.

        In a pattern, `*`, `?` and `[...]` are letters of one part of a path, and `**` is any
        number of parts. A path that is there is no pattern.

        Raises:
            ConfigError: for what is no location.
            StorageError: if there is nothing, or it cannot be listed.
        """
        parts = os.fsdecode(uri).split("/")
        wild = next((i for i, part in enumerate(parts) if _WILD & set(part)), None)
        if wild is None or os.path.lexists(uri):
            return cls._at(uri)
        base = "/".join(parts[:wild]) or ("/" if wild else ".")
        storage, pattern = open_storage(base), parts[wild:]
        # As much of the pattern as every name begins with.
        start = min((pattern[0] + c).index(c) for c in _WILD)
        found = _seen(storage.stamps(pattern[0][:start]))
        files = {name: found[name] for name in found if _matches(name.split("/"), pattern)}
        where = storage.join("/".join(pattern))
        if not files:
            raise StorageError(
                f"no file matches {where}; * stands for letters of one name, ** for any folders"
            )
        return cls(where, storage, files)

    @classmethod
    def _at(cls, uri: str) -> "Listing":
        place = absolute(uri)
        is_bucket = place.startswith(S3) and "/" not in place.removeprefix(S3)
        if not is_bucket and place != "/":
            storage, name = open_beside(place)
            stamp = storage.stamp(name)
            if stamp is not None:
                return cls(place, storage, {name: stamp})
        storage = open_storage(place)
        files = _seen(storage.stamps())
        if not files:
            braces = "; braces are not expanded, * and ** are" if "{" in place else ""
            empty = "holds no files" if os.path.isdir(place) else "does not exist"
            raise StorageError(f"{place} {empty}{braces}")
        return cls(place, storage, files)

    def kind(self) -> str:
        """Which of SUFFIXES the files are; others beside them are no images and left alone.

        Raises:
            ConfigError: if they are of none, or of several.
        """
        counts = {kind: len(self.names(kind)) for kind in SUFFIXES}
        there = [kind for kind, count in counts.items() if count]
        if len(there) == 1:
            return there[0]
        if not there:
            raise ConfigError(
                f"{self.uri} holds no images, tars, Parquet files or .npz, only {self._endings()}"
            )
        what = " and ".join(_counted(counts[kind], _WORDS[kind]) for kind in there)
        example = f"{self.storage.uri}/**/*{os.path.splitext(self.names(there[0])[0])[1]}"
        raise ConfigError(f"{self.uri} holds {what}; say which by a pattern, such as {example}")

    def names(self, kind: str) -> list[str]:
        """Names of the files of a kind, in their order."""
        return [name for name in self.files if name.lower().endswith(SUFFIXES[kind])]

    def _endings(self) -> str:
        """What there is, such as "12 .txt files and 1 .md file"."""
        return endings(self.files)


def endings(names: Sequence[str] | Mapping[str, object]) -> str:
    """How many names have which ending, such as "12 .txt and 1 .md"; the most frequent first."""
    often = Counter(os.path.splitext(name)[1].lower() or "without an ending" for name in names)
    shown = [f"{count} {ending}" for ending, count in often.most_common(_ENDINGS_SHOWN)]
    rest = sum(often.values()) - sum(count for _, count in often.most_common(_ENDINGS_SHOWN))
    return ", ".join(shown + [f"{rest} others"] * bool(rest))


def is_hidden(name: str) -> bool:
    """Whether a name, or a folder in it, is one that people do not see."""
    return any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))


def _seen(stamps: Mapping[str, Stamp]) -> dict[str, Stamp]:
    return {name: stamps[name] for name in sorted(stamps) if not is_hidden(name)}


def _matches(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return any(_matches(parts[i:], pattern[1:]) for i in range(len(parts) + 1))
    return bool(parts) and fnmatchcase(parts[0], pattern[0]) and _matches(parts[1:], pattern[1:])


def _counted(count: int, word: str) -> str:
    return f"{count} {word}" + "s" * (count != 1)
