"""What a GPU makes of ddray, in order: is it right, and then how fast.

    make gpu                    # fifteen minutes at most
    make gpu ARGS=--quick       # four
    python benchmarks/gpu.py --tiny --out FOLDER    # on a CPU: that every part runs

One machine with a GPU is enough: Python >= 3.11, torch >= 2.11 with triton, numpy, pyarrow,
safetensors, psutil, pillow, pyyaml and pytest, and as wheels where they are missing pydantic,
pydantic-core, annotated-types and typing-inspection. Neither Ray nor DeepSpeed nor a network is
needed. Each part is a process with a time limit of its own, and leaves its results when the next
one fails: OUT/gpu-NAME.json and OUT/gpu-NAME.md, NAME being the GPU's.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import frame
import torch

from ddray.method.teacher import Teacher
from ddray.models.zoo import load_teacher
from ddray.report.table import Column, markdown_table

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


@dataclass(frozen=True)
class Size:
    """How much is measured.

    Attributes:
        device: that computes.
        models: whose speed is measured.
        llamagen: the LlamaGen of the other parts.
        var: their VAR.
        batches: of images.
        rows: of a training step.
        transport: rows of noise.
        codebooks: codes and their width.
        seconds: least time of a figure.
        weights: flags of bench_models.
        dtype: of the networks.
        part_s: time limit of a part, a factor.
    """

    device: str
    models: tuple[str, ...]
    llamagen: str
    var: str
    batches: tuple[int, ...]
    rows: int
    transport: tuple[int, ...]
    codebooks: tuple[tuple[int, int], ...]
    seconds: float
    weights: tuple[str, ...]
    dtype: str
    part_s: float


LLAMAGEN, VAR = "llamagen-l-256", "var-d16"
RANDOM = ("--random-weights",)
PUBLISHED = ((16384, 8), (4096, 32))
SIZES = {
    "full": Size(
        *("cuda", ("llamagen-b-256", LLAMAGEN, VAR), LLAMAGEN, VAR, (1, 8, 64, 256), 32),
        *((1, 64, 128, 129, 2112, 16384), PUBLISHED, 0.3, RANDOM, "bfloat16", 1.0),
    ),
    "quick": Size(
        *("cuda", (LLAMAGEN, VAR), LLAMAGEN, VAR, (1, 64), 32),
        *((1, 128, 129, 16384), PUBLISHED, 0.05, RANDOM, "bfloat16", 0.35),
    ),
    "tiny": Size(
        *("cpu", ("digits-var",), "digits-llamagen", "digits-var", (1,), 2),
        *((4,), ((64, 4),), 0.001, (), "float32", 1.0),
    ),
}


def teacher_of(size: Size, name: str, dtype: str) -> Teacher:
    """A teacher of published sizes with random weights, or a bundled one."""
    from bench_models import random_teacher

    if size.weights:
        return random_teacher(name, size.device, dtype)
    return load_teacher(name, device=size.device, dtype=dtype)


def stack(size: Size) -> dict[str, Any]:
    """What is installed, and which attention torch would take."""
    found: dict[str, Any] = frame.about("torch", device=size.device)
    if size.device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "gpu": properties.name,
            "memory_gb": properties.total_memory / 1e9,
            "multiprocessors": properties.multi_processor_count,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "attention_order": str(torch._C._get_sdp_priority_order()),
        }
    return found


def right(size: Size) -> dict[str, Any]:
    """The gpu tests."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-m",
        "gpu",
        "tests/gpu",
        "-q",
        "-p",
        "no:cacheprovider",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    lines = done.stdout.splitlines()
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    if done.returncode:
        print(done.stdout[-6000:], file=sys.stderr)
    return {"status": done.returncode, "said": lines[-1] if lines else "", "failed": failed}


def bits(size: Size) -> dict[str, Any]:
    """Which numbers of rows in a pass give an image the same bits, in each dtype."""
    from bench_models import student_of

    rows_of: dict[str, Any] = {}
    for name in (size.llamagen, size.var):
        for dtype in ("float32", size.dtype):
            teacher = teacher_of(size, name, dtype)
            student = student_of(teacher, getattr(torch, dtype))
            whole = student.generate([0] * 16, seed=1)
            tokens = teacher.tokenizer.module.nearest(whole)
            logits = teacher.guided_logits([0] * 16, tokens)
            found = {}
            for rows in (1, 2, 4, 8, 16):
                codes = student.generate([0] * rows, seed=1)
                again = teacher.guided_logits([0] * rows, tokens[:rows])
                found[rows] = {
                    "student": torch.equal(codes, whole[:rows]),
                    "teacher": torch.equal(again, logits[:rows]),
                }
            rows_of[f"{name} {dtype}"] = found
    return rows_of


