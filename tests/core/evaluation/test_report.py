"""The page and the tables of any evaluation, from summaries that nobody measured."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from ddray.evaluation.columns import ARROWS, METRIC_COLUMNS, quality_columns
from ddray.evaluation.report import build_report, tables_as_text, write_evaluation
from ddray.metrics.measurement import METRICS
from ddray.report.frontier import KINDS
from ddray.report.page import render_report
from tests.core.evaluation.made_up import digits, imagenet, pictures, samples


def report_of(summary, shown=(), columns=()):
    told = {"title": "T", "subtitle": "S", "settings": {}, "commands": ["ddray evaluate"]}
    return build_report(summary, shown, columns, **told)


def test_every_metric_has_a_column_that_says_which_way_is_better():
    assert {metric.key for metric in METRICS.values()} <= set(METRIC_COLUMNS)
    assert all(column.key == key for key, column in METRIC_COLUMNS.items())
    assert {column.unit for column in METRIC_COLUMNS.values()} == set(ARROWS)
    assert len({column.label for column in METRIC_COLUMNS.values()}) == len(METRIC_COLUMNS)
    labels = {key: METRIC_COLUMNS[key].label for key in ("fid", "fd_dinov2", "precision_clip")}
    assert labels == {"fid": "FID", "fd_dinov2": "FD DINOv2", "precision_clip": "precision CLIP"}
    better = {key: METRIC_COLUMNS[key].unit for key in ("sfid", "kd_clip", "recall", "coverage")}
    assert list(better.values()) == [*2 * ["lower is better"], *2 * ["higher is better"]]


def test_a_table_shows_what_there_is_the_leading_metric_first():
    keys = [column.key for column in quality_columns(imagenet()["quality"], "kid")]
    assert keys[:4] == ["generator", "steps", "kid", "ratio"]
    assert keys[-2:] == ["seconds_per_image", "images"]
    assert {"fid", "sfid", "inception_score", "precision", "recall"} < set(keys)
    assert "settings.cfg" not in keys, "the same in every row that has it"
    assert "fd_digits" not in keys


def test_the_terminal_has_the_tables_and_the_warnings_below_their_numbers():
    text = tables_as_text(imagenet())
    assert re.search(r"student, 1 step +1 +9\.71 ¹ ² +2\.46 +18\.45", text)
    assert "¹ 500 images for 2048 pool features" in text
    assert "² precision and recall of 500 images" in text
    assert re.search(r"batch 1 +batch 64", text)
    alone = tables_as_text(samples())
    assert re.search(r"samples +– +12\.34", alone)
    assert "batch" not in alone
    assert "ratio" not in alone


def test_the_headline_of_a_student_its_teacher_and_their_speed():
    head = report_of(digits()).headline
    assert [(label, value) for label, value, _ in head] == [
        ("one-step student", "2.15"),
        ("its teacher", "1.45"),
        ("speed-up", "2.1 x"),
        ("right class", "99.0%"),
    ]
    assert head[1][2] == "fd_digits in 49 steps; the student has 1.48 x that"


def test_the_headline_of_samples_alone():
    head = report_of(samples()).headline
    assert [value for _, value, _ in head] == ["12.34", "151.2", "0.710", "0.520"]
    assert head[0][2] == "FID, lower is better; 50,000 images"


def test_the_headline_of_a_teacher_alone_and_of_nothing_to_tell():
    summary = digits()
    summary["quality"] = [row for row in summary["quality"] if row["kind"] == "teacher"]
    assert report_of(summary).headline[0][:2] == ("teacher, autoregressive", "1.45")
    summary["quality"][0]["fd_digits"] = None
    assert report_of(summary).headline == []
    assert report_of(summary).frontier == ()


def test_the_frontier_has_rows_that_were_timed_and_published_ones_of_the_same_metric():
    points = report_of(imagenet()).frontier
    ours = [point.label for point in points if not point.published]
    assert len(ours) == 11
    assert "tokenizer reconstruction" not in ours
    assert {point.label for point in points if point.published} > {"VAR-d16-DD, 1 step"}
    assert all(point.kind in KINDS for point in points)
    other = imagenet() | {"leading": "kid"}
    assert not any(point.published for point in report_of(other).frontier)
    assert report_of(imagenet() | {"leading": "inception_score"}).frontier == ()
    assert report_of(samples()).frontier == ()


def test_published_rows_stand_in_a_table_of_their_own_with_their_protocols():
    tables = {table.caption: table for table in report_of(imagenet()).tables}
    published = tables["Published"]
    assert "arXiv 2412.17153, table 1: pytorch-fid" in " ".join(published.notes)
    assert "Measured elsewhere" in published.note
    assert [column.key for column in published.columns][:3] == ["generator", "steps", "fid"]
    assert "Published" not in [table.caption for table in report_of(digits()).tables]


def test_worst_classes_by_name_or_number_the_worst_first():
    tables = {table.caption: table for table in report_of(imagenet()).tables}
    row = tables["Worst classes"].rows[0]
    assert row["generator"] == "teacher, autoregressive"
    told = row["worst"].replace("\u00a0", " ").split(" · ")
    assert told[:4] == ["golden retriever 0.9", "tench 0.85", "great white shark 0.8", "103 0.75"]
    assert len(told) == 10


def test_the_page_shows_the_protocol_as_sentences_and_as_facts():
    page = render_report(report_of(imagenet()))
    assert "<dt>labels</dt><dd>balanced</dd>" in page
    assert "<dt>gpu</dt><dd>NVIDIA H200</dd>" in page
    assert "<dt>gpu</dt>" not in render_report(report_of(samples())), "None says nothing"
    assert "<li>Nothing was measured.</li>" in page
    assert "¹ 500 images for 2048" in page
    assert "of other hardware and other protocols" in page


@pytest.mark.parametrize(("channels", "side", "shown"), [(1, 28, 28), (3, 300, 100)])
def test_pictures_on_the_page_and_beside_it(tmp_path, channels, side, shown):
    summary = digits()
    images = pictures(summary, channels, side, columns=2)[:3]
    report = report_of(summary, images, ("0", "1"))
    assert report.pictures[1].caption == "fd_digits 1.45"
    write_evaluation(str(tmp_path), summary, report, images, ("0", "1"))
    page = (tmp_path / "report.html").read_text()
    pad = max(1, shown // 14)
    assert f'width="{2 * (shown + pad) + pad}"' in page
    assert Image.open(tmp_path / "grid.png").width > 2 * shown


def test_a_contact_sheet_without_headings(tmp_path):
    images = [("samples", np.zeros((12, 3, 8, 8), np.float32))]
    report = report_of(samples(), images)
    assert report.pictures[0].columns == 10
    write_evaluation(str(tmp_path), samples(), report, images, ())
    assert (tmp_path / "grid.png").exists()


def test_without_pictures_there_is_no_grid(tmp_path):
    write_evaluation(str(tmp_path), samples(), report_of(samples()), [], ())
    assert {path.name for path in tmp_path.iterdir()} == {"report.html", "summary.json"}
    assert json.loads((tmp_path / "summary.json").read_text()) == samples()
