"""Facts about files that are not what they seem: every reader says what they are, in one line."""

import bz2
import gzip
import io
import json
import lzma
import pickle
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import save

from ddray.config.loading import load_config
from ddray.config.sampling import SampleConfig
from ddray.errors import DDRayError
from ddray.file_kind import json_value, kind_of
from ddray.metrics.frechet import FeatureStatistics, FeatureSums
from ddray.serving.api_keys import read_keys
from ddray.sets.captions import captions_name, read_captions
from ddray.sets.images.image_set import ImageSet
from ddray.sets.inspection import describe, verify
from ddray.sets.sharded_set import MANIFEST, manifest_kind
from ddray.sets.trajectories.trajectory_set import TrajectorySet
from ddray.storage import open_storage
from ddray.storage.caption_file import CaptionFile
from ddray.storage.checkpoint import load_folder, read_weights, save_folder
from ddray.storage.run_folder import CONFIG_FILE, SUMMARY_FILE, read_lines, read_summary
from tests.core.sets.images.test_image_set import PLAN as IMAGE_PLAN
from tests.core.sets.trajectories.test_trajectory_set import plan_of

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"a" * 64 + b"\nsize 9\n"
PAGE = b"<!DOCTYPE html>\n<html><head><title>Sign in</title></head><body>Log in</body></html>\n"
WEIGHTS = {"weight": torch.ones(2, 3), "bias": torch.zeros(2)}


def _zip(**files: str) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return stream.getvalue()


def _made(write: Callable[[Any], object]) -> bytes:
    stream = io.BytesIO()
    write(stream)
    return stream.getvalue()