def transport(size: Size) -> list[dict[str, Any]]:
    """The map from noise to tokens: time, and agreement with the float64 map."""
    from bench_models import median_seconds

    from ddray.method.flow import Transport

    found = []
    for vocab_size, width in size.codebooks:
        generator = torch.Generator().manual_seed(0)
        codes = torch.randn(vocab_size, width, generator=generator)
        codes = torch.nn.functional.normalize(codes, dim=-1).to(size.device)
        solve, exact = Transport(codes), Transport(codes, "exact")
        for rows in size.transport:
            noise = torch.randn(rows, width, generator=generator).to(size.device)
            logits = 2 * torch.randn(rows, vocab_size, generator=generator).to(size.device)
            seconds = median_seconds(lambda: solve(noise, logits), codes.device, size.seconds)  # noqa: B023
            part = slice(0, 256)
            same = solve(noise[part], logits[part]) == exact(noise[part], logits[part])
            found.append(
                {
                    "codes": f"{vocab_size} x {width}",
                    "rows": rows,
                    "ms": 1e3 * seconds,
                    "fused": solve.fused,
                    "agreement": float(same.double().mean()),
                }
            )
    return found


def models(size: Size) -> Iterator[tuple[str, dict[str, Any]]]:
    """Speed and memory of teachers, students and decoders."""
    for name in size.models:
        with tempfile.NamedTemporaryFile(suffix=".json") as file:
            command = [sys.executable, str(ROOT / "benchmarks" / "bench_models.py"), name]
            command += [*size.weights, "--device", size.device, "--dtype", size.dtype]
            command += ["--decode-dtype", size.dtype]
            command += ["--seconds", str(size.seconds), "--json", file.name]
            command += ["--batch", *map(str, size.batches)]
            subprocess.run(command, check=True, cwd=ROOT)
            yield name, json.loads(Path(file.name).read_text())


def step(size: Size) -> dict[str, Any]:
    """A training step of the VAR student: time, share of the peak, memory, its longest kernels."""
    from bench_models import median_seconds

    from ddray.cost import mfu
    from ddray.distillation.losses import Judge, judged
    from ddray.distillation.optimization import batch_loss, compile_blocks, parameter_groups
    from ddray.distillation.stream import Batch
    from ddray.method.schedule import default_schedule
    from ddray.method.seeding import standard_normal
    from ddray.models.sizes import step_flops
    from ddray.models.zoo import new_student

    teacher = teacher_of(size, size.var, "float32")
    network, _ = new_student(teacher)
    network.train().requires_grad_(True)
    optimizer = torch.optim.AdamW(
        parameter_groups(network, teacher.codebook, 0.01), 1e-4, fused=True
    )
    index = torch.arange(size.rows, device=size.device)
    shape = (teacher.num_tokens, teacher.codebook.shape[1])
    tokens = torch.randint(len(teacher.codebook), (size.rows, shape[0]), device=size.device)
    start = standard_normal(1, index, shape)
    batch = Batch(start, tokens, index % teacher.num_classes, index)

    judge: Judge = judged

    def one(first: int = 0) -> None:
        with torch.autocast(size.device, torch.bfloat16):
            losses = batch_loss(
                *(network, batch, teacher.stages, teacher.codebook),
                first=first,
                schedule=default_schedule(teacher.stages),
                logits_weight=1.0,
                code_weight=0.1,
                judge=judge,
            )
        losses.total.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    flops = step_flops(network, size.rows)
    found: dict[str, Any] = {"rows": size.rows, "flops": flops}
    device = torch.device(size.device)
    for name in ("eager", "compiled"):
        if name == "compiled":
            if size.device == "cpu":
                break
            judge = torch.compile(judged, fullgraph=True)
            network.skip_masked_tiles(torch.bfloat16)
            compile_blocks(network)
        if size.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        seconds = median_seconds(one, device, size.seconds)
        found[name] = {"ms": 1e3 * seconds, "rows_per_s": size.rows / seconds}
        if size.device == "cuda":
            found[name] |= {
                "peak_memory_gb": torch.cuda.max_memory_allocated() / 1e9,
                "mfu": mfu(flops, seconds, torch.cuda.get_device_name(), 1),
            }
            found[name]["kernels"] = longest(one)
    return found


