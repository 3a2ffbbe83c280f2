"""Two evaluations side by side: what sets their protocols apart, then every figure of both."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ddray.errors import ConfigError, is_finite
from ddray.evaluation.columns import GENERATOR, METRIC_COLUMNS, SECONDS, metrics_of
from ddray.file_kind import explained, json_value
from ddray.locations import absolute
from ddray.report.page import Report, render_report
from ddray.report.table import Column, Table, write_summary_table
from ddray.storage import open_beside, open_storage
from ddray.storage.base import NotFoundError
from ddray.storage.run_folder import SUMMARY_FILE

PAGE_FILE = "comparison.html"

# What a distance is measured with: another one is another quantity.
_MEASURE = ("network", "extractor", "reference", "reference_sha256", "resize")
# What moves no distance by more than another seed would, or only its last digits.
_NOISE = ("seed", "dtype", "device", "gpu", "threads", "ddray_version")
# What is compared.
_JUDGED = ("student", "teacher", "samples", "cfg")
_SPEED = ("dtype", "device", "gpu", "threads")


@dataclass(frozen=True)
class Comparison:
    """Two evaluations, and whether their figures may be compared.

    Attributes:
        names: locations of the two.
        verdict: sentences, the one about distances first.
        settings: rows with setting, a and b: those in which the protocols differ.
        metrics: rows by column: generator, a, b, difference (b - a), ratio (b / a).
        alone: sentences on rows that only one has.
    """

    names: tuple[str, str]
    verdict: Sequence[str]
    settings: Sequence[Mapping[str, Any]]
    metrics: Mapping[str, Sequence[Mapping[str, Any]]]
    alone: Sequence[str]

    def tables(self) -> list[Table]:
        """The settings that differ, then one table a metric."""
        a, b = (Column(key, key.upper()) for key in "ab")
        tables = []
        if self.settings:
            columns = [Column("setting", "setting"), a, b]
            tables.append(Table("Settings that differ", columns, self.settings))
        for key, rows in self.metrics.items():
            metric = METRIC_COLUMNS.get(key, SECONDS)
            signed = Column("difference", "B - A", "", f"+{metric.format}")
            figures = [replace(column, format=metric.format) for column in (a, b)]
            columns = [GENERATOR, *figures, signed, Column("ratio", "B / A", "", ".3f")]
            tables.append(Table(f"{metric.label}, {metric.unit}", columns, rows))
        return tables

    def as_text(self) -> str:
        """Everything for a terminal."""
        names = "\n".join(f"{key}: {name}" for key, name in zip("AB", self.names, strict=True))
        tables = [
            f"{table.caption}\n{write_summary_table(table.rows, table.columns)}"
            for table in self.tables()
        ]
        settings = tables[: bool(self.settings)]
        rest = [*tables[len(settings) :], "\n".join(self.alone)]
        return "\n\n".join(filter(None, [names, *settings, "\n".join(self.verdict), *rest]))

    def write(self, out: str) -> str:
        """Write comparison.html under a URI.

        Returns:
            The URI of the page.

        Raises:
            StorageError: if it cannot be written.
        """
        report = Report(
            title="Two evaluations",
            subtitle=" ".join(self.verdict),
            tables=self.tables(),
            protocol=self.alone,
            facts=dict(zip("AB", self.names, strict=True)),
        )
        storage = open_storage(out)
        storage.write(PAGE_FILE, render_report(report).encode())
        return storage.join(PAGE_FILE)


def compare(locations: Sequence[str]) -> Comparison:
    """Put two evaluations side by side.

    Args:
        locations: of two `summary.json`, or of folders that hold one; local or s3.

    Raises:
        ConfigError: for another number of them, or one that is no summary of an evaluation.
        StorageError: if one cannot be read.
    """
    if len(locations) != 2:
        raise ConfigError(
            f"--compare takes two summaries, and {len(locations)} "
            f"{'is' if len(locations) == 1 else 'are'} given; write --compare A.json B.json"
        )
    first, second = (read_summary_of(location) for location in locations)
    differing = _differing(first["settings"], second["settings"])
    rows_a, rows_b = (
        {row["generator"]: row for row in summary["quality"]} for summary in (first, second)
    )
    pairs = {name: (row, rows_b[name]) for name, row in rows_a.items() if name in rows_b}
    alone = [
        f"Only {key} has: {'; '.join(lonely)}."
        for key, lonely in (
            ("A", [name for name in rows_a if name not in pairs]),
            ("B", [name for name in rows_b if name not in pairs]),
        )
        if lonely
    ]
    shared = [
        key
        for key in (*metrics_of(row for row, _ in pairs.values()), SECONDS.key)
        if any(is_finite(a.get(key)) and is_finite(b.get(key)) for a, b in pairs.values())
    ]
    return Comparison(
        (absolute(locations[0]), absolute(locations[1])),
        _verdict([row["setting"] for row in differing], pairs, bool(shared)),
        differing,
        {key: [_beside(name, key, *pair) for name, pair in pairs.items()] for key in shared},
        alone,
    )


def read_summary_of(location: str) -> dict[str, Any]:
    """The summary of an evaluation, or of a quickstart's.

    Raises:
        ConfigError: if there is none, it is something else, or an earlier ddray wrote it.
        StorageError: if it cannot be read.
    """
    place = absolute(location)
    if place.endswith(".json"):
        storage, name = open_beside(place)
    else:
        storage, name = open_storage(place), SUMMARY_FILE
    file = storage.join(name)
    try:
        data = storage.read(name)
    except NotFoundError as error:
        raise ConfigError(
            f"{file} is not there; give the summary.json of an evaluation, or its folder"
        ) from error
    refusal = f"{file} is no summary of an evaluation"
    try:
        summary = json_value(data)
    except ValueError as error:
        raise ConfigError(explained(refusal, data, error, "JSON")) from error
    if isinstance(summary, dict) and isinstance(summary.get("evaluation"), dict):
        summary = summary["evaluation"]
    if not isinstance(summary, dict) or not _are_rows(summary.get("quality")):
        raise ConfigError(f"{refusal}: it has no rows of quality, one a generator")
    if not isinstance(summary.get("settings"), dict):
        raise ConfigError(
            f"{file} was written by an earlier ddray, without the settings that tell whether "
            "figures may be compared; evaluate again"
        )
    return summary


def _are_rows(rows: Any) -> bool:
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        return False
    names = [row.get("generator") for row in rows]
    return all(isinstance(name, str) for name in names) and len({*names}) == len(names)


def _differing(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Settings that are not the same, those that matter most first."""
    names = dict.fromkeys((*_MEASURE, *first, *second))
    ordered = [name for name in names if name not in _NOISE] + list(_NOISE)
    hashes = [settings.get("reference_sha256") for settings in (first, second)]
    same_file = hashes[0] is not None and hashes[0] == hashes[1]
    return [
        {"setting": name, "a": _told(first.get(name)), "b": _told(second.get(name))}
        for name in ordered
        # The same file may lie in two places.
        if first.get(name) != second.get(name) and not (name == "reference" and same_file)
    ]


