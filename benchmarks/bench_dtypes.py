"""What bfloat16 costs the bundled models in quality: the same noise in both dtypes.

    python benchmarks/bench_dtypes.py [--count 2000] [--json benchmarks/results/dtypes-cpu.json]

Teacher (by transport) and student (every schedule it learnt) run in float32 and in bfloat16, the
decoder with them. Printed are the share of equal tokens, how far images are apart, and the Frechet
distance of each. A teacher's tokens depend on those before: after the first that differs the rest
is another image of the same distribution.
"""

import math
from typing import Any

import frame
import torch
from torch import Tensor

from ddray.method.student import Student
from ddray.method.teacher import Teacher
from ddray.metrics.fd_digits import DigitsMetric
from ddray.models.zoo import METRIC_FOLDER, load_student, load_teacher
from ddray.report.table import Column

DTYPES = ("float32", "bfloat16")
SEED, TOGETHER = 777_001, 100
COLUMNS = (
    Column("model", "model"),
    Column("made_by", "made by"),
    Column("same_tokens", "same tokens", "", ".4f"),
    Column("same_images", "images of the same tokens", "", ".3f"),
    Column("psnr_db", "images apart", "dB", ".1f"),
    Column("float32", "fd_digits, float32", "", ".2f"),
    Column("bfloat16", "fd_digits, bfloat16", "", ".2f"),
)


def ways(model: Teacher | Student) -> dict[str, Any]:
    """What makes tokens [B, L] or codes [B, L, E] of class ids and indices, by its name."""
    if isinstance(model, Teacher):
        cfg = model.default_cfg
        return {"transport": lambda c, i: model.trajectories(c, i, seed=SEED, cfg=cfg)}
    jumps = model.config["schedule"]
    schedules = [jumps[: n + 1] for n in range(len(jumps))]
    return {
        f"schedule {','.join(map(str, s))}": (
            lambda c, i, s=s: model.generate(c, index=i, seed=SEED, schedule=s)
        )
        for s in schedules
    }


def made(model: Teacher | Student, make: Any, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens [N, L], images [N, 1, 28, 28] and class ids [N] of a count of images."""
    index = torch.arange(count)
    labels = index % model.num_classes
    parts = []
    for rows in index.split(TOGETHER):
        content = make(labels[rows], rows)
        tokens = content if not content.is_floating_point() else None
        if tokens is None:
            tokens = model.tokenizer.module.nearest(content)
        parts.append((tokens, model.decode(content)))
    tokens, images = (torch.cat(part) for part in zip(*parts, strict=True))
    return tokens, images, labels


def main() -> None:
    """Print the table; write it as JSON if asked."""
    parser = frame.arguments(__doc__)
    parser.add_argument("--count", type=int, default=2000)
    args = parser.parse_args()
    metric = DigitsMetric(METRIC_FOLDER)
    where = frame.about("torch", note=f"{torch.get_num_threads()} thread(s)")
    rows = []
    for name in ("digits-llamagen", "digits-llamagen-dd", "digits-var", "digits-var-dd"):
        load = load_student if name.endswith("-dd") else load_teacher
        models = [load(name, device="cpu", dtype=d, decode_dtype=d) for d in DTYPES]
        for what in ways(models[0]):
            found = [made(model, ways(model)[what], args.count) for model in models]
            (tokens, images, labels), (lower, lower_images, _) = found
            apart = float((images - lower_images).square().mean())
            same = tokens == lower
            row = {
                "model": name,
                "made_by": what,
                "same_tokens": float(same.double().mean()),
                "same_images": float(same.all(-1).double().mean()),
                "psnr_db": -10 * math.log10(max(apart, 1e-20)),
            }
            for dtype, (_, pixels, _) in zip(DTYPES, found, strict=True):
                row[dtype] = metric(pixels, labels)["fd_digits"]
            rows.append(row)
    result = {"images": args.count, **where, "rows": rows}
    frame.tell(result, f"{args.count} images of each, the same noise", (rows, COLUMNS))
    frame.write(args.json, result)


if __name__ == "__main__":
    main()
