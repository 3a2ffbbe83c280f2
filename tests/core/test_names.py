"""Every module, name and file of the repository that some text of it mentions is there."""

import ast
import re
import subprocess
from functools import cache
from pathlib import Path

import pytest

from tests.paths import ROOT

# Dotted words that begin like a module and are none: keys in files, a label's domain.
NO_MODULES = re.compile(
    r"ddray\.(io|plan_hash|shard|rows_sha256|seed|captions_sha256|label|format)\b(?!\.\w+\.py)"
)
# What this file gives as examples, and a history of names.
SKIPPED = {"tests/core/test_names.py", "CHANGELOG.md"}
FILES = re.compile(
    r"(?<![\w./-])((?:ddray|tests|benchmarks|jobs|docs|cluster)/[\w./-]+"
    r"\.(?:py|md|yaml|yml|json|css|html|jinja|png|xz))(?![\w/])"
)
# Of another repository: KubeRay's.
NOT_OURS = {"docs/reference/api.md"}


def texts() -> list[tuple[str, str]]:
    command = ["git", "ls-files", "-coz", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    found = []
    for name in listed.stdout.split("\0"):
        path = ROOT / name
        if not name or name in SKIPPED or not path.is_file() or path.suffix == ".safetensors":
            continue
        try:
            found.append((name, path.read_text("utf-8")))
        except UnicodeDecodeError:
            continue  # pictures, archives
    assert len(found) > 200
    return found


@cache
def names_in(path: Path) -> dict[str, set[str]]:
    """Top-level names of a module; of a class, what its body defines."""
    found: dict[str, set[str]] = {}
    body = ast.parse(path.read_text("utf-8")).body
    guarded = [inner for node in body if isinstance(node, ast.If) for inner in node.body]
    for node in (*body, *guarded):
        if isinstance(node, ast.ClassDef):
            found[node.name] = {getattr(inner, "name", "") for inner in node.body} | {
                target.id for inner in node.body for target in targets(inner)
            }
            found[node.name] |= {
                inner.attr
                for inner in ast.walk(node)
                if isinstance(inner, ast.Attribute)
                and isinstance(inner.value, ast.Name)
                and inner.value.id == "self"
            }
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            found.setdefault(node.name, set())
        elif isinstance(node, ast.ImportFrom | ast.Import):
            for alias in node.names:
                found.setdefault(alias.asname or alias.name, set())
        for target in targets(node):
            found.setdefault(target.id, set())
    return found


def targets(node: ast.AST) -> list[ast.Name]:
    if isinstance(node, ast.Assign):
        given = [inner for target in node.targets for inner in ast.walk(target)]
    elif isinstance(node, ast.AnnAssign):
        given = [node.target]
    else:
        return []
    return [target for target in given if isinstance(target, ast.Name)]


def missing_part(dotted: str) -> str | None:
    """The first part of a dotted name that is not there; None where all of it is."""
    parts = dotted.split(".")
    path = ROOT / parts[0]
    for k, part in enumerate(parts[1:], 1):
        if (path / part).is_dir():
            path /= part
            continue
        if (path / f"{part}.py").is_file():
            module, rest = path / f"{part}.py", parts[k + 1 :]
        else:
            module, rest = path / "__init__.py", parts[k:]
        if not rest:
            return None
        names = names_in(module)
        if rest[0] not in names and not (parts[0] == "ddray" and rest[0] in lazy_names(module)):
            return ".".join(parts[: parts.index(rest[0]) + 1])
        if len(rest) > 1 and names.get(rest[0]) and rest[1] not in names[rest[0]]:
            return dotted
        return None
    return None


@cache
def lazy_names(module: Path) -> set[str]:
    """What a package gives on demand: strings of its file."""
    tree = ast.parse(module.read_text("utf-8"))
    return {str(node.value) for node in ast.walk(tree) if isinstance(node, ast.Constant)}


def test_every_module_and_name_that_is_written_somewhere_exists():
    wrong = []
    for name, text in texts():
        for found in re.finditer(r"(?<![\w./@-])(?:ddray|tests)(?:\.[A-Za-z_]\w*)+", text):
            dotted = found[0].removesuffix(".py")
            if (
                dotted.endswith("_")
                or NO_MODULES.match(dotted)
                or "/" in text[found.end() : found.end() + 1]
            ):
                continue
            if missing := missing_part(dotted):
                wrong.append(f"{name}: {dotted} ({missing} is not there)")
    assert not wrong, "\n".join(wrong)


def test_every_name_that_is_imported_somewhere_exists():
    """In strings that are run elsewhere too, which no type checker reads."""
    wrong = []
    statement = re.compile(r"from ((?:ddray|tests)[\w.]*) import (\([^)]*\)|[\w, ]+)")
    for name, text in texts():
        for module, imported in statement.findall(text):
            for part in re.findall(r"\w+", re.sub(r"\bas \w+|#.*", "", imported)):
                if missing := missing_part(f"{module}.{part}"):
                    wrong.append(f"{name}: from {module} import {part} ({missing} is not there)")
    assert not wrong, "\n".join(wrong)


def test_every_file_that_is_written_somewhere_exists():
    wrong = [
        f"{name}: {path}"
        for name, text in texts()
        for path in FILES.findall(text)
        if path not in NOT_OURS and "NAME" not in path and not (ROOT / path).exists()
    ]
    assert not wrong, "\n".join(wrong)


def test_every_test_that_is_named_somewhere_exists():
    named = {
        (file, test)
        for name, text in texts()
        if name.endswith(".md")
        for file, test in re.findall(r"(tests/[\w/]+\.py)::(\w+)", text)
    }
    assert len(named) > 50
    wrong = [f"{file}::{t}" for file, t in named if f"def {t}(" not in (ROOT / file).read_text()]
    assert not wrong, "\n".join(sorted(wrong))


def test_functions_that_the_walks_name_are_where_they_say():
    page = (ROOT / "docs" / "architecture.md").read_text("utf-8")
    steps = re.findall(r"`([\w/]+\.py)` `([\w.]+)`", page)
    assert len(steps) >= 20
    for file, name in steps:
        names, (first, *rest) = names_in(ROOT / "ddray" / file), name.split(".")
        assert first in names, (file, name)
        assert set(rest) <= names[first], (file, name)


@pytest.mark.parametrize(
    ("dotted", "missing"),
    [
        ("ddray.method.flow.Transport", None),
        ("ddray.load_teacher", None),
        ("ddray.flow", "ddray.flow"),
        ("ddray.method.flow.Transporter", "ddray.method.flow.Transporter"),
        ("ddray.method.teacher.Teacher.samples", "ddray.method.teacher.Teacher.samples"),
    ],
)
def test_what_is_not_there_is_noticed(dotted, missing):
    assert missing_part(dotted) == missing


def test_no_text_that_is_run_or_typed_names_a_bucket_that_is_somebodys():
    # What the tests make for themselves, and how a URI looks, as the code's messages have it.
    shown = [(name, text) for name, text in texts() if not name.startswith(("tests/", "ddray/"))]
    named = {
        (name, found) for name, text in shown for found in re.findall(r"s3://(\w[\w.+-]*)", text)
    }
    # No bucket's name may hold a plus.
    assert {pair for pair in named if "+" not in pair[1]} == {("docs/storage.md", "bucket")}
