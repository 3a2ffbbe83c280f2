"""What docs/captions.md says of files of captions: its commands, in a small form."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from ddray.cli import _parsed, _resolve
from ddray.sets.captions import ShardCaptions, caption_parquet
from ddray.sets.conditions import open_captions
from ddray.storage.caption_cleaning import clean_llamagen
from ddray.storage.caption_file import CaptionRow
from tests.core.tiny import tiny_teacher
from tests.paths import ROOT

PAGE = (ROOT / "docs" / "captions.md").read_text()
COMMANDS = re.findall(r"^    (ddray .*)$", PAGE, re.MULTILINE)
LENGTH, WIDTH = 5, 3


def laion(place: Path) -> list[str]:
    pd.DataFrame({"URL": ["x"] * 3, "TEXT": ["one", "two", "three"]}).to_parquet(place)
    return ["one", "two", "three"]


def img2dataset(place: Path) -> list[str]:
    for k in range(2):
        frame = {"caption": ["a", "b"], "key": ["0", "1"], "status": ["success", "failed"]}
        pd.DataFrame(frame).to_parquet(place.parent / f"{k:05d}.parquet")
        (place.parent / f"{k:05d}_stats.json").write_text("{}")
    return ["a", "a"]


def parti_prompts(place: Path) -> list[str]:
    place.write_text("Prompt\tCategory\tChallenge\na cat\tAnimals\tBasic\n")
    return ["a cat"]


def recaptioned(place: Path) -> list[str]:
    place.mkdir()
    for k in range(2):
        rows = [{"llava": f"<b>A Cat</b> IMG_{k}.jpg"}, {"llava": None}, {"llava": "two.png"}]
        (place / f"{k}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return ["a cat", "a cat"]


def llamagen(place: Path) -> list[str]:
    (place / "part-0").mkdir(parents=True)
    lines = [{"image_path": "x", "text": ["blip", f"llava {i}", "first"]} for i in range(3)]
    (place / "part-0.jsonl").write_text("\n".join(map(json.dumps, lines)))
    for i in range(3):
        np.save(place / "part-0" / f"{i}.npy", np.full((1, 2, WIDTH), i, np.float32))
    return ["llava 0", "llava 1", "llava 2"]


def texts_alone(place: Path) -> list[str]:
    pd.DataFrame({"index": [0, 1], "caption": ["a cat", "a roof"]}).to_parquet(place)
    return ["a cat", "a roof"]


def encoded(place: Path) -> list[str]:
    place.mkdir()
    for k in range(2):
        captions = ShardCaptions([f"cat {k}"], [np.full((1 + k, WIDTH), k, np.float16)])
        (place / f"shard-0000{k}.parquet").write_bytes(caption_parquet(k, captions))
    return ["cat 0", "cat 1"]


# What each command is given, by the end of its --captions.
MADE: dict[str, Callable[[Path], list[str]]] = {
    "part-00000.parquet": laion,
    "*.parquet": img2dataset,
    "PartiPrompts.tsv": parti_prompts,
    "recaptioned": recaptioned,
    "captions": llamagen,
    "captions.parquet": texts_alone,
    "shards": encoded,
}


def rows_of(command: str, folder: Path) -> tuple[list[str], list[CaptionRow]]:
    """The captions that a command ought to read, and the rows that it reads."""
    _, verb, *arguments = shlex.split(command)
    place = arguments.index("--captions") + 1
    name = arguments[place].rpartition("/")[2]
    expected = MADE[name](folder / name)
    arguments[place] = str(folder / name)
    config: Any = _resolve(verb, _parsed(verb, arguments))
    file = open_captions(config, tiny_teacher(cls_token_num=LENGTH, caption_dim=WIDTH))
    assert file is not None
    return expected, [*file.rows(len(expected))]


@pytest.mark.parametrize("command", COMMANDS, ids=MADE)
def test_a_command_of_the_page_reads_its_captions(command: str, tmp_path: Path) -> None:
    expected, rows = rows_of(command, tmp_path)
    assert [row.caption for row in rows] == expected
    if command.endswith("'text[1]' --count 1000000"):
        assert [float(np.mean(row.features_TD)) for row in rows] == [0, 1, 2]  # type: ignore[arg-type]


def test_every_kind_of_captions_of_the_page_has_a_command() -> None:
    assert len(COMMANDS) == len(MADE)
    assert all(any(name in command for command in COMMANDS) for name in MADE)


def test_the_table_of_cleaning_is_what_cleaning_does() -> None:
    table = re.findall(r"^\| `(.*)` \| `(.*)` \|$", PAGE.partition("## Cleaning")[2], re.MULTILINE)
    assert len(table) == 4
    for given, cleaned in table:
        assert clean_llamagen(given) == cleaned
