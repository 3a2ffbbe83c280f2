"""What stands in for what cannot be fetched here, so that all the rest can be tried.

An image with one of these is a trial and not for clusters: `build.py` says so where it takes one.
"""

from __future__ import annotations

import importlib.metadata
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from cluster.image.engines import Engine, ImageError, Order

BASE = "localhost/ddray-base:stand-in"
_SUITE = "bookworm"
# What Python links to, and what Docker's image of it has beside a minimal Debian.
_PACKAGES = (
    "ca-certificates,libbz2-1.0,libcrypt1,libexpat1,libffi8,liblzma5,libncursesw6,libnsl2,"
    "libreadline8,libsqlite3-0,libssl3,libuuid1,netbase,tzdata,zlib1g"
)
# What Docker's image does not have either.
_NOT_DEBIAN = (
    "usr/share/doc",
    "usr/share/man",
    "usr/share/locale",
    "var/cache/apt",
    "var/lib/apt/lists",
)
_NOT_PYTHON = ("__pycache__", "site-packages/*", "test", "tests", "idle_test", "*.a")
_PYTHON = (
    *("bin/python", "bin/python3", "bin/python3.11", "include/python3.11", "lib/python3.11"),
    "lib/libpython3*",
)
_CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")
_DOCKERFILE = f"""FROM scratch
ADD root.tar /
ENV PATH=/usr/local/bin:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin LANG=C.UTF-8
# Certificates are this machine's; pip and uv would take lists of their own.
ENV PIP_CERT={_CERTIFICATES} UV_SYSTEM_CERTS=true
LABEL org.opencontainers.image.title="stand-in of Docker's python image"
CMD ["python3"]
"""
# Rules of these two are registered as torchvision is imported, whether it has operators or not.
_NO_OPERATORS = """

# A stand-in of ddray's: none of the operators in C++ are here.
_library = torch.library.Library("torchvision", "DEF")
_library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
_library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""


def build_base(engine: Engine) -> str:
    """In place of Docker's image: Debian by debootstrap, with this machine's CPython.

    One that is there is taken, since a new one would have every layer above it built anew.

    Returns:
        The image's name.

    Raises:
        ImageError: If this machine cannot make one.
    """
    if engine.fetch(BASE):
        return BASE
    python = Path(sys.base_prefix)
    if shutil.which("debootstrap") is None:
        raise ImageError("a stand-in of the base image needs debootstrap: install it")
    if sys.version_info[:2] != (3, 11) or python == Path("/usr"):
        raise ImageError(
            "a stand-in of the base image needs CPython 3.11 in a folder of its own; here it is "
            f"{sys.version.split()[0]} in {python}"
        )
    with tempfile.TemporaryDirectory(prefix="ddray-base-") as name:
        folder, root = Path(name), Path(name) / "root"
        debian = (f"--include={_PACKAGES}", _SUITE, str(root))
        _run("debootstrap", "--variant=minbase", *debian)
        _lay_python(python, root)
        for path in _NOT_DEBIAN:
            shutil.rmtree(root / path)
            (root / path).mkdir()
        if _CERTIFICATES.exists():
            shutil.copyfile(_CERTIFICATES, root / _CERTIFICATES.relative_to("/"))
        _run("tar", "--create", f"--directory={root}", f"--file={folder}/root.tar", ".")
        shutil.rmtree(root)
        (folder / "Dockerfile").write_text(_DOCKERFILE)
        engine.build(Order(folder / "Dockerfile", folder, BASE))
    return BASE


def _lay_python(python: Path, root: Path) -> None:
    """As Docker's image has it, with pip and the setuptools that CPython brings."""
    archive = root / "python.tar"
    parts = [path.relative_to(python) for part in _PYTHON for path in python.glob(part)]
    less = [f"--exclude={pattern}" for pattern in _NOT_PYTHON]
    _run("tar", "--create", f"--directory={python}", f"--file={archive}", *less, *map(str, parts))
    _run("tar", "--extract", f"--directory={root}/usr/local", f"--file={archive}")
    archive.unlink()
    _run("chroot", str(root), "ldconfig")
    _run("chroot", str(root), "/usr/local/bin/python3", "-m", "ensurepip", "--default-pip")


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        told = (done.stderr or done.stdout).strip().splitlines()
        raise ImageError(f"{' '.join(command[:2])} failed: {told[-1] if told else 'no word'}")


def pack_torchvision(folder: Path) -> Path:
    """In place of torchvision's CPU build: what is installed here, without its operators.

    Those of the build for GPUs need libraries of CUDA. Networks and transforms are Python, and do.

    Returns:
        The wheel, of a local version that goes before the public one.
    """
    installed = importlib.metadata.distribution("torchvision")
    version = f"{installed.version.split('+')[0]}+stand.in"
    info = f"torchvision-{version}.dist-info"
    tag = "cp311-cp311-linux_x86_64"
    wheel = folder / f"torchvision-{version}-{tag}.whl"
    metadata = (installed.read_text("METADATA") or "").replace(
        f"Version: {installed.version}", f"Version: {version}", 1
    )
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        names = [f"{info}/METADATA", f"{info}/WHEEL"]
        archive.writestr(names[0], metadata)
        archive.writestr(
            names[1], "Wheel-Version: 1.0\nRoot-Is-Purelib: false\nTag: cp311-cp311-linux_x86_64\n"
        )
        for path in installed.files or ():
            if path.suffix != ".py":
                continue
            text = path.read_text()
            text += _NO_OPERATORS if path.name == "extension.py" else ""
            archive.writestr(str(path), text)
            names.append(str(path))
        record = "".join(f"{name},,\n" for name in [*names, f"{info}/RECORD"])
        archive.writestr(f"{info}/RECORD", record)
    return wheel
