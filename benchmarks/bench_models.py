"""Speed and memory of a teacher, its trajectories and its student, on the same weights in one run.

    python benchmarks/bench_models.py llamagen-b-256 --random-weights --batch 8 --json FILE
    python benchmarks/bench_models.py digits-llamagen

Any name of `ddray models` goes; official sizes need no files with --random-weights. Each figure is
the median of at least two runs after a warm-up. `memory` is what resident memory (CPU) or allocated
memory (CUDA) grows by at its peak while a row runs. Two kinds of rows have a floor, measured in the
same run. The student's is the time of its matrix products alone, at the rate of its own largest
one. That of a LlamaGen's sampling is the time to read from memory what every token needs: the
weights, and the keys and values of the tokens before. "Class to pixels" is a row's time plus that
of decoding, in --decode-dtype; benchmarks/bench_decoding.py says more of that.
"""

import re
import statistics
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import frame
import psutil
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddray.method.schedule import default_schedule
from ddray.method.student import Student
from ddray.method.teacher import Teacher
from ddray.models.families import empty_network, empty_tokenizer
from ddray.models.linear import Linear, linear
from ddray.models.llamagen import LlamaGen
from ddray.models.zoo import load_teacher, new_student, resolve
from ddray.report.table import Column

COLUMNS = (
    Column("what", "what"),
    Column("batch", "batch"),
    Column("steps", "steps"),
    Column("seconds", "time", "s", ".3f"),
    Column("ms_per_step", "step", "ms", ".2f"),
    Column("images_per_s", "images/s", "", ".3f"),
    Column("speedup", "x AR, guided", "", ".1f"),
    Column("floor_ratio", "x floor", "", ".2f"),
    Column("memory_mb", "memory", "MB", ".0f"),
    Column("pixels_seconds", "class to pixels", "s", ".3f"),
    Column("pixels_per_s", "class to pixels", "images/s", ".3f"),
)

EAGER = ", kernel by kernel"
"""End of a row's name: without CUDA graphs."""


class PeakGrowth:
    """Growth of memory at its peak while the block runs, in bytes."""

    def __init__(self, device: torch.device):
        self._cuda = device.type == "cuda"
        self._process = psutil.Process()
        self._over = threading.Event()
        self.bytes = 0

    def _watch(self) -> None:
        while not self._over.wait(0.02):
            self.bytes = max(self.bytes, self._process.memory_info().rss - self._before)

    def __enter__(self) -> "PeakGrowth":
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
        else:
            self._before = self._process.memory_info().rss
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._cuda:
            self.bytes = torch.cuda.max_memory_allocated() - self._before
        else:
            self._over.set()
            self._thread.join()


def random_teacher(
    name: str, device: str, dtype: str = "float32", decode_dtype: str = "float32"
) -> Teacher:
    """A model of the sizes of a name with normal weights of deviation 0.02."""
    config = resolve(name)
    if not isinstance(config, dict):
        raise SystemExit(f"{name} is bundled with weights; leave --random-weights out")
    torch.manual_seed(0)
    states = []
    for module in (empty_network(config), empty_tokenizer(config)):
        constants = getattr(module, "constants", dict)()
        states.append(
            {
                key: torch.empty(tensor.shape).normal_(std=0.02)
                for key, tensor in module.state_dict().items()
                if key not in constants
            }
        )
    return load_teacher(
        config,
        checkpoint=states[0],
        tokenizer=states[1],
        device=device,
        dtype=dtype,
        decode_dtype=decode_dtype,
    )


def student_of(teacher: Teacher, dtype: torch.dtype) -> Student:
    """An untrained student: as fast as a trained one."""
    network, config = new_student(teacher)
    network.to(teacher.device, dtype).requires_grad_(False).eval()
    return Student(network, teacher.tokenizer, config, "student")


