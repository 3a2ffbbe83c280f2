"""Layouts of benchmarks: COCO's captions beside flat images, GenEval's folder for each prompt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ddray.config.generation import GenerateConfig
from ddray.config.loading import load_config
from ddray.errors import ConfigError
from ddray.report.image_file import encode_png
from ddray.sets.captions import cut_captions, read_captions
from ddray.sets.images.finishing import finish
from ddray.sets.images.image_set import ImageSet
from ddray.sets.images.plan import ImagePlan
from ddray.sets.inspection import verified, verify
from ddray.storage.caption_file import CaptionFile
from tests.core.sets.images.test_image_set import images_like, pixels_of

RECORDS = [{"tag": "colors", "prompt": f"a cat, {i}\nof ö", "include": [i]} for i in range(6)]


def planned(encoding: str, count: int, **other: Any) -> ImagePlan:
    text = {"conditioning": "text", "num_classes": 0, "text_encoder": "t5"}
    return images_like(encoding=encoding, count=count, **text, **other)


def make(folder: Path, plan: ImagePlan) -> ImageSet:
    """Captions, shards that are missing, and what lies beside them, as a run does."""
    file = folder.parent / "prompts.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    each = plan.samples_per_prompt
    images = ImageSet.create(str(folder), plan)
    cut_captions(CaptionFile(str(file), length=4, width=8, each=each), images.storage, images.plan)
    if missing := images.missing():
        images.begin()
    pixels = pixels_of(12)
    for k in missing:
        rows = plan.shard_range(k)
        captions = np.array(read_captions(images.storage, k, len(rows)).captions, dtype=object)
        images.write_shard(k, captions, [encode_png(pixels[i]) for i in rows])
    finish(images, images.lacking())
    return images


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def test_coco_is_flat_images_and_their_captions_in_order(tmp_path: Path) -> None:
    images = make(tmp_path / "set", planned("coco", 6))
    names = sorted(file.name for file in (tmp_path / "set/images").iterdir())
    assert names == [f"{i:06d}.png" for i in range(6)]
    lines = (tmp_path / "set/captions.txt").read_text().splitlines()
    assert lines == [f"a cat, {i} of ö" for i in range(6)]
    results = [*map(json.loads, (tmp_path / "set/result.jsonl").read_text().splitlines())]
    assert results == [
        {"text": record["prompt"], "image_path": f"images/{i:06d}.png"}
        for i, record in enumerate(RECORDS)
    ]
    assert verify(images.uri) == []


def test_geneval_is_a_folder_for_each_prompt_with_its_own_record(tmp_path: Path) -> None:
    images = make(tmp_path / "set", planned("geneval", 8, samples_per_prompt=2))
    folder = tmp_path / "set/images"
    assert sorted(f.name for f in folder.iterdir()) == ["00000", "00001", "00002", "00003"]
    pixels = pixels_of(12)
    for prompt in range(4):
        (line,) = (folder / f"{prompt:05d}/metadata.jsonl").read_text().splitlines()
        assert json.loads(line) == RECORDS[prompt]
        samples = sorted((folder / f"{prompt:05d}/samples").iterdir())
        assert [sample.name for sample in samples] == ["0000.png", "0001.png"]
        for sample, file in enumerate(samples):
            assert file.read_bytes() == encode_png(pixels[2 * prompt + sample])
    assert verify(images.uri) == []
    rows = images.read_shard(0)
    assert rows.label.tolist() == [RECORDS[i // 2]["prompt"] for i in range(5)]


@pytest.mark.parametrize(
    ("encoding", "sizes", "beside"),
    [
        ("coco", (4, 6), ["captions.txt", "result.jsonl"]),
        ("geneval", (4, 8), ["images/00000/metadata.jsonl", "images/00003/metadata.jsonl"]),
    ],
)
def test_reruns_extensions_and_repairs_give_the_same_bytes(
    encoding: str, sizes: tuple[int, int], beside: list[str], tmp_path: Path
) -> None:
    each = {"samples_per_prompt": 2} if encoding == "geneval" else {}
    plan = planned(encoding, sizes[1], **each)
    whole = files_of(Path(make(tmp_path / "whole", plan).uri))
    images = make(tmp_path / "set", planned(encoding, sizes[0], **each))
    images = make(tmp_path / "set", plan)
    folder = tmp_path / "set"
    grown = files_of(folder)
    assert {**grown, "manifest.json": b""} == {**whole, "manifest.json": b""}
    for name in beside:
        (folder / name).unlink()
    (folder / "images/stray.png").write_bytes(b"")
    expected = [f"missing: {name}" for name in beside]
    assert verify(images.uri) == [*expected, "does not belong: images/stray.png"]
    (folder / "images/stray.png").unlink()
    finish(images, images.lacking())
    assert files_of(folder) == grown
    listed = json.loads((folder / images.shard_name(0)).read_text())["images"]
    (folder / listed[1]["file"]).unlink()
    assert verified(images).damaged == {0: f"{listed[1]['file']} is missing"}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"format": "geneval", "count": 10}, "makes 4 images of each prompt: count=10 must be"),
        ({"samples_per_prompt": 2}, "samples_per_prompt=2 is of format=geneval alone"),
        ({"format": "coco", "image_format": "webp"}, "format=coco is of PNG files, not of webp"),
    ],
)
def test_what_is_no_layout_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(GenerateConfig, flags=values)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoding": "coco"}, "encoding='coco' is of captions, but the student takes classes"),
        ({"samples_per_prompt": 2}, "samples_per_prompt=2 is of encoding='geneval' alone"),
        ({"samples_per_prompt": 0}, "samples_per_prompt=0 must be an integer of at least 1"),
    ],
)
def test_plans_refuse_the_same(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        images_like(**changes)
    with pytest.raises(ConfigError, match="count=7 must be a multiple of 2"):
        planned("geneval", 7, samples_per_prompt=2)
    assert GenerateConfig(format="geneval", count=8).images_per_prompt == 4
