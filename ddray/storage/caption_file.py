"""Captions, read as a stream from one file or from shards: ours, or those that people have.

Ours have the columns `index`, `caption` and perhaps `features`, in Parquet or JSON lines; rows
ascend by index from 0 without gaps, so whatever is wrong with their order shows while a few of them
are in memory. Files of prompts have no index: it is the number of the row.

Shapes: T caption positions (each row its own), D feature width.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa  # type: ignore[import-untyped, unused-ignore]

from ddray.errors import ConfigError, StorageError, one_line
from ddray.file_kind import explained
from ddray.locations import absolute
from ddray.storage.arrow import arrow_filesystem
from ddray.storage.caption_cleaning import unescaped
from ddray.storage.caption_json import JsonCaptions
from ddray.storage.caption_parquet import ParquetCaptions
from ddray.storage.caption_row import CaptionColumn, CaptionReader, FoundRow, drawn
from ddray.storage.caption_shards import caption_files
from ddray.storage.prompt_file import TextCaptions

_BUFFER_BYTES = 1 << 20
_FAULTS_SHOWN = 3
_LETTERS_SHOWN = 40
_TAG = re.compile(r"<[^<>]*>")
_ADDRESS = re.compile(r"\b(?:https?://|www\.)\S+")
_HALF_PAIR = re.compile("[\ud800-\udfff]")
_QUOTES = str.maketrans({**dict.fromkeys("´«»“”¨", '"'), **dict.fromkeys("‘’", "'")})


def clean_caption(caption: str) -> str:
    """A caption as the encoder's training data had it: lower case, without markup or addresses.

    Published models saw captions from the web through a longer list of rules, for the debris of
    product pages; they leave a sentence that somebody wrote as this does.
    """
    text = unescaped(unescaped(caption)).lower()
    text = _TAG.sub(" ", _ADDRESS.sub(" ", text)).translate(_QUOTES)
    return " ".join(text.split())


def no_text(caption: str) -> str | None:
    """What in a caption neither files nor encoders take; None where all is well."""
    # Half a surrogate pair is legal in JSON and in Python, and has no UTF-8.
    if _HALF_PAIR.search(caption):
        return (
            "holds half a surrogate pair, as of an emoji that was cut; cut texts between "
            "characters, or leave it out"
        )
    return "holds a NUL character; leave it out" if "\0" in caption else None


def is_empty(caption: str) -> bool:
    """Whether nothing is left of a caption for an encoder to read, or only what nobody sees."""
    unseen = ("Cc", "Cf", "Zs", "Zl", "Zp")  # controls, formats as the zero-width space, spaces
    return all(unicodedata.category(letter) in unseen for letter in clean_caption(caption))


@dataclass(frozen=True)
class CaptionRow:
    """One row of a file of captions.

    Attributes:
        index: sample index.
        caption: its text.
        features_TD: float32 [T, D]; None where the file has none, or they were not asked for.
        record: all that a file of prompts says of it, as a JSON object; None in other files.
    """

    index: int
    caption: str
    features_TD: npt.NDArray[np.float32] | None
    record: str | None = None


@dataclass
class LeftOut:
    """Broken rows that a pass over captions went without.

    Attributes:
        count: how many.
        first: what was wrong with the first of them.
    """

    count: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, fault: str) -> None:
        """One more."""
        self.count += 1
        if len(self.first) < _FAULTS_SHOWN:
            self.first.append(fault)

    def __str__(self) -> str:
        """As a user is told."""
        rest = self.count - len(self.first)
        faults = "; ".join(self.first + [f"and {rest} more"] * bool(rest))
        return f"{self.count} left out: {faults}"


class CaptionFile:
    """Captions of a file or of shards, checked and read as a stream.

    Args:
        uri: path or s3:// URI that ends in .parquet or .jsonl; or in .txt, .tsv or .csv; or of a
            folder of such files, or a pattern of them, whose rows follow one another by the names.
        length: T at most, the caption positions of the teacher.
        width: D, the teacher's caption_dim.
        column: of the captions, in a file of prompts; None = where they usually are.
        each: rows that each row of the file stands for, one after the other.
        seed: by which one of several captions of a row is drawn (`caption_row.drawn`).
        skip_bad: leave out rows that are broken, and count them; the index runs over the others.
        clean: what every caption goes through first.

    Attributes:
        uri: the same, absolute.
        has_features: whether its captions come with features.
        left_out: broken rows of the last pass.

    Raises:
        ConfigError: for another ending, or columns that are missing or of another type.
        StorageError: if the file cannot be read.
    """

    def __init__(
        self,
        uri: str,
        *,
        length: int,
        width: int,
        column: str | None = None,
        each: int = 1,
        seed: int = 0,
        skip_bad: bool = False,
        clean: Callable[[str], str] | None = None,
    ) -> None:
        self.uri = absolute(uri)
        self.left_out = LeftOut()
        self._length, self._width, self._column, self._each = length, width, column, each
        self._seed, self._skip_bad, self._clean = seed, skip_bad, clean
        self._what = "rows"
        self._files = caption_files(uri)
        self.has_features = False
        for file in self._files:
            with self._reader(file) as reader:
                self.has_features = reader.has_features
                if not reader.is_empty:
                    return

    def rows(self, count: int, *, features: bool = True) -> Iterator[CaptionRow]:
        """The first `count` rows; whatever comes behind them is not looked at.

        Args:
            count: rows that are needed.
            features: whether to read them, where the file has some.

        Raises:
            ConfigError: for an index that is double or out of order, or too few rows; and, unless
                they are left out, for an index or a caption that is missing, a caption that is
                empty or no text, features of another shape.
            StorageError: if the file cannot be read to the end.
        """
        number, needed = -1, -(-count // self._each)
        self.left_out = LeftOut()
        taken = self._taken(features and self.has_features)
        for number, row in enumerate(islice(taken, needed)):
            first = number * self._each
            for index in range(first, min(first + self._each, count)):
                yield row if row.index == index else replace(row, index=index)
        if number + 1 < needed:
            each = f" of {self._each} images each" if self._each > 1 else ""
            others = f" ({self.left_out})" if self.left_out.count else ""
            raise ConfigError(
                f"captions {self.uri}: {number + 1} {self._what}{each}{others}, but count={count}"
            )

    def check(self, count: int) -> None:
        """Read the first `count` rows without their features, to refuse them before work starts.

        Raises:
            ConfigError: as `rows`.
            StorageError: as `rows`.
        """
        for _ in self.rows(count, features=False):
            pass

    def _taken(self, features: bool) -> Iterator[CaptionRow]:
        """All rows that can be used, in their order."""
        number = 0
        for file, reader, found in self._found(features):
            row = self._judged(found, reader.column, number)
            if isinstance(row, CaptionRow):
                yield row
                number += 1
                continue
            where = "" if file == self.uri else f"{file}: "
            if not self._skip_bad:
                raise ConfigError(f"captions {file}: {row}")
            self.left_out.add(where + row)

    def _found(self, features: bool) -> Iterator[tuple[str, CaptionReader, FoundRow]]:
        """All rows in their order, each with its file and reader; an index is in its place."""
        before = 0
        for file in self._files:
            with self._reader(file) as reader:
                if not reader.is_empty and reader.has_features != self.has_features:
                    raise ConfigError(
                        f"features must be in every file or in none; see {self._files[0]}"
                    )
                self._what = reader.what
                start, number = None, -1
                for number, found in enumerate(reader.rows(features)):
                    if found.index is not None:
                        # In shards it begins anew, or runs on.
                        if start is None:
                            start = before if found.index == before + number else 0
                        _check_place(found.index, number, start)
                    yield file, reader, found
            before += number + 1

    def _judged(self, found: FoundRow, column: CaptionColumn, index: int) -> CaptionRow | str:
        """The row, or what the teacher, its encoder or a shard would refuse in it."""
        if found.fault is not None:
            return found.fault
        caption = found.caption
        if isinstance(caption, list):
            if self.has_features:
                raise ConfigError(
                    f"captions {self.uri}: {found.name} has {len(caption)} captions, and features "
                    "of one of them; say of which by --caption-column NAME[I], such as text[0]"
                )
            caption = drawn(caption, self._seed, index)
        if not isinstance(caption, str):
            return f"{found.name} has no text in {str(column)!r}, but {_shown(caption)}"
        if reason := no_text(caption):
            return f"the caption of {found.name} {reason}"
        caption = self._clean(caption) if self._clean else caption
        if not self.has_features and is_empty(caption):
            return f"the caption of {found.name} is empty"
        if found.features_TD is not None and (reason := self._unfit(found.features_TD)):
            return f"the features of {found.name} are {reason}"
        record = found.record
        told = None if record is None else json.dumps(record | {"prompt": caption})
        return CaptionRow(index, caption, found.features_TD, told)

    def _unfit(self, features_TD: npt.NDArray[np.float32]) -> str | None:
        """What the teacher would refuse in features."""
        if features_TD.ndim != 2:
            return "no T lists of D numbers"
        length, width = features_TD.shape
        if not 1 <= length <= self._length or width != self._width:
            return (
                f"{length} x {width}; the teacher takes 1 to {self._length} positions of width "
                f"{self._width}"
            )
        return None if np.isfinite(features_TD).all() else "not all finite"

    @contextmanager
    def _reader(self, file: str) -> Iterator[CaptionReader]:
        """One of the files, open."""
        with _errors(file), _open(file) as opened:
            yield _reader_of(opened, file, self._column, self.has_features)


def _reader_of(opened: Any, file: str, column: str | None, has_features: bool) -> CaptionReader:
    if file.endswith(".parquet"):
        return ParquetCaptions(opened, column)
    if file.endswith(".jsonl"):
        return JsonCaptions(opened, file, column, has_features)
    return TextCaptions(opened, file[-4:], column)


def _shown(value: object) -> str:
    """What stands in place of a text, as JSON has it."""
    text = json.dumps(value, default=repr)
    return text if len(text) <= _LETTERS_SHOWN else f"{text[:_LETTERS_SHOWN]} ..."


def _check_place(index: int, number: int, start: int) -> None:
    """Refuse the index of row `number`, all rows before it being in their places."""
    rule, place = f"rows must ascend by index from {start} without gaps", start + number
    if index > place:
        raise ConfigError(f"index {place} is missing: row {number} has index {index}; {rule}")
    if index < start:
        raise ConfigError(f"index {index} at row {number}; {rule}")
    if index < place:
        raise ConfigError(f"index {index} twice at row {number}; {rule}")


@contextmanager
def _errors(uri: str) -> Iterator[None]:
    """Names the file in whatever goes wrong while it is read."""
    try:
        yield
    except ConfigError as exc:
        raise ConfigError(f"captions {uri}: {exc}") from exc
    except FileNotFoundError as exc:
        raise StorageError(f"cannot read captions {uri}: no such file") from exc
    except (pa.ArrowException, UnicodeDecodeError) as exc:
        refusal = f"captions {uri} is damaged or no Parquet"
        raise ConfigError(explained(refusal, _head(uri), exc, "Parquet")) from exc
    except OSError as exc:
        raise StorageError(f"cannot read captions {uri}: {one_line(exc)}") from exc


def _open(uri: str) -> Any:
    """The file for reading from anywhere in it, by pyarrow: our own storage reads whole files."""
    filesystem, path = arrow_filesystem(uri)
    return filesystem.open_input_file(path)


def _head(uri: str) -> bytes:
    """Its beginning, which names what it is; short of that, anything that says nothing."""
    try:
        with _open(uri) as file:
            return bytes(file.read(_BUFFER_BYTES))
    except OSError:
        return b"PAR1"