def median_seconds(make: Callable[[], Any], device: torch.device, least: float) -> float:
    """Median time of at least two runs after a warm-up; on a GPU the second records a graph."""

    def run() -> None:
        make()
        if device.type == "cuda":
            torch.cuda.synchronize()

    for _ in range(1 + (device.type == "cuda")):
        run()
    times: list[float] = []
    while len(times) < 2 or (sum(times) <= least and len(times) < 63):
        times.append(frame.seconds_of(run))
    return statistics.median(times)


def matmul_floor(student: Student, batch: int, least: float) -> float:
    """Seconds of the network's matrix products alone for one forward pass.

    Every linear layer's product at every position, and both products of attention, at the rate of
    the largest linear layer of a block.
    """
    network = student.model
    positions = student.num_tokens + getattr(network.config, "cls_token_num", 1)
    rows = batch * positions
    linears = [
        module
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear) and not re.search("ada_lin|n_d_embed|cap_proj", name)
    ]
    flops = sum(2 * rows * layer.weight.numel() for layer in linears)
    width = linears[-1].in_features
    depth = getattr(network.config, "n_layer", getattr(network.config, "depth", 0))
    flops += depth * 4 * batch * positions**2 * width
    blocks = network.layers if hasattr(network, "layers") else network.blocks
    inside = {m for m in blocks.modules() if isinstance(m, nn.Linear)} & {*linears}
    weight = max((layer.weight for layer in inside), key=lambda tensor: tensor.numel())
    x = torch.randn(rows, weight.shape[1], device=weight.device).to(weight.dtype)
    # torch's own product or ddray's, whichever is faster here.
    with torch.no_grad():
        seconds = min(
            median_seconds(partial(product, x, weight, None), weight.device, least)
            for product in (F.linear, linear)
        )
    return flops * seconds / (2 * rows * weight.numel())


def read_floor(teacher: Teacher, rows: int, least: float) -> float:
    """Seconds to read what sampling token by token must read, from memory.

    At every token each weight of the blocks and of the head once, and the keys and values of all
    positions so far.

    Args:
        teacher: a LlamaGen.
        rows: sequences, the null ones of guidance included.
        least: least time of the measurement, s.
    """
    sizes = teacher.model.config
    read = (*teacher.model.layers.modules(), teacher.model.output)
    weights = [layer.weight for layer in read if isinstance(layer, nn.Linear)]
    weight_bytes = sum(weight.numel() * weight.element_size() for weight in weights)
    half_cache = rows * sizes.n_layer * sizes.dim * teacher.num_tokens * weights[0].element_size()
    # Far more than any cache holds.
    block = torch.ones(2**27, device=teacher.device)
    seconds = median_seconds(block.sum, teacher.device, least)
    rate = block.numel() * block.element_size() / seconds
    return (weight_bytes + half_cache) * teacher.num_tokens / rate


