"""Masked decoding beside a student of the same teacher: quality by steps, and seconds an image.

    python benchmarks/bench_masked.py --masked runs/masked/student --student digits-llamagen-dd \
        --json benchmarks/results/masked-digits-llamagen.json

Temperatures and guidance of every number of steps are those of the least fd_digits on images of a
seed that no evaluation uses (`--tune-count`): one setting after the other, twice, from those of
fewer steps. What is chosen is then judged on images of the evaluation's seed, as the student is.
One process, one thread.
"""

import argparse
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import frame
import torch
from torch import Tensor

from ddray.method.masked_decoding import Masked
from ddray.method.model import Model
from ddray.method.schedule import num_steps, parse_schedule
from ddray.metrics.fd_digits import DigitsMetric
from ddray.models.zoo import METRIC_FOLDER, load_masked, load_student
from ddray.report.table import Column

EVALUATION_SEED = 1000003
SELECTION_SEED = 555
TOGETHER = 64
ROUNDS = 5

Make = Callable[[Tensor, Tensor, int], Tensor]
"""Tokens or codes of classes, indices and a seed."""

# Tried one after the other.
CHOICES: dict[str, tuple[float, ...]] = {
    "temperature": (0.2, 0.3, 0.4, 0.55, 0.7, 0.85, 1.0),
    "cfg": (1.0, 1.5, 2.0, 3.0, 4.5),
    "choice_temperature": (0.5, 1.0, 2.0, 4.5, 9.0),
}
COLUMNS = (
    Column("generator", "generator"),
    Column("steps", "steps"),
    Column("fd_digits", "fd_digits", "", ".2f"),
    Column("class_accuracy", "class accuracy", "", ".3f"),
    Column("seconds", "seconds an image", "", ".4f"),
    Column("temperature", "temperature", "", ".2g"),
    Column("cfg", "guidance", "", ".2g"),
    Column("choice_temperature", "choice temperature", "", ".2g"),
)


def judge(
    model: Model, metric: DigitsMetric, make: Make, count: int, seed: int
) -> dict[str, float]:
    """Figures of images of all classes in turn."""
    index = torch.arange(count)
    labels = index % model.num_classes
    parts = zip(labels.split(TOGETHER), index.split(TOGETHER), strict=True)
    return metric(torch.cat([model.decode(make(*part, seed)) for part in parts]), labels)


def seconds(model: Model, make: Make) -> float:
    """An image's share of a batch of `TOGETHER`, pixels included: the median of some rounds."""
    index = torch.arange(TOGETHER)
    labels = index % model.num_classes

    def batch() -> None:
        model.decode(make(labels, index, 0))

    batch()
    return statistics.median(frame.seconds_of(batch) for _ in range(ROUNDS)) / TOGETHER


def masked_maker(masked: Masked, steps: int, settings: Mapping[str, float]) -> Make:
    """What makes tokens in so many passes."""
    return lambda labels, index, seed: masked.generate(
        labels, steps=steps, seed=seed, index=index, **settings
    )


def tuned(
    masked: Masked, metric: DigitsMetric, steps: int, count: int, start: Mapping[str, float]
) -> dict[str, float]:
    """Settings of the least fd_digits for so many steps."""
    best, known = dict(start), dict[tuple[float, ...], float]()

    def distance(settings: Mapping[str, float]) -> float:
        key = tuple(settings.values())
        if key not in known:
            make = masked_maker(masked, steps, settings)
            known[key] = judge(masked, metric, make, count, SELECTION_SEED)["fd_digits"]
        return known[key]

    for name, values in (*CHOICES.items(), *CHOICES.items()):
        if steps == 1 and name == "choice_temperature":
            continue  # nothing is masked again
        best = min(({**best, name: value} for value in values), key=distance)
        print(f"{steps} steps: {name}={best[name]}, fd_digits {distance(best):.2f}", flush=True)
    return best


def rows(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Every generator at every number of steps."""
    metric = DigitsMetric(METRIC_FOLDER)
    masked = load_masked(args.masked, device="cpu")
    student = load_student(args.student, device="cpu")
    makers: list[tuple[dict[str, Any], Model, Make]] = []
    trained: Sequence[int] = student.config["schedule"]
    for stop in range(1, len(trained) + 1):
        schedule = list(trained[:stop])
        steps = num_steps(parse_schedule(schedule, len(student.stages)))
        makers.append(
            (
                {"generator": "student", "steps": steps},
                student,
                lambda labels, index, seed, schedule=schedule: student.generate(  # type: ignore[misc]
                    labels, index=index, seed=seed, schedule=schedule
                ),
            )
        )
    settings = {"temperature": 1.0, "cfg": 1.0, "choice_temperature": 4.5}
    for steps in args.steps:
        settings = tuned(masked, metric, steps, args.tune_count, settings)
        row = {"generator": "masked decoding", "steps": steps, **settings}
        makers.append((row, masked, masked_maker(masked, steps, settings)))
    found = []
    for row, model, make in makers:
        row |= judge(model, metric, make, args.count, EVALUATION_SEED)
        row["seconds"] = seconds(model, make)
        print(row, flush=True)
        found.append(row)
    return found


def main() -> None:
    """Tune, judge, print the table."""
    parser = frame.arguments(__doc__)
    parser.add_argument("--masked", required=True, help="folder of `distill --objective masked`")
    parser.add_argument("--student", required=True, help="name or folder, for comparison")
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--count", type=int, default=5000, help="images of each")
    parser.add_argument("--tune-count", type=int, default=1000, help="images of each setting")
    args = parser.parse_args()
    torch.set_num_threads(1)
    result = {
        "masked": load_masked(args.masked, device="cpu").config,
        "student": args.student,
        "images": args.count,
        "seed": EVALUATION_SEED,
        "tuned_on": {"images": args.tune_count, "seed": SELECTION_SEED},
        **frame.about("torch", note="1 thread"),
        "rows": rows(args),
    }
    frame.write(args.json, result)
    frame.tell(result, f"{args.count} images", (result["rows"], COLUMNS))


if __name__ == "__main__":
    main()
