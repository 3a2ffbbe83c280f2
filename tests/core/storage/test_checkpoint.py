"""Facts about weights on disk: published containers are read, damage and pickles are refused."""

import argparse
import contextlib
import json
import os
import pickle
import shutil
import subprocess
import zipfile
from collections import OrderedDict, defaultdict, deque
from datetime import datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from ddray.errors import CheckpointError
from ddray.storage.checkpoint import (
    CONFIG_FILE,
    MODEL_FILE,
    fingerprint,
    load_folder,
    load_into,
    read_weights,
    save_folder,
)

WEIGHTS = {"weight": torch.arange(6.0).reshape(2, 3), "bias": torch.tensor([0.5, -1.0])}
OTHER = {"weight": torch.zeros(2, 3), "bias": torch.zeros(2)}

CONTAINERS = {
    "bare": WEIGHTS,
    "model": {"model": WEIGHTS, "optimizer": {"step": 3}, "steps": 7},
    "ema": {"ema": WEIGHTS, "model": OTHER},
    "empty ema": {"ema": {}, "model": WEIGHTS},
    "no ema": {"ema": None, "model": WEIGHTS},
    "module": {"module": WEIGHTS},
    "state_dict": {"state_dict": WEIGHTS},
    "trainer ema": {"trainer": {"ema_parameters": WEIGHTS, "var_wo_ddp": OTHER}},
    "trainer": {
        "epoch": 1,
        "iter": 2,
        "trainer": {"var_wo_ddp": WEIGHTS, "config": {}},
        "args": {},
    },
}


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name


@pytest.mark.parametrize("name", CONTAINERS)
def test_every_published_container_is_read(tmp_path, name):
    torch.save(CONTAINERS[name], tmp_path / "weights.pt")
    assert_same(read_weights(tmp_path / "weights.pt"), WEIGHTS)
    assert_same(read_weights(str(tmp_path / "weights.pt")), WEIGHTS)
    assert_same(read_weights(CONTAINERS[name]), WEIGHTS)


def test_safetensors_are_read(tmp_path):
    save_file(WEIGHTS, tmp_path / "weights.safetensors")
    assert_same(read_weights(tmp_path / "weights.safetensors"), WEIGHTS)


@pytest.mark.parametrize(
    ("container", "message"),
    [
        ({}, "holds no state dict"),
        ({"ema": {}}, "holds more than weights: ema"),
        ({"other": WEIGHTS}, "holds more than weights: other"),
        ({**WEIGHTS, "lr": 0.1}, "holds more than weights: lr"),
        ({f"k{i}": i for i in range(23)}, "holds more than weights: k0, k1, .*, k19 and 3 more"),
    ],
)
def test_a_container_without_weights_is_refused(tmp_path, container, message):
    torch.save(container, tmp_path / "weights.pt")
    with pytest.raises(CheckpointError, match=rf"weights\.pt {message}"):
        read_weights(tmp_path / "weights.pt")
    with pytest.raises(CheckpointError, match=f"the given state dict {message}"):
        read_weights(container)


