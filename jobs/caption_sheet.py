"""One sheet of captions and what is made of each: by the teacher, in two steps and in one.

    python jobs/caption_sheet.py --student emoji-llamagen-dd --out docs/emoji.png
    python jobs/caption_sheet.py --student emoji-llamagen-dd --captions FILE --rows --out rows.png

The captions are not chosen: the first that the training saw, then the first of the held-out ones.
"""

import argparse
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

import ddray
from ddray.errors import ConfigError
from ddray.method.student import Student
from ddray.method.teacher import Teacher
from ddray.report.pictures import labelled_grid, to_uint8
from ddray.text.loading import own_captions

Images = dict[str, Tensor]
"""Float [N, 3, H, W] in [0, 1] of each generator, by its name."""
COLUMNS, SIDE, FONT, LINES, GAP = 6, 64, 11, 2, 8
PAPER, INK, FAINT = "#ffffff", "#222222", "#777777"


def distinct_lines(file: str | Path, count: int) -> list[str]:
    """The first different lines of a file."""
    return [*dict.fromkeys(Path(file).read_text().splitlines())][:count]


def own_lines(config: Mapping[str, Any], count: int) -> list[str]:
    """Captions of a bundled model: half of them held out.

    Raises:
        ConfigError: for another model.
    """
    files = [own_captions(config, held_out=held_out) for held_out in (False, True)]
    if None in files:
        raise ConfigError("only bundled models bring captions: give --captions FILE")
    return [line for file in files for line in distinct_lines(str(file), count // 2)]


def sheet(captions: list[str], rows: list[Tensor], names: list[str]) -> Image.Image:
    """A cell for every caption: its images side by side, the caption below.

    Args:
        captions: one a cell.
        rows: images [N, 3, H, W] in [0, 1] of each generator.
        names: of the generators.
    """
    font = ImageFont.load_default(FONT)
    width = max(2, len(rows)) * SIDE + GAP
    height = SIDE + LINES * (FONT + 3) + GAP
    high = -(-len(captions) // COLUMNS) * height + FONT + 2 * GAP
    page = Image.new("RGB", (COLUMNS * width + GAP, high), PAPER)
    draw = ImageDraw.Draw(page)
    draw.text((GAP, GAP // 2), f"each from left to right: {', '.join(names)}", FAINT, font)
    pixels = [to_uint8(images) for images in rows]
    for number, caption in enumerate(captions):
        left = GAP + number % COLUMNS * width
        top = FONT + 2 * GAP + number // COLUMNS * height
        for k, images in enumerate(pixels):
            tile = Image.fromarray(images[number]).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
            page.paste(tile, (left + k * SIDE, top))
        lines = textwrap.wrap(caption, width=int(1.8 * (width - GAP) / FONT))[:LINES]
        draw.text((left + 2, top + SIDE + 2), "\n".join(lines), INK, font)
    return page


def images_of(teacher: Teacher, student: Student | None, captions: list[str], seed: int) -> Images:
    """What each generator makes of the same noise, by its name.

    Args:
        teacher: as it is recommended, by transport.
        student: in as many steps as it has learnt, and in fewer; None = the teacher alone.
        captions: one an image.
        seed: of the noise.
    """
    index = range(len(captions))
    tokens = teacher.trajectories(captions, index, seed=seed, **teacher.recommended)
    made = {f"teacher, {len(teacher.stages)} steps": teacher.decode(tokens)}
    learnt = student.config["schedule"] if student else []
    for steps in range(len(learnt), 0, -1):
        assert student is not None
        schedule = ",".join(map(str, learnt[:steps]))
        codes = student.generate(captions, seed=seed, schedule=schedule)
        made["1 step" if steps == 1 else f"{steps} steps"] = student.decode(codes)
    return made


def main() -> None:
    """Make the images, then the sheet."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--teacher", default="emoji-llamagen")
    parser.add_argument("--student", help="absent = the teacher alone")
    parser.add_argument("--captions", type=Path, help="a file, one a line; absent = the teacher's")
    parser.add_argument("--count", type=int, default=48)
    parser.add_argument(
        "--rows", action="store_true", help="a row for each generator, below the captions"
    )
    parser.add_argument(
        "--other-noise", action="store_true", help="print how far other noise changes the images"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/captions.png"))
    args = parser.parse_args()
    teacher = ddray.load_teacher(args.teacher)
    student = ddray.load_student(args.student) if args.student else None
    if args.captions:
        captions = distinct_lines(args.captions, args.count)
    else:
        captions = own_lines(teacher.config, args.count)
    made = images_of(teacher, student, captions, seed=0)
    if args.other_noise:
        others = images_of(teacher, student, captions, seed=1)
        for name, images in made.items():
            difference = float((images - others[name]).square().mean())
            print(f"{name}: mean square difference of two noises {difference:.4f}")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    if args.rows:
        shown = [*made.items()][::-1]  # the fastest above
        page = labelled_grid(shown, captions, scale=max(1, 96 // shown[0][1].shape[-1]))
    else:
        page = sheet(captions, [*made.values()], [*made])
    page.save(args.out)


if __name__ == "__main__":
    main()
