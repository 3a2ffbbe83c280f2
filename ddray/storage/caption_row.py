"""A row of captions as it stands in a file of any kind, before anybody judges it.

Shapes: T caption positions (each row its own), D feature width.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ddray.errors import ConfigError

COLUMNS = ("caption", "Caption", "prompt", "Prompt", "TEXT")
"""Where a caption is looked for if nobody names its column, the first that is there."""
_PLACE = re.compile(r"(.+)\[(\d+)\]")


@dataclass(slots=True)  # one is made of each of millions of rows, and a frozen one takes longer
class FoundRow:
    """One row of a file.

    Attributes:
        name: what people find it by, such as "row 7" or "index 7".
        caption: what stands in its column: a text, a list of them, or what is neither.
        index: of its column; None in files of prompts, which have none.
        features_TD: float32 [T, D], an empty one [0] for what is no matrix; None where the file has
            none, or they were not asked for.
        record: all that a file of prompts says of it; None of other files.
        fault: why no more could be read of it; None where all could.
    """

    name: str
    caption: Any = None
    index: int | None = None
    features_TD: npt.NDArray[np.float32] | None = None
    record: dict[str, Any] | None = None
    fault: str | None = None


class CaptionReader(Protocol):
    """A file of one kind, open, its columns checked; it is read once.

    Attributes:
        what: its rows, as a sentence calls them.
        is_empty: whether it has no rows, and so need not have columns.
        has_features: whether its captions come with features.
        column: where the captions stand.
    """

    what: str
    is_empty: bool
    has_features: bool
    column: CaptionColumn

    def rows(self, features: bool) -> Iterator[FoundRow]:
        """All rows in their order, with their features where asked."""


@dataclass(frozen=True)
class CaptionColumn:
    """Where captions stand: in a column, or at one place of the lists in it.

    Attributes:
        name: of the column.
        place: in its lists; None = the texts, or any of a list.
    """

    name: str
    place: int | None = None

    def __str__(self) -> str:
        """As it is asked for."""
        return self.name if self.place is None else f"{self.name}[{self.place}]"

    def of(self, value: Any) -> Any:
        """What a row has there, given what stands in its column; None for nothing."""
        if self.place is None:
            return value
        is_there = isinstance(value, list) and self.place < len(value)
        return value[self.place] if is_there else None


def column_of(names: Iterable[str], asked: str | None) -> CaptionColumn:
    """The column of captions among some.

    Args:
        names: of all columns.
        asked: its name, or `NAME[I]` for place I of its lists; None = the first of COLUMNS.

    Raises:
        ConfigError: if it is not there.
    """
    known = list(names)
    for name in COLUMNS if asked is None else (asked,):
        if name in known:
            return CaptionColumn(name)
    place = _PLACE.fullmatch(asked or "")
    if place and place[1] in known:
        return CaptionColumn(place[1], int(place[2]))
    if asked is not None:
        raise ConfigError(f"there is no column {asked!r}; it has {', '.join(known)}")
    raise ConfigError(
        f"there is no column {', '.join(COLUMNS)}; it has {', '.join(known)}: name the one with "
        "the captions by --caption-column"
    )


def drawn(captions: Sequence[Any], seed: int, index: int) -> Any:
    """One caption of a list: of n, number h mod n, where h is a hash of seed and index.

    h is the first eight bytes, big-endian, of the sha256 of the text `ddray caption SEED INDEX`.

    Args:
        captions: of one row; None is drawn of none.
        seed: of the job.
        index: of the row among those that are taken.
    """
    digest = hashlib.sha256(f"ddray caption {seed} {index}".encode()).digest()
    return captions[int.from_bytes(digest[:8], "big") % len(captions)] if captions else None
