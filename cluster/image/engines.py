"""What builds images and runs them: Docker, or buildah where no engine answers.

buildah runs commands in a chroot: no daemon, and none of a runtime's rights, which a machine that
is itself a container lacks. It makes no network there, so each container gets a namespace of one.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

# Of two containers with a cable between them, which nothing else can reach.
_NETWORK = "10.78.0"
_UNITS = {"B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9}


class ImageError(Exception):
    """What the reader of one line can mend."""


@dataclass(frozen=True)
class Container:
    """One that runs, with an address of its own.

    Attributes:
        address: its IPv4 address, which the others started with it reach.
        before: what stands before a command that is to run in it.
        last: what stands between flags and the command.
    """

    address: str
    before: tuple[str, ...]
    last: tuple[str, ...]

    def command(self, *argv: str, environment: Mapping[str, str] | None = None) -> list[str]:
        """What to type on this machine to run that in the container."""
        given = [f"--env={name}={value}" for name, value in (environment or {}).items()]
        return [*self.before, *given, *self.last, *argv]


@dataclass(frozen=True)
class Order:
    """An image to build.

    Attributes:
        dockerfile: what it is made by.
        folder: what that copies from.
        image: name of the result.
        arguments: values of its ARGs.
        contexts: folders that take the place of its stages, by name.
    """

    dockerfile: Path
    folder: Path
    image: str
    arguments: Mapping[str, str] = field(default_factory=dict)
    contexts: Mapping[str, Path] = field(default_factory=dict)

    @property
    def command(self) -> list[str]:
        """Flags and folder, which Docker and buildah take alike."""
        flags = ["--file", str(self.dockerfile), "--tag", self.image]
        for name, value in self.arguments.items():
            flags += ["--build-arg", f"{name}={value}"]
        for name, folder in self.contexts.items():
            flags += ["--build-context", f"{name}={folder}"]
        return [*flags, str(self.folder)]


class Engine(Protocol):
    """Builds, keeps and runs images."""

    name: str

    def fetch(self, image: str) -> bool:
        """Whether an image is here, or could be fetched."""

    def build(self, order: Order) -> None:
        """Build what is ordered; its output is shown."""

    def size(self, image: str) -> float:
        """Bytes of all layers, unpacked."""

    def containers(
        self, image: str, number: int
    ) -> contextlib.AbstractContextManager[list[Container]]:
        """One or two of an image that see each other; they end with the block."""


def find_engine(store: Path | None = None) -> Engine:
    """What is there: a Docker that answers, or buildah.

    Args:
        store: folder of buildah's images and containers; None = where buildah keeps them.

    Raises:
        ImageError: If there is neither.
    """
    if shutil.which("docker") and not _quiet("docker", "info").returncode:
        return Docker()
    if shutil.which("buildah") is None:
        raise ImageError("no Docker engine answers here, and there is no buildah: install either")
    if os.geteuid() or shutil.which("ip") is None:
        raise ImageError("buildah makes containers here as root, and with iproute2 (`ip`)")
    return Buildah(store)


def _quiet(*command: str, check: bool = False) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if check and done.returncode:
        raise ImageError(f"{' '.join(command)}: {(done.stderr or done.stdout).strip()}")
    return done


def _shown(*command: str) -> None:
    code = subprocess.run(command, check=False).returncode
    if code:
        raise ImageError(f"{' '.join(command[:2])} ended with exit status {code}, see above")


class Docker:
    """Docker, with BuildKit."""

    name = "docker"

    def fetch(self, image: str) -> bool:
        here = _quiet("docker", "image", "inspect", image).returncode == 0
        return here or _quiet("docker", "pull", "--platform=linux/amd64", image).returncode == 0

    def build(self, order: Order) -> None:
        _shown("docker", "build", "--platform=linux/amd64", *order.command)

    def size(self, image: str) -> float:
        told = _quiet("docker", "image", "inspect", "--format={{.Size}}", image, check=True)
        return float(told.stdout)

    @contextlib.contextmanager
    def containers(self, image: str, number: int) -> Iterator[list[Container]]:
        network = f"ddray-image-{os.getpid()}"
        names = [f"{network}-{k}" for k in range(number)]
        _quiet("docker", "network", "create", network, check=True)
        try:
            found = []
            for name in names:
                # Docker's own /dev/shm is 64 MB, which no node of ours has either.
                flags = ["--detach", f"--network={network}", "--shm-size=2g", f"--name={name}"]
                _quiet("docker", "run", *flags, image, "sleep", "infinity", check=True)
                where = "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}"
                told = _quiet("docker", "inspect", f"--format={where}", name, check=True)
                before = ("docker", "exec", "--interactive")
                found.append(Container(told.stdout.strip(), before, (name,)))
            yield found
        finally:
            _quiet("docker", "rm", "--force", *names)
            _quiet("docker", "network", "rm", network)


class Buildah:
    """buildah in chroot isolation."""

    name = "buildah"

    def __init__(self, store: Path | None) -> None:
        where = ("--root", f"{store}/images", "--runroot", f"{store}/run") if store else ()
        self._buildah = ("buildah", *where)

    def fetch(self, image: str) -> bool:
        here = _quiet(*self._buildah, "inspect", "--type=image", image).returncode == 0
        return here or _quiet(*self._buildah, "pull", image).returncode == 0

    def build(self, order: Order) -> None:
        _shown(*self._buildah, "bud", "--isolation=chroot", "--layers", *order.command)

    def size(self, image: str) -> float:
        told = _quiet(*self._buildah, "images", "--json", image, check=True)
        number, unit = json.loads(told.stdout)[0]["size"].split()
        return float(number) * _UNITS[unit.upper()]

    @contextlib.contextmanager
    def containers(self, image: str, number: int) -> Iterator[list[Container]]:
        made: list[str] = []
        try:
            for _ in range(number):
                told = _quiet(*self._buildah, "from", "--pull-never", image, check=True)
                made.append(told.stdout.strip())
                # For all commands at once: a socket of one mount is none of another's.
                _quiet(*self._buildah, "mount", made[-1], check=True)
            with contextlib.ExitStack() as stack:
                inits = [stack.enter_context(_machine()) for _ in made]
                if number == 2:
                    _wire(*inits)
                yield [
                    Container(
                        f"{_NETWORK}.{k}",
                        (*_entering(init), *self._buildah, "run", "--isolation=chroot"),
                        (name, "--"),
                    )
                    for k, (name, init) in enumerate(zip(made, inits, strict=True), 1)
                ]
        finally:
            if made:
                _quiet(*self._buildah, "rm", *made)


def _entering(init: int) -> tuple[str, ...]:
    return ("nsenter", f"--target={init}", "--net", "--pid", "--mount")


@contextlib.contextmanager
def _machine() -> Iterator[int]:
    """Network and processes of its own; the first process, with which the others end.

    A chroot alone would see the machine's: `ray stop` in it ends every Ray that it may.
    """
    # bash, since what has lost its parent is this one's to bury.
    first = ("bash", "-c", "while sleep 1; do :; done")
    unshare = ("unshare", "--net", "--pid", "--mount-proc", "--fork", "--kill-child")
    with subprocess.Popen([*unshare, *first]) as process:
        try:
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
            while not (found := children.read_text().split()):
                if process.poll() is not None:
                    raise ImageError("no namespaces of network and processes can be made here")
                time.sleep(0.05)
            init = int(found[0])
            _quiet(*_entering(init), "ip", "link", "set", "lo", "up", check=True)
            yield init
        finally:
            process.kill()


def _wire(first: int, second: int) -> None:
    """A cable between two."""
    other = ("peer", "name", "eth0", "netns", str(second))
    link = ("ip", "link", "add", "eth0", "netns", str(first), "type", "veth", *other)
    _quiet(*link, check=True)
    for k, init in enumerate((first, second), 1):
        enter = _entering(init)
        _quiet(*enter, "ip", "addr", "add", f"{_NETWORK}.{k}/24", "dev", "eth0", check=True)
        _quiet(*enter, "ip", "link", "set", "eth0", "up", check=True)
        # Ray takes the address that it would reach the world from.
        way = ("default", "via", f"{_NETWORK}.{3 - k}")
        _quiet(*enter, "ip", "route", "add", *way, check=True)
