"""Published rows: those of the model at hand, and the figures that the catalog tells."""

import re

import pytest

from ddray.evaluation.published_tables import _TABLES, published_rows
from ddray.models.catalog import BUNDLED_MODELS, PUBLISHED

KEYS = {
    *("generator", "kind", "steps", "fid", "inception_score", "precision", "recall"),
    *("seconds_per_image", "source", "protocol"),
}


def test_a_teacher_and_its_student_have_the_same_rows_by_name_and_by_sizes():
    rows = published_rows("var-d16")
    assert rows == published_rows("var-dd-d16")
    assert rows == published_rows(dict(PUBLISHED["var-d16"].config))
    stored = {"family": "var", "depth": 16, "embed_dim": 1024, "num_classes": 1000}
    assert rows == published_rows(
        {**stored, "patch_nums": [1, 2, 3, 4, 5, 6, 8, 10, 13, 16], "name": "mine"}
    )
    assert published_rows("llamagen-l-256") != published_rows("llamagen-b-256") != []


def test_a_model_that_nobody_measured_has_none():
    assert not any(published_rows(name) for name in (*BUNDLED_MODELS, "a/folder"))
    assert published_rows({}) == published_rows({"family": "other"}) == []
    assert published_rows({"family": "var", "depth": 16, "num_classes": 10}) == []
    assert published_rows({"family": "var", "depth": 16, "patch_nums": [1, 2, 3]}) == []


@pytest.mark.parametrize("name", _TABLES)
def test_every_row_is_whole_and_says_where_it_was_measured(name):
    rows = published_rows(name)
    assert all(set(row) == KEYS for row in rows)
    assert all(row["source"] and row["protocol"] for row in rows)
    assert len({row["generator"] for row in rows}) == len(rows)
    for row in rows:
        assert 1 < row["fid"] < 300
        assert row["steps"] >= 1
        assert row["precision"] is None or 0 < row["precision"] < 1 > row["recall"] > 0


@pytest.mark.parametrize("name", [name for name in PUBLISHED if published_rows(name)])
def test_rows_agree_with_the_figure_that_the_catalog_tells(name):
    found = re.findall(r"FID (\d+\.\d+)|, (\d+\.\d+) in 2", PUBLISHED[name].figure)
    told = {float(number) for pair in found for number in pair if number}
    fids = {row["fid"] for row in published_rows(name)}
    assert told <= fids


def test_distilled_decodings_rows_for_the_small_var():
    rows = {row["generator"]: row for row in published_rows("var-d16")}
    one = rows["VAR-d16-DD, 1 step"]
    assert (one["fid"], one["inception_score"], one["seconds_per_image"]) == (9.94, 193.6, 0.021)
    assert "pytorch-fid" in one["protocol"]
    assert "2412.17153" in one["source"]
    assert rows["VAR-d16"]["protocol"].startswith("ADM's evaluator")
    assert rows["MaskGIT, 8 steps"]["kind"] == "masked"
