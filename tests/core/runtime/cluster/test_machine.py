"""What machines say of themselves, and what of it would spoil a job."""

import dataclasses
import os
import sys
from pathlib import Path

import psutil
import pytest

import ddray
from ddray.runtime.cluster.machine import (
    Machine,
    Probe,
    differences,
    examine,
    mixture,
    shortcomings,
)
from ddray.storage.checkpoint import save_folder
from tests.core.tiny import teacher_config, teacher_state, tokenizer_state

SOUND = Machine(
    name="one",
    versions={"python": "3.11.7", "ddray": "0.1.0", "ray": "2.60.0", "torch": "2.13.0"},
    ddray_path="/opt/ddray",
    ddray_code="abc",
    memory_bytes=10**10,
    shm_bytes=10**9,
    free_disk=0.5,
    clock_s=1000.0,
    gpus=[("H100", 80 * 10**9), ("H100", 80 * 10**9)],
    usable_gpus=2,
    cpus=4,
)


def test_this_machine_says_what_it_is() -> None:
    here = examine("/tmp", ["digits-llamagen"])
    assert here.versions["ddray"] == ddray.__version__
    assert here.versions["python"] == "{}.{}.{}".format(*sys.version_info[:3])
    assert here.ddray_path == str(Path(ddray.__file__).parent)
    assert 0 < here.memory_bytes <= psutil.virtual_memory().total
    assert 1 <= here.cpus <= (os.cpu_count() or 1)
    assert 0 <= here.free_disk <= 1
    assert here.troubles == []
    assert differences(here, examine("/tmp")) == []


@pytest.mark.parametrize(
    ("name", "version", "message"),
    [
        ("python", "3.11.9", None),  # Ray asks for the same minor version alone
        ("python", "3.12.1", "python is 3.12.1 there and 3.11.7 here"),
        ("ray", "2.59.0", "ray is 2.59.0 there and 2.60.0 here; use one image for all"),
        ("torch", "2.13.0+cpu", None),  # of the same release: heads without GPUs are lighter so
        ("torch", "2.12.0", "torch is 2.12.0 there"),
        ("ddray", "0.0.9", "ddray is 0.0.9 there and 0.1.0 here"),
    ],
)
def test_machines_must_agree_on_versions(name: str, version: str, message: str | None) -> None:
    other = dataclasses.replace(SOUND, versions={**SOUND.versions, name: version})
    found = differences(SOUND, other)
    if message is None:
        assert found == []
    else:
        assert len(found) == 1
        assert message in found[0]


def test_machines_must_agree_on_the_files_of_one_version() -> None:
    (found,) = differences(SOUND, dataclasses.replace(SOUND, ddray_code="xyz", ddray_path="/srv"))
    assert "ddray 0.1.0 differs in its files: /srv there, /opt/ddray here" in found


@pytest.mark.parametrize(
    ("change", "gpus", "skew_s", "error", "warning"),
    [
        ({}, 2, 0.5, None, None),
        ({"gpus": [], "usable_gpus": None}, 0, 0, None, None),
        ({"gpus": [], "usable_gpus": None}, 1, 0, "Ray counts 1 GPUs and the driver lists 0", None),
        ({"usable_gpus": 0}, 2, 0, "PyTorch 2.13.0 can use 0 of 2 GPUs", None),
        ({"shm_bytes": 10**8}, 2, 0, None, "/dev/shm has 0.1 GB and Ray's objects may take 0.5"),
        ({"cpus": 2}, 2, 0, None, "Ray counts 12 CPUs and 2 can be used"),
        ({"free_disk": 0.02}, 2, 0, None, "the disk of Ray's folder is 98% full"),
        ({}, 2, -70, None, "its clock differs by -70 s"),
        ({"troubles": ["cannot read x: gone"]}, 2, 0, "cannot read x: gone", None),
    ],
)
def test_what_is_wrong_is_named_and_told_apart_from_what_is_slow(
    change: dict[str, object], gpus: float, skew_s: float, error: str | None, warning: str | None
) -> None:
    machine = dataclasses.replace(SOUND, **change)
    errors, warnings = shortcomings(
        machine, cpus=12, gpus=gpus, object_store_bytes=5 * 10**8, skew_s=skew_s
    )
    for found, wanted in ((errors, error), (warnings, warning)):
        assert len(found) == (wanted is not None)
        assert wanted is None or wanted in found[0]


def test_models_that_cannot_be_read_or_are_too_large_are_troubles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "teacher"
    sizes = {"dim": 32, "n_head": 4, "vocab_size": 32, "num_classes": 10, "block_size": 16}
    save_folder(
        folder,
        teacher_config({"ch_mult": [1, 2], "z_channels": 32}, **sizes),
        model=teacher_state(0, **sizes),
        tokenizer=tokenizer_state(ch_mult=[1, 2], z_channels=32, codebook_size=32),
    )
    assert examine("/tmp", [str(folder)]).troubles == []
    missing, sizes_alone = examine("/tmp", [str(tmp_path / "no"), "var-d16"]).troubles
    assert f"cannot read {tmp_path / 'no'}: no model" in missing
    assert "var-d16 is a set of sizes without weights" in sizes_alone
    monkeypatch.setattr("ddray.runtime.cluster.machine.usable_memory", lambda: 10_000)
    (large,) = examine("/tmp", [str(folder)]).troubles
    assert "GB of weights and there are 0.0 GB of memory" in large


def test_a_folder_that_is_another_one_there_is_a_trouble(tmp_path: Path) -> None:
    (tmp_path / "probe").write_bytes(b"here")
    assert examine("/tmp", (), [Probe(str(tmp_path), "probe")]).troubles == []
    (found,) = examine("/tmp", (), [Probe(str(tmp_path), "other")]).troubles
    assert f"{tmp_path} is another folder there than on the driver's node" in found
    (found,) = examine("/tmp", (), [Probe("s4://bucket/x", "probe")]).troubles
    assert "cannot use s4://bucket/x: uri 's4://bucket/x' has the scheme 's4'" in found


def test_gpus_of_several_models_are_told() -> None:
    """A spot pool may mix them, and the bits of a set would depend on who made which row."""
    none = dataclasses.replace(SOUND, gpus=[])
    assert mixture([SOUND, none, SOUND]) is None
    other = dataclasses.replace(SOUND, gpus=[("L40S", 48 * 10**9)])
    told = mixture([SOUND, other])
    assert told is not None and told.startswith("GPUs of 2 models (H100, L40S): rows of one set")
