"""Facts about imports: they run one way, `import ddray` is instant, numerics know no Ray."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import ddray
from tests.paths import ROOT
from tests.patience import PATIENCE_S

PACKAGE = Path(ddray.__file__).parent
# From the roof down: a room imports rooms on lower floors, and none on its own or above.
FLOORS = [
    ("cli",),
    ("runtime",),
    ("runtime.pools",),
    ("runtime.training", "runtime.serving"),
    ("runtime.cluster",),
    ("evaluation",),
    ("distillation", "serving", "cost"),
    ("sources",),
    ("sets.inspection",),
    ("sets.trajectories", "sets.images"),
    ("sets",),
    ("metrics", "models"),
    ("method", "text"),
    ("config", "storage", "report"),
    ("file_kind", "locations"),
    ("errors", "progress", "prefetch"),
]
ROOMS = [room for rooms in FLOORS for room in rooms]
HEAVY = ("torch", "ray", "deepspeed", "pyarrow", "numpy")

LIGHT_IMPORT = f"""
import sys
import ddray
assert "transport" in dir(ddray) and ddray.__version__
loaded = [name for name in {HEAVY!r} if name in sys.modules]
assert not loaded, loaded
"""

# Runs where none of the blocked packages is installed, as far as Python can tell.
TOY_RUN = """
import importlib.util, pathlib, pkgutil, sys

BLOCKED = ("ray", "deepspeed", "mlxtend")

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocker())

import ddray
# The compiler is a second of every worker's start.
import pytest

from ddray.models.families import empty_network, empty_tokenizer
ddray.load_teacher("digits-llamagen", device="cpu")
ddray.load_student("digits-llamagen-dd", device="cpu")
sizes = dict(depth=2, embed_dim=16, num_heads=2, patch_nums=(1, 2), tokenizer=dict(ch=32))
for family in ("var", "var-dd"):
    empty_network({"family": family, **sizes})
    empty_tokenizer({"family": family, **sizes})
assert not {"sympy", "torch._dynamo"} & set(sys.modules)

names = []
# triton comes with torch for CUDA only.
NOT_HERE = ("__main__",) + (() if importlib.util.find_spec("triton") else ("_triton",))
for module in pkgutil.walk_packages(ddray.__path__, "ddray.", onerror=lambda name: None):
    if not module.name.startswith("ddray.runtime") and not module.name.endswith(NOT_HERE):
        importlib.import_module(module.name)
        names.append(module.name)
WANTED = {"method.flow", "method.student", "metrics.digits", "models.llamagen_dd"}
assert {f"ddray.{name}" for name in WANTED} <= set(names)

import torch
torch.set_num_threads(1)
from ddray.distillation.losses import distillation_loss
from ddray.models.llamagen import LlamaGen, LlamaGenConfig
from ddray.models.llamagen_vq import LlamaGenVQ, LlamaGenVQConfig
from ddray.models.zoo import new_student
from ddray.method.student import Student

sizes = dict(dim=16, n_layer=1, n_head=2, vocab_size=8, num_classes=3, block_size=4, multiple_of=16)
vq = dict(codebook_size=8, codebook_embed_dim=4, z_channels=4, ch=32, ch_mult=(1, 1))
teacher = ddray.load_teacher(
    {"family": "llamagen", **sizes, "tokenizer": vq},
    checkpoint=LlamaGen(LlamaGenConfig(**sizes)).state_dict(),
    tokenizer=LlamaGenVQ(LlamaGenVQConfig(**vq)).state_dict(),
)
cond, index = torch.tensor([0, 1, 2, 1]), range(4)
tokens = teacher.trajectories(cond, index, seed=1, cfg=1.5)
network, config = new_student(teacher)
noise, t = ddray.noise(1, index, (4, 4)), torch.tensor([0, 0, 2, 2])
loss = distillation_loss(network, teacher.stages, teacher.codebook, noise, tokens, cond, t)
loss.total.backward()
with torch.no_grad():  # by hand: an optimizer would load torch's compiler, two seconds
    for weight in network.parameters():
        if weight.grad is not None:
            weight -= 1e-2 * weight.grad