def test_the_file_format_before_pytorch_1_6_is_read(tmp_path):
    torch.save(WEIGHTS, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert not zipfile.is_zipfile(tmp_path / "old.pt")
    assert_same(read_weights(tmp_path / "old.pt"), WEIGHTS)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_flipped_bit_is_refused_or_harmless(tmp_path, zipped):
    path = tmp_path / "weights.pt"
    torch.save(WEIGHTS, path, _use_new_zipfile_serialization=zipped)
    data = path.read_bytes()
    for position in range(0, len(data), max(1, len(data) // 200)):
        flipped = bytearray(data)
        flipped[position] ^= 4
        path.write_bytes(flipped)
        with contextlib.suppress(CheckpointError):
            read_weights(path)


def test_a_list_of_tensors_is_refused(tmp_path):
    torch.save([torch.zeros(1)], tmp_path / "list.pt")
    with pytest.raises(CheckpointError, match=r"list\.pt holds no state dict"):
        read_weights(tmp_path / "list.pt")


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
@pytest.mark.parametrize("suffix", ["pt", "pth", "safetensors"])
def test_a_truncated_file_is_refused(tmp_path, suffix, share):
    whole, path = tmp_path / f"whole.{suffix}", tmp_path / f"cut.{suffix}"
    save_file(WEIGHTS, whole) if suffix == "safetensors" else torch.save(WEIGHTS, whole)
    data = whole.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(CheckpointError, match=rf"cut\.{suffix} is (damaged|truncated) or no "):
        read_weights(path)


def write_text(path):
    path.write_text("<html>404 Not Found</html>")


def write_pickle(path):
    path.write_bytes(pickle.dumps({"a": 1}))


def write_archive(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")


@pytest.mark.parametrize("write", [write_text, write_pickle, write_archive])
@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_a_foreign_file_is_refused(tmp_path, write, suffix):
    write(tmp_path / f"foreign.{suffix}")
    kind = "safetensors file" if suffix == "safetensors" else "PyTorch checkpoint"
    with pytest.raises(CheckpointError, match=rf"foreign\.{suffix} is .*no {kind}") as caught:
        read_weights(tmp_path / f"foreign.{suffix}")
    assert "\n" not in str(caught.value)


class Payload:
    """Pickles as a call of os.mkdir."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_pickled_code_is_refused_and_does_not_run(tmp_path):
    torch.save({"model": WEIGHTS, "args": Payload(tmp_path / "ran")}, tmp_path / "evil.pt")
    with pytest.raises(CheckpointError, match=r"evil\.pt is no .* would run code of its own"):
        read_weights(tmp_path / "evil.pt")
    assert not (tmp_path / "ran").exists()


HARMLESS = {
    "a number": np.float64(0.5),
    "a small number": np.int8(3),
    "a truth value": np.bool_(True),
    "a date": np.datetime64("2026-01-01"),
    "an array": np.arange(6, dtype=">f4").reshape(2, 3),
    "arguments": argparse.Namespace(lr=np.float32(1e-3), out=Path("runs/x")),
    "a size": torch.Size([1, 2]),
    "an ordered dictionary": OrderedDict(a=1),
    "a dictionary with a default": defaultdict(list, a=[1]),
    "a queue": deque([1, 2], maxlen=3),
    "a namespace": SimpleNamespace(a=1),
    "times": (datetime(2026, 1, 1), timedelta(1)),
    "a version": torch.__version__,
    "random numbers": np.random.RandomState(0).get_state(),
    "a dtype": (torch.float16, np.dtype("f4")),
}


@pytest.mark.parametrize("zipped", [True, False])
def test_values_beside_the_weights_are_harmless(tmp_path, zipped):
    path = tmp_path / "weights.pt"
    for name, value in HARMLESS.items():
        container = {"model": WEIGHTS, "beside": value}
        torch.save(container, path, _use_new_zipfile_serialization=zipped)
        try:
            assert_same(read_weights(path), WEIGHTS)
        except CheckpointError as error:
            pytest.fail(f"{name}: {error}")
    assert np.dtype("f4").isnative


def test_numbers_of_an_older_numpy_are_harmless(tmp_path):
    path = tmp_path / "weights.pt"
    container = {"model": WEIGHTS, "x": np.float64(1), "y": np.ones(3)}
    torch.save(container, path, _use_new_zipfile_serialization=False)
    data = path.read_bytes()
    assert b"numpy._core.multiarray" in data
    path.write_bytes(data.replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    assert_same(read_weights(path), WEIGHTS)


class Call:
    """Pickles as a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    ("value", "name"),
    [
        (Call(os.system, "true"), "posix.system"),
        (Call(eval, "1"), "eval"),
        (Call(__import__, "os"), "__import__"),
        (Call(shutil.rmtree, "nothing"), "shutil.rmtree"),
        (Call(getattr, "a", "upper"), "getattr"),
        (Call(subprocess.check_call, ["true"]), "subprocess.check_call"),
        (nn.Linear(1, 1), "torch.nn.modules.linear.Linear"),
        (np.array([{}], object), "numpy.dtype"),
    ],
)
def test_what_would_run_is_refused_by_its_name(tmp_path, zipped, value, name):
    path = tmp_path / "weights.pt"
    container = {"model": WEIGHTS, "beside": value}
    torch.save(container, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError) as refusal:
        read_weights(path)
    assert f"it names {name}, and would run code of its own" in str(refusal.value)
    assert "torch.save the state dict alone" in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_plain_pickle_and_another_protocol_are_told_what_to_do(tmp_path):
    path = tmp_path / "weights.pt"
    path.write_bytes(pickle.dumps(WEIGHTS))
    with pytest.raises(CheckpointError, match="it is a pickle of Python; save the weights by"):
        read_weights(path)
    torch.save(WEIGHTS, path, pickle_protocol=4)
    with pytest.raises(CheckpointError, match="save it again by torch.save.*pickle_protocol=2"):
        read_weights(path)


def test_safetensors_under_another_name_are_read(tmp_path):
    save_file(WEIGHTS, tmp_path / "weights.bin")
    assert_same(read_weights(tmp_path / "weights.bin"), WEIGHTS)


def test_a_missing_file_is_refused(tmp_path):
    for path in (tmp_path / "nowhere.pt", tmp_path):
        with pytest.raises(CheckpointError, match="does not exist or is no file"):
            read_weights(path)


def test_missing_unexpected_and_misshapen_weights_are_listed():
    state = {"weight": torch.zeros(3, 2), "extra": torch.zeros(1), "more": torch.zeros(1)}
    with pytest.raises(CheckpointError) as caught:
        load_into(nn.Linear(3, 2), state, "the file")
    assert str(caught.value) == (
        "the file does not fit the model: missing bias; unexpected extra, more; "
        "shapes weight is [3, 2] instead of [2, 3]"
    )


def test_statistics_may_be_there_or_not():
    for extra in ({}, {"used": torch.ones(4)}):
        load_into(nn.Linear(3, 2), {**WEIGHTS, **extra}, "the file", frozenset({"used"}))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_load_as_float32(dtype):
    with torch.device("meta"):
        module = nn.Linear(3, 2)
    load_into(module, {name: tensor.to(dtype) for name, tensor in WEIGHTS.items()}, "the file")
    assert_same(module.state_dict(), WEIGHTS)
    assert module.weight.dtype == torch.float32
    assert not module.training
    assert not module.weight.requires_grad


def test_a_folder_gives_back_what_was_saved(tmp_path):
    config = {"family": "llamagen", "dim": 16, "tokenizer": {"ch_mult": [1, 2]}, "name": "Größe"}
    model = {**WEIGHTS, "half": torch.tensor([1.5], dtype=torch.bfloat16), "ids": torch.arange(3)}
    model["strided"] = torch.arange(6.0).reshape(2, 3).T
    save_folder(tmp_path / "m", config, model=model, tokenizer=WEIGHTS)
    loaded, weights, tokenizer = load_folder(tmp_path / "m")
    assert loaded == config
    assert_same(weights, model)
    assert_same(tokenizer, WEIGHTS)
    assert {name: tensor.dtype for name, tensor in weights.items()} == {
        name: tensor.dtype for name, tensor in model.items()
    }
    assert not list((tmp_path / "m").glob("*.p*"))


def test_a_folder_may_have_no_tokenizer(tmp_path):
    save_folder(tmp_path, {"family": "llamagen"}, model=WEIGHTS)
    assert load_folder(tmp_path)[2] is None


def test_a_folder_that_is_not_whole_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=rf"is no model folder: it has no {CONFIG_FILE}"):
        load_folder(tmp_path)
    save_folder(tmp_path, {"family": "llamagen"}, model=WEIGHTS)
    (tmp_path / MODEL_FILE).unlink()
    with pytest.raises(CheckpointError, match=f"is incomplete: it has no {MODEL_FILE}"):
        load_folder(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "is not JSON"), ("[]", "names no model family"), ("{}", "names no model family")],
)
def test_a_config_that_says_nothing_is_refused(tmp_path, text, message):
    save_folder(tmp_path, {"family": "llamagen"}, model=WEIGHTS)
    (tmp_path / CONFIG_FILE).write_text(text)
    with pytest.raises(CheckpointError, match=message):
        load_folder(tmp_path)