def _tar() -> bytes:
    """With a link to nothing, as an archive of somebody's folder may have."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("0.png"))
        link = tarfile.TarInfo("0.cls")
        link.type, link.linkname = tarfile.SYMTYPE, "nowhere"
        archive.addfile(link)
    return stream.getvalue()


def _script() -> bytes:
    module = torch.jit.trace(torch.nn.Linear(1, 1), torch.zeros(1, 1))
    return _made(lambda stream: torch.jit.save(module, stream))


def _table(**columns: Any) -> bytes:
    return _made(lambda stream: pq.write_table(pa.table(columns), stream))


def _invalid_text() -> pa.Array:
    """A column of strings whose second one is no UTF-8."""
    return pa.array([b"a cat", b"a \xed\xa0\xbd dog"], pa.binary()).view(pa.string())


# What the file is: its bytes, and what the reader of weights says of it.
FOREIGN: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "empty"),
    "zeros": (bytes(5000), "zero bytes"),
    "lfs pointer": (POINTER, "a git-lfs pointer; run `git lfs pull`"),
    "annex pointer": (b"/annex/objects/SHA256E-s9--aa.pt\n", "a git-annex pointer"),
    "dvc pointer": (b"outs:\n- md5: aa\n  size: 9\n  path: a.pt\n", "a DVC pointer"),
    "html": (PAGE, "an HTML page"),
    "html with mark": (b"\xef\xbb\xbf<html lang='en'>", "an HTML page"),
    "xml": (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "AccessDenied"),
    "json error": (b'{"error": "Invalid username or password."}', "JSON text"),
    "json list": (b"[1, 2]", "JSON text"),
    "json number": (b"7", "text"),
    "nested json": (b"[" * 200_000, "JSON text"),
    "nested yaml": (b"{a: " * 500, "JSON text"),
    "endless yaml": (b"a: &a {b: *a}\n", "text"),
    "date that is none": (b"count: 2026-99-99\n", "text"),
    "tabs": (b"a:\n\tb: 1\n", "text"),
    "text": (b"Not Found", "text (Not Found)"),
    "latin text": ("Schlüssel, Größe\n".encode("latin-1"), "damaged"),
    "utf-16": ('{"index": 0, "caption": "a"}\n'.encode("utf-16"), "text in UTF-16"),
    "utf-32": ("count: 3\n".encode("utf-32"), "text in UTF-32"),
    "gzip": (gzip.compress(b"weights"), "gzip data; unpack"),
    "bzip2": (bz2.compress(b"weights"), "bzip2 data; unpack"),
    "xz": (lzma.compress(b"weights"), "xz data; unpack"),
    "zstd": (pa.Codec("zstd").compress(b"weights", asbytes=True), "zstd data; unpack"),
    "docx": (_zip(**{"[Content_Types].xml": "<x/>"}), "Microsoft Office"),
    "keras": (_zip(**{"metadata.json": "{}", "model.weights.h5": "x"}), "a model of Keras"),
    "other zip": (_zip(**{"readme.txt": "hello"}), "a zip archive of something else"),
    "cut zip": (_zip(**{"readme.txt": "hello" * 99})[:300], "end is missing"),
    "torchscript": (_script(), "a TorchScript archive"),
    "torch": (_made(lambda s: torch.save([1, 2], s)), "no state dict"),
    "pickle": (pickle.dumps({"a": 1}, 4), "a pickle of Python"),
    "pickle of text": (pickle.dumps({"a": 1}, 0), "a pickle of Python"),
    "pickle of code": (pickle.dumps(bz2.compress, 0), "it names bz2.compress"),
    "npy": (_made(lambda s: np.save(s, np.ones(3))), "a NumPy array"),
    "npz": (_made(lambda s: np.savez(s, mu=np.ones(2), sigma=np.ones(3))), "a NumPy archive"),
    "npz of objects": (
        _made(lambda s: np.savez(s, mu=np.array([{}], object), sigma=np.ones((1, 1)))),
        "a NumPy archive",
    ),
    "npz of texts": (
        _made(lambda s: np.savez(s, mu=np.array(["a"]), sigma=np.array([["b"]]))),
        "a NumPy archive",
    ),
    "npz without numbers": (
        _made(lambda s: np.savez(s, mu=np.array([np.nan]), sigma=np.ones((1, 1)))),
        "a NumPy archive",
    ),
    "hdf5": (b"\x89HDF\r\n\x1a\n" + bytes(50), "an HDF5 file"),
    "gguf": (b"GGUF\3\0\0\0" + bytes(50), "a GGUF file"),
    "sqlite": (b"SQLite format 3\0" + bytes(84), "an SQLite database"),
    "png": (_made(lambda s: Image.new("L", (8, 8)).save(s, "PNG")), "a PNG image"),
    "jpeg": (_made(lambda s: Image.new("L", (8, 8)).save(s, "JPEG")), "a JPEG image"),
    "pdf": (b"%PDF-1.7\n", "a PDF document"),
    "elf": (b"\x7fELF\2\1\1" + bytes(50), "a program"),
    "mac": (b"\0\x05\x16\x07" + bytes(50), "macOS"),
    "tar": (_tar(), "a tar archive"),
    "parquet": (_table(index=[0, 1], caption=[1, 2], image=[0.5, 1.5]), "a Parquet file"),
    "parquet of features": (_table(caption=["a"], features=[1.0]), "a Parquet file"),
    "parquet of bytes": (_table(caption=[b"a"], index=[0]), "a Parquet file"),
    "parquet without utf-8": (_table(index=[0, 1], caption=_invalid_text()), "a Parquet file"),
    "cut parquet": (_table(index=[0, 1])[:-9], "a Parquet file"),
    "safetensors": (save({"x": torch.ones(1)}), ""),
    "cut safetensors": (save(WEIGHTS)[:40], ""),
    "cut header": (save(WEIGHTS)[:12], ""),
    "random": (np.random.default_rng(0).bytes(3000), ""),
}


def _read_keys(path: Path) -> object:
    return read_keys(str(path))


def _as(name: str, read: Callable[[Path], object]) -> Callable[[Path, bytes], object]:
    """A reader of one file."""

    def write_and_read(folder: Path, data: bytes) -> object:
        (folder / name).write_bytes(data)
        return read(folder / name)

    return write_and_read


def _model_with(name: str) -> Callable[[Path, bytes], object]:
    def read(folder: Path, data: bytes) -> object:
        if not (folder / CONFIG_FILE).exists():
            save_folder(folder, {"family": "llamagen"}, model=WEIGHTS, tokenizer=WEIGHTS)
        (folder / name).write_bytes(data)
        return load_folder(folder)

    return read


def _shard_of(make: Callable[[Path], Any]) -> Callable[[Path, bytes], object]:
    """Reads a shard, looks at the set and verifies it."""

    def read(folder: Path, data: bytes) -> object:
        rows = make(folder)
        shard = folder / rows.shard_name(0)
        shard.parent.mkdir(exist_ok=True)
        shard.write_bytes(data)
        described = describe(rows.uri)
        problems = verify(rows.uri)
        assert len(problems) == rows.plan.num_shards, (described, problems)
        assert not [line for line in problems if "\n" in line]
        return rows.read_shard(0)

    return read


def _images(encoding: str) -> Callable[[Path], Any]:
    plan = replace(IMAGE_PLAN, encoding=encoding)
    return lambda folder: _set_of(ImageSet, folder, plan)


def _set_of(kind: Any, folder: Path, plan: Any) -> Any:
    if not (folder / MANIFEST).exists():
        return kind.create(str(folder), plan)
    return kind.open(str(folder))


def _captions(folder: Path, data: bytes) -> object:
    path = folder / captions_name(0)
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)
    return read_captions(open_storage(str(folder)), 0)


def _caption_file(path: Path) -> object:
    return CaptionFile(str(path), length=4, width=8).check(2)


def _manifest(folder: Path, data: bytes) -> object:
    (folder / MANIFEST).write_bytes(data)
    assert isinstance(manifest_kind(str(folder)), str)
    return TrajectorySet.open(str(folder))


READERS: dict[str, Callable[[Path, bytes], object]] = {
    "weights.pt": _as("weights.pt", read_weights),
    "weights.safetensors": _as("weights.safetensors", read_weights),
    "tokenizer.pth": _as("tokenizer.pth", lambda path: read_weights(path, tokenizer=True)),
    "index": _as("model.safetensors.index.json", read_weights),
    "config.json": _model_with(CONFIG_FILE),
    "model.safetensors": _model_with("model.safetensors"),
    "tokenizer.safetensors": _model_with("tokenizer.safetensors"),
    "captions.parquet": _as("captions.parquet", _caption_file),
    "captions.jsonl": _as("captions.jsonl", _caption_file),
    "captions of a shard": _captions,
    "manifest": _manifest,
    "manifest of images": _as(MANIFEST, lambda path: ImageSet.open(str(path.parent))),
    "shard": _shard_of(lambda folder: _set_of(TrajectorySet, folder, plan_of())),
    "shard of images": _shard_of(_images("parquet")),
    "tar shard": _shard_of(_images("webdataset")),
    "listed shard": _shard_of(_images("images")),
    "statistics": _as("s.npz", lambda path: FeatureStatistics.load(str(path))),
    "sums": lambda _, data: FeatureSums.from_bytes(data, "a"),
    "job.yaml": _as("job.yaml", lambda path: load_config(SampleConfig, file=path)),
    "summary": _as(SUMMARY_FILE, lambda path: read_summary(open_storage(str(path.parent)))),
    "log": _as("log.jsonl", lambda path: read_lines(open_storage(str(path.parent)), "log.jsonl")),
    "keys": _as("keys.txt", _read_keys),
}

# What a reader may take, as it is a file of its kind all the same.
TAKEN = {
    ("weights.pt", "safetensors"),
    ("tokenizer.pth", "safetensors"),
    ("weights.safetensors", "safetensors"),
    ("model.safetensors", "safetensors"),
    ("tokenizer.safetensors", "safetensors"),
    ("job.yaml", "empty"),
    ("summary", "json error"),
    ("summary", "utf-16"),
    ("keys", "nested json"),
    ("log", "empty"),
    ("log", "json error"),
}


def _cases() -> Iterator[Any]:
    for reader in READERS:
        yield pytest.param(reader, id=reader)


@pytest.mark.slow
@pytest.mark.parametrize("reader", _cases())
def test_a_foreign_file_is_refused_in_one_line_by_every_reader(reader: str, tmp_path: Path) -> None:
    for name, (data, said) in FOREIGN.items():
        if (reader, name) in TAKEN:
            READERS[reader](tmp_path, data)
            continue
        try:
            READERS[reader](tmp_path, data)
        except DDRayError as error:
            message = str(error)
        else:
            pytest.fail(f"{name} was taken")
        assert "\n" not in message, (name, message)
        assert len(message) < 700, (name, message)
        if reader == "weights.pt":
            assert said in message, (name, message)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name", ["lfs pointer", "html", "gzip"])
def test_what_has_a_name_is_called_by_it(reader: str, name: str, tmp_path: Path) -> None:
    if reader == "keys":
        pytest.skip("keys are not repeated, whatever they are")
    kind = kind_of(FOREIGN[name][0])
    assert kind is not None
    with pytest.raises(DDRayError) as refusal:
        READERS[reader](tmp_path, FOREIGN[name][0])
    assert kind.name in str(refusal.value)


def test_what_is_known_by_nothing_has_no_kind(tmp_path: Path) -> None:
    assert kind_of(b"\xde\xad\xbe\xef\x01") is None
    assert kind_of(tmp_path / "nothing") is None
    assert kind_of(tmp_path) is None


def test_json_that_is_nested_too_deep_is_no_json() -> None:
    with pytest.raises(ValueError, match="nested too deep"):
        json_value("[" * 200_000)
    assert json_value(json.dumps({"a": [1]})) == {"a": [1]}
