"""Codes to pixels: ddray's decoder in float32 and bfloat16 beside the same one in plain operations.

    python benchmarks/bench_decoding.py llamagen-b-256 --threads 2 --json FILE

Any name of `ddray models` goes; official sizes get random weights, of torch's own initialisation:
as fast as trained ones, and images with some contrast. The ways take turns, as the speed of a
machine drifts; figures are medians, ratios those of the rounds' own. Where other work goes on
beside, take one thread and read CPU time: threads that wait for each other burn it. Memory is
measured as in bench_models.py, after each way has run once. Ends with status 1 if a bar is missed:
the one of memory is meant for batches of 8 and more, that of bfloat16's time for processors that
multiply bfloat16.
"""

import math
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import frame
import torch
from bench_models import PeakGrowth
from plain_decoder import plain_decode
from torch import Tensor

from ddray.method.model import Tokenizer
from ddray.models.families import empty_network, empty_tokenizer
from ddray.models.zoo import load_teacher, resolve
from ddray.report.table import Column

COLUMNS = (
    Column("what", "what"),
    Column("seconds", "time", "s", ".3f"),
    Column("cpu_seconds", "CPU time", "s", ".3f"),
    Column("images_per_s", "images/s", "", ".3f"),
    Column("ratio", "time", "x plain", ".3f"),
    Column("cpu_ratio", "CPU time", "x plain", ".3f"),
    Column("memory_mb", "memory", "MB", ".0f"),
)

PLAIN = "plain, float32"


def tokenizer_of(name: str, device: torch.device) -> tuple[Any, int]:
    """A tokenizer module, and how many tokens an image has."""
    config = resolve(name)
    if not isinstance(config, dict):
        teacher = load_teacher(name, device=device)
        return teacher.tokenizer.module, teacher.num_tokens
    torch.manual_seed(0)
    empty = empty_tokenizer(config)
    module = type(empty)(empty.config).requires_grad_(False).eval()
    return module.to(device), sum(empty_network(config).stages)


def ways_of(module: Any, num_tokens: int, batch: int) -> dict[str, Callable[[], Tensor]]:
    """Makers of the same images, of random codes."""
    torch.manual_seed(0)
    tokens = torch.randint(len(module.codebook), (batch, num_tokens))
    codes = module.codebook[tokens.to(module.codebook.device)]

    @torch.no_grad()
    def plain() -> Tensor:
        latent = module.post_quant_conv(module.decoder_input(codes))
        return plain_decode(module.decoder, latent).add(1).div(2).clamp(0, 1)

    return {PLAIN: plain} | {
        f"ddray, {name}": partial(
            Tokenizer(module, decode_dtype=getattr(torch, name)).decode, codes
        )
        for name in ("float32", "bfloat16")
    }


def timed(make: Callable[[], Tensor], device: torch.device) -> dict[str, float]:
    """Seconds of one run."""
    began, cpu_began = time.perf_counter(), time.process_time()
    make()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return {
        "seconds": time.perf_counter() - began,
        "cpu_seconds": time.process_time() - cpu_began,
    }


def bench(
    name: str, batch: int, rounds: int, device: torch.device
) -> tuple[list[dict[str, Any]], list[frame.Figure]]:
    """A row each way, and what is held to a bar."""
    ways = ways_of(*tokenizer_of(name, device), batch)
    images, memory = {}, {}
    for what, make in ways.items():
        # What a library allocates at its first product is no memory of a row.
        make()
        with PeakGrowth(device) as growth:
            images[what] = make().double().cpu()
        memory[what] = growth.bytes / 1e6
    turns = {what: partial(timed, make, device) for what, make in ways.items()}
    found = frame.in_turns(turns, rounds)
    rows = frame.medians(found, COLUMNS)
    for row in rows:
        row |= {"batch": batch, "images_per_s": batch / row["seconds"]}
        row["memory_mb"] = memory[row["what"]]
        for ratio, key in (("ratio", "seconds"), ("cpu_ratio", "cpu_seconds")):
            # Of neighbours in time: what slows the machine slows both.
            pairs = zip(found[row["what"]], found[PLAIN], strict=True)
            row[ratio] = statistics.median(own[key] / plain[key] for own, plain in pairs)
    float32, bfloat16 = (images[row["what"]] - images[PLAIN] for row in rows[1:])
    psnr = -10 * math.log10(max(float(bfloat16.square().mean()), 1e-20))
    on_cpu = device.type == "cpu"
    multiplied = on_cpu and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    figures = [
        frame.Figure("float32, CPU time, x plain", rows[1]["cpu_ratio"], most=0.85),
        frame.Figure(
            "bfloat16, CPU time, x plain", rows[2]["cpu_ratio"], most=0.3 if multiplied else None
        ),
        *(
            frame.Figure(
                f"{row['what']}, memory, x plain", row["memory_mb"] / memory[PLAIN], most=0.5
            )
            for row in rows[1:]
        ),
        frame.Figure(
            "float32, largest difference, of 255", 255 * float(float32.abs().max()), most=1
        ),
        frame.Figure("bfloat16, PSNR, dB", psnr, least=45),
        frame.Figure("deviation of the images, of 255", 255 * float(images[PLAIN].std())),
    ]
    return rows, figures


def main() -> None:
    """Print the tables; write them as JSON if asked."""
    parser = frame.arguments(__doc__)
    parser.add_argument("name", help="a teacher's name")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    result = frame.about("torch", device=device.type, note=f"{args.threads} thread(s)")
    rows, figures = bench(args.name, args.batch, args.rounds, device)
    # That of others before and after: this one is part of the second.
    result["load"] = [result["load"], frame.load()]
    result |= {"name": args.name, "rows": rows, "figures": frame.figures_table(figures)[0]}
    headline = f"decoder of {args.name}, batch {args.batch}"
    frame.tell(result, headline, (rows, COLUMNS), frame.figures_table(figures))
    frame.write(args.json, result)
    frame.stop_if_missed(figures)


if __name__ == "__main__":
    main()