def _told(value: Any) -> str | None:
    """A setting as text: a table's numbers would be set flush right, beside words."""
    return None if value is None else str(value)


def _verdict(
    names: Sequence[str],
    pairs: Mapping[str, tuple[Mapping[str, Any], Mapping[str, Any]]],
    shares: bool,
) -> list[str]:
    """Whether the figures may be compared, in words."""
    if not shares:
        return ["The two have no metric of a generator in common."]
    measure = [name for name in names if name in _MEASURE]
    rough = [name for name in names if name not in (*_MEASURE, *_NOISE, *_JUDGED)]
    if "count" not in rough and any(a.get("images") != b.get("images") for a, b in pairs.values()):
        rough.append("number of images")
    if measure:
        told = [f"The distances may not be compared: {_differ(measure)}."]
    elif rough:
        told = [f"The distances may be compared only roughly: {_differ(rough)}."]
    elif {*names} - {*_JUDGED}:
        told = ["The distances may be compared: what differs moves them less than another seed."]
    else:
        told = ["The distances may be compared: the protocols are the same."]
    speed = [name for name in names if name in _SPEED]
    if speed:
        told.append(f"Times may not: {_differ(speed)}.")
    return told


def _differ(names: Sequence[str]) -> str:
    """As a sentence ends."""
    if len(names) == 1:
        return f"{names[0]} differs"
    return f"{', '.join(names[:-1])} and {names[-1]} differ"


def _beside(
    name: str, key: str, first: Mapping[str, Any], second: Mapping[str, Any]
) -> dict[str, Any]:
    """One figure of both rows."""
    a, b = (float(row[key]) if is_finite(row.get(key)) else None for row in (first, second))
    figures: dict[str, Any] = {"generator": name, "a": a, "b": b, "difference": None, "ratio": None}
    if a is not None and b is not None:
        figures |= {"difference": b - a, "ratio": b / a if a else None}
    return figures
