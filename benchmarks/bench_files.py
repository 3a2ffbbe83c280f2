"""What image files take: milliseconds of a core, bytes, and what is lost.

    python benchmarks/bench_files.py [--json benchmarks/results/files-cpu.json]

Twelve crops of 256 x 256 of the two photographs that scikit-learn brings (extra `teachers`), each
file the best of three. Rows by Pillow's own settings are what there was to choose from.
"""

import io
import statistics
import time
from collections.abc import Callable

import frame
import numpy as np
import numpy.typing as npt
from PIL import Image
from sklearn.datasets import load_sample_images

from ddray.report.image_file import decode_image, encode_png, encode_webp
from ddray.report.table import Column

SIDE = 256
Pixels = npt.NDArray[np.uint8]
COLUMNS = (
    Column("what", "file"),
    Column("ms", "time", "ms", ".1f"),
    Column("kilobytes", "size", "kB", ".1f"),
    Column("psnr_db", "loss", "dB", ".1f"),
)


def by_pillow(kind: str, **settings: int | bool) -> Callable[[Pixels], bytes]:
    """A file by Pillow's settings."""

    def encode(pixels: Pixels) -> bytes:
        stream = io.BytesIO()
        Image.fromarray(pixels).save(stream, kind, **settings)
        return stream.getvalue()

    return encode


WAYS: dict[str, Callable[[Pixels], bytes]] = {
    "PNG, small": encode_png,
    "PNG, level 1": by_pillow("PNG", compress_level=1),
    "PNG, fast": lambda pixels: encode_png(pixels, fast=True),
    "WebP without loss, small": encode_webp,
    "WebP without loss, method 2": by_pillow("WEBP", lossless=True, method=2),
    "WebP without loss, fast": lambda pixels: encode_webp(pixels, fast=True),
    "WebP, quality 95, small": lambda pixels: encode_webp(pixels, 95),
    "WebP, quality 95, fast": lambda pixels: encode_webp(pixels, 95, fast=True),
    "WebP, quality 90, small": lambda pixels: encode_webp(pixels, 90),
    "WebP, quality 90, fast": lambda pixels: encode_webp(pixels, 90, fast=True),
}


def crops() -> list[Pixels]:
    """Six parts of each photograph, which overlap a little."""
    found = []
    for photograph in load_sample_images().images:
        below, right = (size - SIDE for size in photograph.shape[:2])
        for y in (0, below):
            for x in (0, right // 2, right):
                found.append(np.ascontiguousarray(photograph[y : y + SIDE, x : x + SIDE]))
    return found


def measured(encode: Callable[[Pixels], bytes], images: list[Pixels]) -> dict[str, float | None]:
    """Means over the images; no loss is None."""
    times, sizes, errors = [], [], []
    for pixels in images:
        best = []
        for _ in range(3):
            began = time.thread_time()
            file = encode(pixels)
            best.append(time.thread_time() - began)
        times.append(min(best))
        sizes.append(len(file))
        errors.append(float(np.square(decode_image(file) / 255 - pixels / 255).mean()))
    error = statistics.mean(errors)
    return {
        "ms": 1e3 * statistics.mean(times),
        "kilobytes": statistics.mean(sizes) / 1e3,
        "psnr_db": -10 * float(np.log10(error)) if error else None,
    }


def main() -> None:
    """Print the table; write it as JSON if asked."""
    args = frame.arguments(__doc__).parse_args()
    where, images = frame.about("PIL", "numpy", note="one thread"), crops()
    rows = [{"what": what, **measured(encode, images)} for what, encode in WAYS.items()]
    result = {"images": len(images), "side": SIDE, **where, "rows": rows}
    frame.tell(result, f"{len(images)} photographs of {SIDE} x {SIDE}", (rows, COLUMNS))
    frame.write(args.json, result)


if __name__ == "__main__":
    main()