student = Student(network, teacher.tokenizer, config, "toy")
images = student.decode(student.generate(cond, seed=1, schedule="0,2"))
assert images.shape == (4, 3, 4, 4) and images.isfinite().all()
assert not [name for name in sys.modules if name.partition(".")[0] in BLOCKED]

from ddray.errors import ConfigError
try:
    ddray.metrics.digits.load_digits()
except ConfigError as error:
    assert "install ddray[teachers]" in str(error)
else:
    raise AssertionError("the digits came from nowhere")
"""


def run(code):
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        cwd=PACKAGE.parent,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_importing_the_package_loads_nothing_heavy():
    run(LIGHT_IMPORT)


@pytest.mark.slow
def test_models_load_without_torchs_compiler_and_run_without_ray_deepspeed_and_mlxtend():
    run(TOY_RUN)


def imported_modules(path: Path) -> Iterator[str]:
    """Full names of all modules that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            module = node.module or ""
            folder = PACKAGE.parent / module.replace(".", "/")
            for alias in node.names:
                is_module = (folder / f"{alias.name}.py").exists() or (folder / alias.name).is_dir()
                yield f"{module}.{alias.name}" if is_module else module


def room_of(module: str) -> str | None:
    """The room of FLOORS that a module of ddray lies in; None for ddray/__init__.py."""
    name = module.partition(".")[2]
    inside = [room for room in ROOMS if name == room or name.startswith(f"{room}.")]
    return max(inside, key=len, default=None)


def module_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts).removesuffix(".__init__")


def test_only_the_runtime_imports_ray_and_deepspeed():
    files = [path for path in PACKAGE.rglob("*.py") if "runtime" not in path.parts]
    assert len(files) > 15
    heads = {path: {name.partition(".")[0] for name in imported_modules(path)} for path in files}
    assert not [path.name for path, found in heads.items() if {"ray", "deepspeed"} & found]


def test_imports_run_downwards_only():
    floor = {room: k for k, rooms in enumerate(FLOORS) for room in rooms}
    upwards = []
    for path in PACKAGE.rglob("*.py"):
        here = room_of(module_of(path))
        assert here or path == PACKAGE / "__init__.py", f"{path} lies on no floor"
        for module in imported_modules(path):
            there = room_of(module) if module.startswith("ddray.") else None
            if here and there and here != there and floor[there] <= floor[here]:
                upwards.append(f"{module_of(path)} imports {module}")
    assert not upwards


def test_every_room_of_the_list_is_there_and_none_is_too_large():
    for room in ROOMS:
        path = PACKAGE / room.replace(".", "/")
        assert path.is_dir() or path.with_suffix(".py").is_file(), room
    beside = [path for path in PACKAGE.iterdir() if path.is_file()]
    assert len(beside) <= 9
    for folder in {path.parent for path in PACKAGE.rglob("*.py")} - {PACKAGE}:
        assert len(list(folder.glob("*.py"))) <= 18, folder
        assert (folder / "__init__.py").read_text().startswith('"""'), folder


def test_the_drawing_of_the_house_is_that_of_the_list():
    page = (ROOT / "docs" / "architecture.md").read_text()
    drawing = page.split("```text\n")[1].split("```")[0]
    drawn = []
    for line in drawing.splitlines():
        rooms = re.findall(r"(?:^|\s\s)((?:\w+/)*\w*(?:\.py|/))(?=\s|$)", line)
        if rooms:
            drawn.append({room.removesuffix(".py").strip("/").replace("/", ".") for room in rooms})
    assert drawn == [set(rooms) for rooms in FLOORS]


def test_an_unknown_name_of_the_package_is_an_attribute_error():
    assert not hasattr(ddray, "transports")
    assert {"load_teacher", "load_student", "noise", "transport"} <= set(dir(ddray))
