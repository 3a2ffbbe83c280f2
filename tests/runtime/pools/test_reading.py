"""The tools of docs/reading.md read what it says they read: its code blocks, run one by one."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ddray.report.image_file import decode_image
from ddray.sets.card import write_card
from tests.core.sets.images.test_image_set import pixels_of, write
from tests.paths import ROOT

pytestmark = pytest.mark.ray

PAGE = (ROOT / "docs" / "reading.md").read_text()
FORMATS = ("parquet", "webdataset", "images", "flat", "npz")
NAMES = tuple(f"digit {i}" for i in range(10))
# Classes in turn, in three shards.
COUNT = 24
LABELS = [i % 10 for i in range(COUNT)]
PIXELS = pixels_of(COUNT)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sets of the page, and the files that jobs leave beside them."""
    folder = tmp_path_factory.mktemp("reading")
    shape = {"num_classes": 10, "class_names": NAMES, "count": COUNT, "shard_rows": 10}
    for encoding in FORMATS:
        images = write(folder / "runs" / encoding, PIXELS, encoding=encoding, **shape)
        write_card(images.storage, images.plan, {})
        for name in ("config.json", "summary.json", "events.jsonl", "metrics.jsonl"):
            images.storage.write(name, b'{"time": 1.0}\n')
    reference = folder / "reference"
    reference.mkdir()
    for i, pixels in enumerate(pixels_of(COUNT, colour=True)):
        Image.fromarray(pixels).save(reference / f"{i}.png")
    return folder


@pytest.fixture
def run(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], dict[str, Any]]:
    """Run the blocks under a heading of the page, in the folder of the sets."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))

    def run(heading: str) -> dict[str, Any]:
        names: dict[str, Any] = {}
        for block in blocks()[heading]:
            exec(compile(block, f"docs/reading.md, {heading}", "exec"), names)
        return names

    return run


def blocks() -> dict[str, list[str]]:
    """Heading -> the Python under it."""
    sections = re.split(r"^## (.*)$", PAGE, flags=re.MULTILINE)[1:]
    pairs = zip(sections[::2], sections[1::2], strict=True)
    return {name: re.findall(r"```python\n(.*?)```", text, re.DOTALL) for name, text in pairs}


def same(images: Any, indices: Any = range(COUNT)) -> None:
    """The images of these indices, as files, pictures or pixels."""
    images = [decode_image(image) if isinstance(image, bytes) else image for image in images]
    assert len(images) == len([*indices])
    for index, image in zip(indices, images, strict=True):
        found = np.asarray(image)
        expected = PIXELS[index] if found.ndim == 2 else np.stack([PIXELS[index]] * 3, -1)
        np.testing.assert_array_equal(found, expected)


def duckdb(names: Mapping[str, Any]) -> None:
    assert names["classes"] == [(i, LABELS.count(i)) for i in range(10)]
    assert [row[:2] for row in names["rows"]] == [*enumerate(LABELS)]
    same(row[2] for row in names["rows"])


def polars(names: Mapping[str, Any]) -> None:
    files = names["files"]
    assert files["index"].to_list() == [3, 13, 23]
    same(files["bytes"].to_list(), (3, 13, 23))


def pandas(names: Mapping[str, Any]) -> None:
    assert names["frame"]["label"].tolist() == LABELS
    same(names["files"])


def pyarrow(names: Mapping[str, Any]) -> None:
    assert names["table"]["label"].to_pylist() == LABELS
    same(names["files"].to_pylist())


def hugging_face(names: Mapping[str, Any]) -> None:
    for rows in (names["images"], names["same"]):
        assert (rows["label"], rows.features["label"].names) == (LABELS, [*NAMES])
        same(rows["image"])
    assert names["name"] == "digit 3"
    assert names["tars"]["cls"][:] == LABELS
    same(names["tars"]["png"])
    by_class = sorted(range(COUNT), key=lambda i: (LABELS[i], i))
    assert names["folders"]["label"][:] == [LABELS[i] for i in by_class]
    same(names["folders"]["image"], by_class)


def webdataset(names: Mapping[str, Any]) -> None:
    pictures, labels = zip(*names["pairs"], strict=True)
    assert [*labels] == LABELS
    same(pictures)


def torchvision(names: Mapping[str, Any]) -> None:
    by_class = sorted(range(COUNT), key=lambda i: (LABELS[i], i))
    assert names["label"] == LABELS[by_class[3]] == 1
    assert [label for _, label in names["folder"]] == [LABELS[i] for i in by_class]
    same((image for image, _ in names["folder"]), by_class)


def ray_data(names: Mapping[str, Any]) -> None:
    rows = sorted(names["rows"].take_all(), key=lambda row: row["index"])
    assert [row["label"] for row in rows] == LABELS
    same(row["image"]["bytes"] for row in rows)
    pictures = sorted(names["pictures"].take_all(), key=lambda row: row["path"])
    same(row["image"] for row in pictures)


def adm(names: Mapping[str, Any]) -> None:
    assert names["samples"].dtype == np.uint8
    same(names["samples"])


CHECKS = {
    "DuckDB": duckdb,
    "Polars": polars,
    "pandas": pandas,
    "pyarrow": pyarrow,
    "Hugging Face datasets": hugging_face,
    "WebDataset": webdataset,
    "torchvision": torchvision,
    "NumPy, and the evaluator of guided diffusion (ADM)": adm,
}


@pytest.mark.parametrize("heading", CHECKS)
def test_a_tool_reads_what_the_page_says(heading: str, run: Callable[[str], Any]) -> None:
    CHECKS[heading](run(heading))


def test_ray_data_reads_what_the_page_says(ray_local: None, run: Callable[[str], Any]) -> None:
    ray_data(run("Ray Data"))


@pytest.mark.chaos
def test_pytorch_fid_finds_every_image(
    run: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from pytorch_fid import inception

    # Its weights cannot be had here: a network of the same shape, untrained.
    monkeypatch.setattr(
        inception,
        "fid_inception_v3",
        lambda: inception._inception_v3(num_classes=1008, aux_logits=False, weights=None),
    )
    assert run("pytorch-fid")["fid"] > 0


@pytest.mark.chaos
def test_torch_fidelity_finds_every_image(
    run: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    extractor = pytest.importorskip(
        "torch_fidelity.feature_extractor_inceptionv3",
        reason="torch-fidelity is no part of the set-up: it installs a package called tests",
    )
    monkeypatch.setattr(extractor, "load_state_dict_from_url", lambda *_, **__: {})
    network = extractor.FeatureExtractorInceptionV3
    monkeypatch.setattr(network, "load_state_dict", lambda *_: None)
    assert run("torch-fidelity")["scores"]["inception_score_mean"] >= 1


def test_every_block_of_the_page_is_run() -> None:
    found = {heading for heading, python in blocks().items() if python}
    assert found == {*CHECKS, "Ray Data", "pytorch-fid", "torch-fidelity"}
    assert all(len(python) == 1 for python in blocks().values())
