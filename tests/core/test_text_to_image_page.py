"""What docs/text-to-image.md says is typed: every command is one that ddray takes."""

import re
import shlex

import pytest

from ddray.cli import _parsed, _resolve
from tests.paths import ROOT

PAGE = (ROOT / "docs" / "text-to-image.md").read_text()
LINES = [
    line
    for block in re.findall(r"```console\n(.*?)```", PAGE, re.DOTALL)
    for line in block.replace("\\\n", " ").splitlines()
]
VERBS = [line for line in LINES if re.match(r"ddray (?!models|export)", line)]
SUBMITTED = [line.partition(" -- python ")[2] for line in LINES if line.startswith("ray job")]


def test_the_page_goes_from_captions_to_a_service():
    assert len(SUBMITTED) == 4
    verbs = [shlex.split(line)[1] for line in VERBS]
    assert verbs == ["serve", "sample", "distill", "generate", "serve", "quickstart"]


@pytest.mark.parametrize("line", VERBS)
def test_a_command_of_the_laptop_is_taken(line):
    _, verb, *arguments = shlex.split(line.partition("#")[0])
    config = _resolve(verb, _parsed(verb, arguments))
    assert "emoji-llamagen" in line or "runs/mine" in repr(config)


@pytest.mark.parametrize("line", SUBMITTED)
def test_a_job_of_the_cluster_has_its_script_and_config(line):
    script, *arguments = shlex.split(line)
    assert (ROOT / "jobs" / script).is_file()
    arguments = [
        str(ROOT / "jobs" / word) if word.startswith("configs/") else word for word in arguments
    ]
    verb = script.removesuffix(".py")
    assert "llamagen-t2i-xl-256" in repr(_resolve(verb, _parsed(verb, arguments)))
