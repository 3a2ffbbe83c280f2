"""Skip-n on digits: Frechet distance and time of a teacher whose last n steps are one pass.

    python benchmarks/bench_skip.py --teacher digits-llamagen --skip 0 5 10 20 30 49

Plain torch, one thread. Images, classes and guidance are those of `ddray evaluate`: classes in
turn, the teacher's own guidance, without filters.
"""

import time
from typing import Any

import frame
import torch

from ddray.metrics.fd_digits import DigitsMetric
from ddray.models.zoo import METRIC_FOLDER, load_teacher
from ddray.report.table import Column

COLUMNS = (
    Column("skip", "n", "", ".0f"),
    Column("passes", "passes", "", ".0f"),
    Column("fd_digits", "fd_digits", "", ".2f"),
    Column("class_accuracy", "class accuracy", "", ".3f"),
    Column("ms", "an image", "ms", ".1f"),
)
TOGETHER = 250


def measure(name: str, skips: list[int], count: int, seed: int) -> list[dict[str, Any]]:
    """A row for each n."""
    teacher, metric = load_teacher(name, device="cpu"), DigitsMetric(METRIC_FOLDER)
    index, rows = torch.arange(count), []
    labels = index % teacher.num_classes
    for skip in skips:
        began, images = time.perf_counter(), []
        for part in index.split(TOGETHER):
            tokens = teacher.sample(
                labels[part], cfg=teacher.default_cfg, seed=seed, index=part, skip=skip
            )
            images.append(teacher.decode(tokens))
        ms = 1000 * (time.perf_counter() - began) / count
        passes = len(teacher.stages) - max(skip, 1) + 1
        rows.append({"skip": skip, "passes": passes, "ms": ms, **metric(torch.cat(images), labels)})
    return rows


def main() -> None:
    """Print the table; write it as JSON if asked."""
    parser = frame.arguments(__doc__)
    parser.add_argument("--teacher", default="digits-llamagen")
    parser.add_argument("--skip", type=int, nargs="+", default=[0, 5, 10, 20, 30, 49])
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    result = frame.about("torch", note="one thread")
    result["rows"] = measure(args.teacher, args.skip, args.count, args.seed)
    headline = f"{args.teacher}, {args.count} images, seed {args.seed}"
    frame.tell(result, headline, (result["rows"], COLUMNS))
    frame.write(args.json, result)


if __name__ == "__main__":
    main()
