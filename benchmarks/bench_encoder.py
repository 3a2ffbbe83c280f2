"""A text encoder's share of sampling, in counted operations, at published sizes without weights.

    python benchmarks/bench_encoder.py --json benchmarks/results/encoder.json

LlamaGen's text models and flan-t5-xl in front of them. torch counts the products of both: of the
encoder every pass that `ddray.text.t5` makes of a batch, captions beside others of their length and
once with all padded to the model's 120 positions; of the teacher the guided stages, whose attention
grows by a key each, so that three of them tell all. What the transport computes is left out.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from bench_launches import teacher_of
from fake_device import FakeDevice
from frame import Figure, about, arguments, figures_table, stop_if_missed, tell, write
from torch.utils.flop_counter import FlopCounterMode

from ddray.report.table import Column
from ddray.text.t5 import FLAN_T5_XL, by_length, t5_config

TEACHERS = ("llamagen-t2i-xl-256", "llamagen-t2i-xl-512")
CFG, POSITIONS, WIDTH = 7.5, 120, 2048
# Captions of a batch of trajectories, and what they have on average: a sentence of ten words, one
# of two sentences, a paragraph, and texts that are cut.
ROWS = 64
TYPICAL = 15
MEANS = (TYPICAL, 30, 60, POSITIONS)
MOST = 0.05
COLUMNS = (
    Column("teacher", "teacher"),
    Column("mean", "positions a caption", "", ".1f"),
    Column("computed", "computed", "", ".1f"),
    Column("teacher_gflops", "teacher", "GFLOP an image", ".0f"),
    Column("encoder_gflops", "encoder", "GFLOP an image", ".1f"),
    Column("share", "its share", "", ".1%"),
    Column("padded_share", f"padded to {POSITIONS}", "", ".1%"),
)


def _in_place(_: Any, rows: Any, weights: Any, **__: Any) -> int:
    """Of a product that is added onto what is there, which torch's counter does not know."""
    return 2 * int(rows[0] * rows[1] * weights[1])


def lengths_of(mean: float) -> list[int]:
    """Positions of a batch's captions: a quarter of the mean up and down, as a deviation."""
    drawn = np.random.default_rng(0).normal(mean, mean / 4, ROWS)
    return [int(n) for n in drawn.round().clip(2, POSITIONS)]


def teacher_flops(name: str) -> float:
    """Operations of an image's stages, both halves of guidance."""
    gpu = FakeDevice()
    teacher = teacher_of(gpu, name)
    stages, counted = len(teacher.stages), []
    features = gpu.tensor(torch.empty(1, POSITIONS, WIDTH, dtype=torch.bfloat16))
    mask = gpu.tensor(torch.ones(1, POSITIONS, dtype=torch.int64))
    counted_too = {torch.ops.aten.addmm_: _in_place}
    for some in (1, 2, 3):
        teacher.stages = (1,) * some
        with gpu.here(), FlopCounterMode(display=False, custom_mapping=counted_too) as counter:
            teacher.trajectories((features, mask), [0], seed=1, cfg=CFG)
        counted.append(counter.get_total_flops())
    first, second, third = np.diff(counted, prepend=0)
    return float(first + sum(second + k * (third - second) for k in range(stages - 1)))


class Encoder:
    """A T5 of the published sizes on the meta device."""

    def __init__(self) -> None:
        from transformers import T5Config, T5EncoderModel

        with torch.device("meta"):
            self._model = T5EncoderModel(T5Config(**t5_config(FLAN_T5_XL))).eval()

    @torch.no_grad()
    def flops(self, rows: int, positions: int) -> float:
        """Operations of a pass."""
        ids = torch.zeros(rows, positions, dtype=torch.int64, device="meta")
        with FlopCounterMode(display=False) as counter:
            self._model(input_ids=ids)
        return float(counter.get_total_flops())


def measured() -> list[dict[str, Any]]:
    """A row for each teacher and length of captions."""
    encoder, rows = Encoder(), []
    padded = encoder.flops(ROWS, POSITIONS) / ROWS
    for name in TEACHERS:
        teacher = teacher_flops(name)
        for mean in MEANS:
            lengths = lengths_of(mean)
            passes = [(len(some), max(lengths[n] for n in some)) for some in by_length(lengths)]
            own = sum(encoder.flops(*one) for one in passes) / ROWS
            rows.append(
                {
                    "teacher": name,
                    "mean": sum(lengths) / ROWS,
                    "computed": sum(count * longest for count, longest in passes) / ROWS,
                    "teacher_gflops": teacher / 1e9,
                    "encoder_gflops": own / 1e9,
                    "share": own / (own + teacher),
                    "padded_share": padded / (padded + teacher),
                }
            )
    return rows


def main() -> None:
    """Count, print, write; exit status 1 if a bar is missed."""
    assert __doc__
    args = arguments(__doc__).parse_args()
    result = about("torch", "transformers")
    rows = measured()
    figures = [
        Figure(
            f"{name}: the encoder's share, captions of {TYPICAL} positions", row["share"], most=MOST
        )
        for name, row in zip(TEACHERS, rows[:: len(MEANS)], strict=True)
    ]
    result |= {"rows": rows, "figures": [figure.row() for figure in figures]}
    tell(result, "The encoder of captions", (rows, COLUMNS), figures_table(figures))
    write(args.json, result)
    stop_if_missed(figures)


if __name__ == "__main__":
    main()
