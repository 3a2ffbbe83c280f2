"""Facts about help and flags: every key has one, under a heading, and the examples run."""

import re
import shlex
from functools import reduce

import pytest
from pydantic.fields import FieldInfo

from ddray.cli import _JOBS, _config_class, _job_parser, main
from ddray.config.base import Job
from ddray.config.distillation import DistillConfig
from ddray.config.flags import _leaves, choices_of, given_values
from ddray.config.generation import GenerateConfig


def leaves(kind: type[Job], prefix: str = "") -> list[str]:
    """Keys of a config, nested ones by their path; not those of a verb inside it."""
    found = []
    for name, field in kind.model_fields.items():
        if not isinstance(field.default, Job):
            found.append(f"{prefix}{name}")
        elif not field.default.EXAMPLE:
            found += leaves(type(field.default), f"{prefix}{name}.")
    return found


def fields_of(kind: type[Job]) -> list[tuple[str, FieldInfo]]:
    """Path and field of every key that has a flag."""
    return [leaf for name, field in kind.model_fields.items() for leaf in _leaves(name, field)]


@pytest.mark.parametrize("verb", _JOBS)
def test_every_key_has_a_flag_under_a_heading_of_its_own_kind(verb):
    kind = _config_class(verb)
    text = _job_parser(verb).format_help()
    flags = re.findall(r"^  --([a-z0-9._-]+)", text, re.MULTILINE)
    for key in leaves(kind):
        assert flags.count(key.replace("_", "-")) == 1, key
    headings = re.findall(r"^([A-Z][^:\n]*):$", text, re.MULTILINE)
    assert headings == list(kind.HEADINGS)
    sections = re.split(r"^[A-Z][^:\n]*:$", text, flags=re.MULTILINE)[1:]
    assert all(re.search(r"^  --", section, re.MULTILINE) for section in sections)


@pytest.mark.parametrize("verb", _JOBS)
def test_the_example_of_a_verb_is_one_that_runs(verb, capsys):
    program, *arguments = shlex.split(_config_class(verb).EXAMPLE)
    assert (program, arguments[0]) == ("ddray", verb)
    assert main([*arguments, "--dry-run"]) == 0
    assert _config_class(verb).EXAMPLE in _job_parser(verb).format_help()
    capsys.readouterr()


@pytest.mark.parametrize("verb", _JOBS)
def test_every_key_says_what_it_is(verb):
    for name, field in _config_class(verb).model_fields.items():
        assert isinstance(field.default, Job) or field.description, name


@pytest.mark.parametrize("verb", _JOBS)
def test_every_choice_stands_in_the_help(verb, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    text = _job_parser(verb).format_help()
    for path, field in fields_of(_config_class(verb)):
        if choices := choices_of(field):
            flag, taken = f"--{path.replace('_', '-')}", f"{{{','.join(choices)}}}"
            assert f"{flag} {taken}" in text or f"{flag} [{taken}]" in text
            assert len(choices) > 1
    assert "--preset {default,tiny}" in text


def test_the_choices_of_a_key_are_those_that_it_takes():
    formats = choices_of(GenerateConfig.model_fields["format"])
    assert formats == ["parquet", "webdataset", "images", "flat", "npz", "coco", "geneval"]
    distance = dict(fields_of(DistillConfig))["perceptual.distance"]
    assert choices_of(distance) == ["off", "tokenizer", "lpips"]
    assert choices_of(GenerateConfig.model_fields["count"]) == []


@pytest.mark.parametrize("verb", _JOBS)
def test_every_switch_can_be_turned_on_and_off(verb, capsys):
    for path, field in fields_of(_config_class(verb)):
        if not (isinstance(field.default, bool) or field.annotation == bool | None):
            continue
        flag, keys = path.replace("_", "-"), path.split(".")
        for name, value in ((f"--{flag}", True), (f"--no-{flag}", False)):
            arguments = _job_parser(verb).parse_args([name])
            nested = reduce(lambda inner, key: {key: inner}, reversed(keys), value)
            assert given_values(arguments) == nested
        assert f"--{flag}, --no-{flag}" in _job_parser(verb).format_help()
    capsys.readouterr()


def test_a_switch_that_is_not_given_says_nothing():
    assert given_values(_job_parser("serve").parse_args([])) == {}


def test_flags_of_nested_keys_reach_them(capsys):
    assert main(["distill", "--score.weight", "0.5", "--perceptual.distance=off", "--dry-run"]) == 0
    assert "score:\n  weight: 0.5\n" in capsys.readouterr().out


@pytest.mark.parametrize("given", [["--score-weight", "1"], ["--score-weight=1"]])
def test_a_flag_of_before_is_answered_by_what_it_is_called_now(given, capsys):
    assert main(["distill", *given]) == 2
    error = capsys.readouterr().err
    assert error == "ddray: error: --score-weight is --score.weight now\n"
    assert len(DistillConfig.MOVED) == 11
