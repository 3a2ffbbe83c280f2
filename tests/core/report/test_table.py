"""Tables show the same in every setting."""

import math

import numpy as np
import pytest

from ddray.errors import ConfigError
from ddray.report.table import Column, Marked, markdown_table, write_summary_table

COLUMNS = [
    Column("name", "Generator"),
    Column("fd", "fd_digits", "lower is better", ".2f"),
    Column("accuracy", "Accuracy", format=".1%"),
]
ROWS = [
    {"name": "Teacher", "fd": 4.0, "accuracy": 0.962},
    {"name": "Student | 1 step", "fd": np.float32(12.345), "accuracy": None},
    {"name": "Broken", "fd": math.nan, "unknown": 1},
]


def test_summary_table_is_aligned():
    assert write_summary_table(ROWS, COLUMNS).splitlines() == [
        "Generator               fd_digits  Accuracy",
        "                  lower is better",
        "────────────────  ───────────────  ────────",
        "Teacher                      4.00     96.2%",
        "Student | 1 step            12.35         –",
        "Broken                          –         –",
    ]


def test_markdown_table_shows_the_same_and_escapes_its_bars():
    assert markdown_table(ROWS, COLUMNS).splitlines() == [
        "| Generator | fd_digits (lower is better) | Accuracy |",
        "| --- | ---: | ---: |",
        "| Teacher | 4.00 | 96.2% |",
        r"| Student \| 1 step | 12.35 | – |",
        "| Broken | – | – |",
    ]


def test_values_have_a_readable_default():
    row = {"a": 0.1 + 0.2, "b": 12345, "c": True, "d": "text", "e": math.inf}
    line = write_summary_table([row], [Column(key, key) for key in row]).splitlines()[-1]
    assert line.split() == ["0.3", "12345", "yes", "text", "inf"]


def test_a_table_without_rows_is_its_headings():
    assert len(write_summary_table([], COLUMNS).splitlines()) == 3


def test_tables_refuse_no_columns_and_a_format_that_does_not_fit():
    with pytest.raises(ConfigError, match="at least one column"):
        write_summary_table(ROWS, [])
    with pytest.raises(ConfigError, match="column 'fd' cannot show 1.5"):
        markdown_table([{"fd": 1.5}], [Column("fd", "FD", format="d")])


def test_a_marked_number_stays_a_number_and_shows_its_notes():
    rows = [{"a": "x", "b": Marked(1.25, [1, 12])}, {"a": "y", "b": Marked(None, [2])}]
    text = write_summary_table(rows, [Column("a", "A"), Column("b", "B", "", ".1f")])
    assert text.splitlines()[2:] == ["x  1.2 ¹ ¹²", "y       – ²"]