def bench(
    teacher: Teacher, student: Student, batch: int, only: set[str], least: float
) -> list[dict[str, Any]]:
    """One row a generator, from class ids (or captions) to tokens or codes, and the decoder."""
    device, cfg = teacher.device, max(teacher.default_cfg, 1.5)
    index = torch.arange(batch)
    cond: Any = index % max(teacher.num_classes, 1)
    if teacher.conditioning == "text":
        sizes = teacher.model.config
        shape = (batch, sizes.cls_token_num)
        cond = (torch.randn(*shape, sizes.caption_dim), torch.ones(shape))
    steps, jumps = len(teacher.stages), default_schedule(teacher.stages)
    codes = teacher.codebook[torch.zeros(batch, teacher.num_tokens, dtype=torch.long)]
    makers: dict[str, tuple[int, Callable[[], Tensor]]] = {
        "AR": (steps, lambda: teacher.sample(cond, index=index)),
        "AR, guided": (steps, lambda: teacher.sample(cond, cfg=cfg, index=index)),
        "trajectories, guided": (
            steps,
            lambda: teacher.trajectories(cond, index, seed=0, cfg=cfg),
        ),
        "student, 1 step": (1, lambda: student.generate(cond, index=index, schedule=jumps[:1])),
        "student, 2 steps": (2, lambda: student.generate(cond, index=index, schedule=jumps)),
        "decode": (1, lambda: teacher.decode(codes)),
    }
    if device.type == "cuda":
        eager = {f"{what}{EAGER}": maker for what, maker in makers.items() if what != "AR"}
        makers = {**makers, **eager}
    rows: list[dict[str, Any]] = []
    for what, (count, make) in makers.items():
        if only and not any(what.startswith(prefix) for prefix in only):
            continue
        teacher.graphs.enabled = student.graphs.enabled = not what.endswith(EAGER)
        with PeakGrowth(device) as growth:
            seconds = median_seconds(make, device, least)
        row = {
            "what": what,
            "batch": batch,
            "steps": count,
            "seconds": seconds,
            "ms_per_step": seconds / count * 1e3,
            "images_per_s": batch / seconds,
            "memory_mb": growth.bytes / 1e6,
        }
        if what == "student, 1 step":
            row["floor_ratio"] = seconds / matmul_floor(student, batch, least)
        if what.startswith("AR") and isinstance(teacher.model, LlamaGen):
            rows_of_network = batch * (2 if "guided" in what else 1)
            row["floor_ratio"] = seconds / read_floor(teacher, rows_of_network, least)
        rows.append(row)
    seconds_of = {row["what"]: row["seconds"] for row in rows}
    plain = seconds_of.get(f"AR, guided{EAGER}", seconds_of.get("AR, guided"))
    for row in rows:
        if plain and not row["what"].startswith("decode"):
            row["speedup"] = plain / row["seconds"]
    decoding = seconds_of.get("decode")
    for row in rows:
        if decoding and not row["what"].startswith("decode"):
            row["pixels_seconds"] = row["seconds"] + decoding
            row["pixels_per_s"] = batch / row["pixels_seconds"]
    return rows


def attention_backend(device: torch.device) -> str:
    """Which attention kernels torch may choose from: it picks by shape."""
    if device.type == "cpu":
        return "scaled_dot_product_attention of the CPU"
    cuda = torch.backends.cuda
    enabled = {
        "flash": cuda.flash_sdp_enabled(),
        "memory-efficient": cuda.mem_efficient_sdp_enabled(),
        "math": cuda.math_sdp_enabled(),
    }
    return ", ".join(name for name, on in enabled.items() if on)


def main() -> None:
    """Print the table; write it as JSON if asked."""
    parser = frame.arguments(__doc__)
    parser.add_argument("name", help="a teacher's name")
    parser.add_argument("--random-weights", action="store_true")
    parser.add_argument("--checkpoint")
    parser.add_argument("--tokenizer")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--decode-dtype", default="float32", help="of the decoder")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=1.0, help="least time of a figure")
    parser.add_argument("--only", nargs="*", default=[], help="rows that begin so")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.random_weights:
        teacher = random_teacher(args.name, args.device, args.dtype, args.decode_dtype)
    else:
        teacher = load_teacher(
            args.name,
            checkpoint=args.checkpoint,
            tokenizer=args.tokenizer,
            device=args.device,
            dtype=args.dtype,
            decode_dtype=args.decode_dtype,
        )
    student = student_of(teacher, getattr(torch, args.dtype))
    device = teacher.device
    # What the libraries allocate once, at their first product, is no memory of a row.
    for weight in (layer.weight for layer in student.model.modules() if type(layer) is Linear):
        linear(weight.new_zeros(2, weight.shape[1]), weight, None)
    where = frame.about("torch", device=device.type, note=f"{args.threads} thread(s)")
    only = set(args.only)
    result = {
        "name": args.name,
        "weights": "random" if args.random_weights else "loaded",
        "dtype": args.dtype,
        "decode_dtype": args.decode_dtype,
        **where,
        "attention": attention_backend(device),
        "rows": [row for n in args.batch for row in bench(teacher, student, n, only, args.seconds)],
    }
    frame.tell(result, f"{args.name}, {args.dtype}", (result["rows"], COLUMNS))
    print(f"attention: {result['attention']}")
    frame.write(args.json, result)


if __name__ == "__main__":
    main()
