"""Two evaluations side by side: what sets them apart comes before any figure."""

import json

import pytest

from ddray.cli import main
from ddray.errors import ConfigError
from ddray.evaluation.comparison import compare, read_summary_of
from tests.core.evaluation.made_up import digits, imagenet, samples


@pytest.fixture
def write(tmp_path):
    def write(name, summary, **settings):
        summary["settings"] |= settings
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps(summary))
        return str(tmp_path / name)

    return write


def test_the_same_protocol_and_other_figures(write):
    better = samples()
    better["quality"][0]["fid"] = 6.17
    found = compare([write("a.json", samples()), write("b.json", better)])
    assert found.settings == []
    assert found.verdict == ["The distances may be compared: the protocols are the same."]
    (row,) = found.metrics["fid"]
    assert row["ratio"] == pytest.approx(0.5)
    assert row["difference"] == pytest.approx(-6.17)
    assert "samples    12.34  6.17  -6.17  0.500" in found.as_text()


@pytest.mark.parametrize(
    ("settings", "verdict"),
    [
        ({"extractor": "other"}, "may not be compared: extractor differs."),
        ({"network": "dinov2", "resize": "x"}, "may not be compared: network and resize differ."),
        ({"reference_sha256": "other", "count": 9}, "not be compared: reference_sha256 differs."),
        ({"count": 1000}, "may be compared only roughly: count differs."),
        ({"labels": "random", "splits": "x"}, "only roughly: labels and splits differ."),
        ({"seed": 1}, "may be compared: what differs moves them less than another seed."),
        ({"student": "another"}, "may be compared: the protocols are the same."),
        ({"reference": "elsewhere/VIRTUAL.npz"}, "may be compared: the protocols are the same."),
        ({"reference": "x", "reference_sha256": None}, "reference and reference_sha256 differ."),
    ],
)
def test_what_differs_decides_whether_distances_compare(write, settings, verdict):
    found = compare([write("a.json", digits()), write("b.json", digits(), **settings)])
    assert found.verdict[0].endswith(verdict)
    listed = {row["setting"] for row in found.settings}
    assert listed == set(settings) or listed == set()


def test_fewer_images_of_a_row_compare_only_roughly(write):
    fewer = samples()
    fewer["quality"][0]["images"] = 10
    found = compare([write("a.json", samples()), write("b.json", fewer)])
    assert found.verdict == [
        "The distances may be compared only roughly: number of images differs."
    ]


def test_times_of_other_hardware_do_not_compare(write):
    other = {"device": "cuda", "gpu": "NVIDIA H200"}
    found = compare([write("a.json", digits()), write("b.json", digits(), **other)])
    assert found.verdict[1] == "Times may not: device and gpu differ."


def test_rows_that_only_one_has_are_named(write):
    old = digits()
    old["quality"][-1]["generator"] = "noise"
    del old["quality"][0]
    found = compare([write("a.json", digits()), write("b.json", old)])
    assert found.alone == [
        "Only A has: tokenizer reconstruction; independent tokens.",
        "Only B has: noise.",
    ]
    assert len(found.metrics["fd_digits"]) == 5


def test_metrics_that_only_one_has_are_left_out_and_nothing_in_common_is_said(write):
    found = compare([write("a.json", digits()), write("b.json", samples())])
    assert found.metrics == {}
    assert found.verdict == ["The two have no metric of a generator in common."]
    assert "Only B has: samples." in found.as_text()


def test_figures_that_are_missing_show_as_such(write):
    blank = digits()
    blank["quality"][3]["fd_digits"] = None
    rows = compare([write("a.json", digits()), write("b.json", blank)]).metrics["fd_digits"]
    assert rows[3] == {
        **{"generator": "student, 1 step", "a": 2.15},
        **dict.fromkeys(("b", "difference", "ratio")),
    }


def test_a_folder_and_a_quickstart_are_read_too(write, tmp_path):
    write("run/summary.json", digits())
    assert read_summary_of(str(tmp_path / "run")) == digits()
    whole = tmp_path / "whole.json"
    whole.write_text(json.dumps({"minutes": 9, "evaluation": digits()}))
    assert read_summary_of(str(whole)) == digits()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is no summary of an evaluation: Expecting property name"),
        ("", "is no summary of an evaluation: it is empty"),
        ("[1]", "is no summary of an evaluation: it has no rows of quality"),
        ('{"rows": 3}', "it has no rows of quality, one a generator"),
        ('{"quality": [3]}', "it has no rows of quality, one a generator"),
        ('{"quality": [{"generator": "a"}, {"generator": "a"}]}', "it has no rows of quality"),
        ('{"quality": []}', "was written by an earlier ddray, without the settings"),
    ],
)
def test_what_is_no_summary_is_refused_by_one_line(tmp_path, text, message):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_summary_of(str(tmp_path / "x.json"))


def test_the_command_prints_both_and_writes_a_page(write, tmp_path, capsys):
    files = [write("a.json", imagenet()), write("b.json", imagenet(), count=10)]
    out = tmp_path / "out"
    assert main(["evaluate", "--student", "nowhere", "--compare", *files, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert printed.index("Settings that differ") < printed.index("only roughly: count differs.")
    assert printed.index("only roughly") < printed.index("FID, lower is better")
    assert printed.rstrip().endswith(str(out / "comparison.html"))
    page = (out / "comparison.html").read_text()
    assert "only roughly: count differs." in page
    assert page.index("Settings that differ") < page.index("FID, lower is better")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["absent.json"], "--compare takes two summaries, and 1 is given"),
        (["a.json", "b.json", "c.json"], "--compare takes two summaries, and 3 are given"),
        (["absent.json", "b.json"], "absent.json is not there; give the summary.json of an"),
        (["absent", "b"], "absent/summary.json is not there"),
    ],
)
def test_wrong_files_are_one_line_and_status_2(given, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["evaluate", "--compare", *given]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