def test_damaged_weights_in_a_folder_are_refused(tmp_path):
    save_folder(tmp_path, {"family": "llamagen"}, model=WEIGHTS)
    path = tmp_path / MODEL_FILE
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(CheckpointError, match="is truncated or no safetensors file"):
        load_folder(tmp_path)


def test_the_config_is_written_last_and_readable(tmp_path):
    save_folder(tmp_path, {"family": "llamagen", "dim": 16}, model=WEIGHTS)
    text = (tmp_path / CONFIG_FILE).read_text()
    assert json.loads(text) == {"family": "llamagen", "dim": 16}
    assert text.endswith("}\n")


def test_the_fingerprint_changes_with_one_weight():
    module = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2)).requires_grad_(False)
    before = fingerprint(module)
    assert len(before) == 64
    assert fingerprint(module) == before
    module[1].weight[0, 1] = torch.nextafter(module[1].weight[0, 1], torch.tensor(9.0))
    assert fingerprint(module) != before


def test_the_fingerprint_covers_names_and_dtypes_but_no_statistics():
    module = nn.Linear(3, 2)
    load_into(module, WEIGHTS, "x")
    plain = fingerprint(module)
    assert fingerprint(nn.Sequential(module)) != plain
    module.register_buffer("used", torch.zeros(5))
    assert fingerprint(module) != plain
    assert fingerprint(module, frozenset({"used"})) == plain
    assert fingerprint(nn.Linear(3, 2).to(torch.bfloat16)) != plain
