"""The project file, the pins, the Makefile and the version agree with each other."""

import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import ddray
from tests.paths import ROOT

TARGETS = {
    "setup", "quickstart", "test", "test-core", "test-ray", "test-smoke", "test-chaos", "test-gpu",
    "image", "lint", "format", "constraints", "teachers", "clean",
}  # fmt: skip
# In pieces, so that this file does not contain what it looks for.
INDEX_HOSTS = [
    "pypi" + ".org",
    "python" + "hosted.org",
    "download.py" + "torch.org",
    "pypi." + "nvidia",
]
INDEX_ADDRESS = re.compile(
    "|".join(map(re.escape, INDEX_HOSTS)) + r"|(https?|file)://\S*/" + r"simple\b"
)


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("#"))


def tracked_files() -> list[Path]:
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("not a git checkout")
    listing = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    return [ROOT / name for name in listing.split("\0") if name and (ROOT / name).is_file()]


def make(*args: str) -> subprocess.CompletedProcess[str]:
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    # `make test` leaves its own flags in the environment.
    env = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")}
    return subprocess.run(
        ["make", *args], cwd=ROOT, env=env, capture_output=True, text=True, timeout=30
    )


def test_pins_are_exact_sorted_and_canonical():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    assert all(line.startswith("#") for line in lines[:2])
    assert "make constraints" in lines[1]
    names = []
    for line in lines[2:]:
        assert re.fullmatch(r"[a-z0-9-]+==[0-9][0-9A-Za-z.+!]*", line), line
        names.append(line.split("==")[0])
    assert names == [canonicalize_name(name) for name in names]
    assert lines[2:] == sorted(set(lines[2:]))
    assert "ddray" not in names


def test_pins_satisfy_every_requirement():
    metadata = project()
    groups = [metadata["project"]["dependencies"], metadata["build-system"]["requires"]]
    groups += metadata["project"]["optional-dependencies"].values()
    requirements = [Requirement(text) for group in groups for text in group]
    assert len(requirements) > 15
    for requirement in requirements:
        name = canonicalize_name(requirement.name)
        if name == "ddray":  # an extra that includes another one
            assert requirement.extras <= metadata["project"]["optional-dependencies"].keys()
            continue
        assert name in pins(), f"{name} is not pinned: run `make setup` and `make constraints`"
        assert requirement.specifier.contains(pins()[name]), f"{requirement} but {pins()[name]}"


def test_every_file_of_the_package_is_installed_with_it():
    patterns = project()["tool"]["setuptools"]["package-data"]["ddray"]
    installed = {path for pattern in patterns for path in (ROOT / "ddray").glob(pattern)}
    files = {path for path in tracked_files() if path.is_relative_to(ROOT / "ddray")}
    assert {path for path in files if path.suffix != ".py"} <= installed


def test_make_help_lists_the_targets_and_they_exist():
    listed = re.findall(r"^ +make ([a-z-]+) +\S", make("help").stdout, flags=re.MULTILINE)
    assert set(listed) >= TARGETS
    dry_run = make("--dry-run", *listed)
    assert dry_run.returncode == 0, dry_run.stderr


def test_no_tracked_file_names_a_package_index():
    found = []
    for path in tracked_files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # weights, pictures, parquet
        if match := INDEX_ADDRESS.search(text):
            found.append(f"{path.relative_to(ROOT)}: {match.group()}")
    assert found == []


def test_the_version_lives_in_one_place():
    metadata = project()
    assert "version" not in metadata["project"]
    assert metadata["project"]["dynamic"] == ["version"]
    assert metadata["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "ddray.__version__"}
    source = (ROOT / "ddray" / "__init__.py").read_text()
    assert f'__version__ = "{ddray.__version__}"' in source  # a literal: read without importing
    assignment = re.compile(r"^__version__\s*(:\s*\w+\s*)?=", flags=re.MULTILINE)
    owners = [p for p in tracked_files() if p.suffix == ".py" and assignment.search(p.read_text())]
    assert owners == [ROOT / "ddray" / "__init__.py"]


def test_a_submitted_repository_holds_the_whole_package() -> None:
    files = [str(path.relative_to(ROOT)) for path in (ROOT / "ddray").rglob("*.py")]
    told = ["git", "-c", f"core.excludesFile={ROOT / '.rayignore'}", "check-ignore", "--no-index"]

    def ignored(*names: str) -> list[str]:
        done = subprocess.run([*told, *names], capture_output=True, text=True, cwd=ROOT)
        return done.stdout.splitlines()

    assert ignored("cluster/Dockerfile", "tests/conftest.py") != []
    assert ignored(*files) == []