def profile(size: Size) -> dict[str, Any]:
    """The longest kernels of some tokens, some scales and of decoding."""
    found = {}
    for name in (size.llamagen, size.var):
        teacher = teacher_of(size, name, size.dtype)
        teacher.stages, whole = teacher.stages[:4], teacher.stages
        cfg = max(teacher.default_cfg, 1.5)
        found[f"{name}, four stages"] = longest(
            lambda: teacher.trajectories([0], [0], seed=1, cfg=cfg)  # noqa: B023
        )
        teacher.stages = whole
        tokens = torch.zeros(8, teacher.num_tokens, dtype=torch.long)
        found[f"{name}, decode of 8"] = longest(lambda: teacher.decode(tokens))  # noqa: B023
    return found


def longest(work: Callable[[], Any], shown: int = 12) -> list[dict[str, Any]]:
    """Operations by their own time on the device, ms, and how often each ran."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    work()
    with torch.profiler.profile(activities=activities) as profiled:
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    key = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    events = sorted(profiled.key_averages(), key=lambda event: -getattr(event, key))[:shown]
    return [
        {"what": event.key[:80], "ms": getattr(event, key) / 1e3, "count": event.count}
        for event in events
    ]


# In this order, with the seconds that each may take.
PARTS: dict[str, tuple[Callable[[Size], Any], int]] = {
    "stack": (stack, 60),
    "right": (right, 150),
    "bits": (bits, 90),
    "transport": (transport, 60),
    "step": (step, 120),
    "models": (lambda size: dict(models(size)), 300),
    "profile": (profile, 60),
}


def run(name: str, size_name: str) -> dict[str, Any]:
    """A part in a process of its own, and how it ended."""
    limit = PARTS[name][1] * SIZES[size_name].part_s
    command = [sys.executable, __file__, f"--{size_name}", "--part", name]
    began = time.monotonic()
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        try:
            done = subprocess.run([*command, "--out", file.name], timeout=limit, check=False)
            ended = "well" if done.returncode == 0 else f"with status {done.returncode}"
        except subprocess.TimeoutExpired:
            ended = f"by its limit of {limit:.0f} s"
        text = Path(file.name).read_text()
    seconds = round(time.monotonic() - began, 1)
    return {"ended": ended, "seconds": seconds, "found": json.loads(text) if text else None}


def page(results: dict[str, Any]) -> str:
    """The tables, as docs/models.md shows them."""
    found = {name: part["found"] for name, part in results.items() if part["found"]}
    about = found.get("stack", {})
    lines = [f"# {about.get('machine', 'a machine')}, {about.get('date', '')}", ""]
    lines += [
        f"{name}: ended {part['ended']}, {part['seconds']} s" for name, part in results.items()
    ]
    if "transport" in found:
        columns = [Column(key, key) for key in ("codes", "rows", "fused")]
        columns += [Column("ms", "time", "ms", ".3f"), Column("agreement", "as float64", "", ".4f")]
        lines += ["", markdown_table(found["transport"], columns)]
    if "models" in found:
        from bench_models import COLUMNS

        for name, result in found["models"].items():
            lines += ["", f"{name}, {result['dtype']}", "", markdown_table(result["rows"], COLUMNS)]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run all parts, or one of them."""
    assert __doc__
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    sizes = parser.add_mutually_exclusive_group()
    for name in SIZES:
        sizes.add_argument(f"--{name}", dest="size", action="store_const", const=name)
    parser.add_argument("--part", choices=PARTS, help="this one alone, its result to OUT")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    args = parser.parse_args()
    size_name = args.size or "full"
    if args.part:
        args.out.write_text(json.dumps(PARTS[args.part][0](SIZES[size_name])))
        return
    if SIZES[size_name].device == "cuda" and not torch.cuda.is_available():
        sys.exit("there is no CUDA device here; --tiny runs every part on the CPU")
    args.out.mkdir(parents=True, exist_ok=True)
    machine = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    target = args.out / f"gpu-{re.sub(r'[^a-z0-9]+', '-', machine.lower()).strip('-')}"
    results: dict[str, Any] = {}
    for name in PARTS:
        print(f"--- {name}", flush=True)
        results[name] = run(name, size_name)
        target.with_suffix(".json").write_text(json.dumps(results, indent=2) + "\n")
        target.with_suffix(".md").write_text(page(results))
    print(page(results))
    bad = [name for name, part in results.items() if part["ended"] != "well"]
    failed = (results["right"]["found"] or {}).get("failed")
    if bad or failed:
        sys.exit(f"parts that did not end well: {', '.join(bad) or 'none'}; failed tests: {failed}")


if __name__ == "__main__":
    main()
