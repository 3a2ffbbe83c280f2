"""All stages of a student: trajectories, distillation, images, evaluation.

    ray job submit --working-dir jobs -- python pipeline.py --config configs/digits-pipeline.yaml

The file names the config of each stage that is to run, beside itself; other flags, such as
`--set node_pool=null`, go to every stage. Each asks for its own resources, as if it were submitted
alone. With `overlap: true` the student trains while its
trajectories are still being sampled. Submitted again, it goes on from what is written;
`ray job stop` leaves it so.
"""

import argparse
import signal
import subprocess
import sys
import time
from pathlib import Path

import yaml

from ddray.config.sampling import SampleConfig
from ddray.storage import open_storage

STAGES = ("sample", "distill", "generate", "evaluate")


def start(stage: str, file: Path, *flags: str) -> subprocess.Popen[bytes]:
    """Begin one stage in a process of its own."""
    print(f"pipeline: {stage} --config {file}", *flags, file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "ddray.cli", stage, "--config", str(file), *flags]
    return subprocess.Popen(command)


def stop(running: list[subprocess.Popen[bytes]]) -> None:
    """Tell all that run to end, and wait until they have."""
    for process in running:
        if process.poll() is None:
            process.terminate()
    for process in running:
        process.wait()


def wait(running: list[subprocess.Popen[bytes]]) -> int:
    """Exit status: 0, or that of the first process that fails."""
    while any(process.poll() is None for process in running):
        if any(process.poll() for process in running):
            break
        time.sleep(0.2)
    return next((process.returncode for process in running if process.returncode), 0)


def run(
    files: dict[str, Path], overlap: bool, flags: list[str], running: list[subprocess.Popen[bytes]]
) -> int:
    """Exit status: that of the first stage that fails, or 0."""
    for stage in (stage for stage in STAGES if stage in files):
        beside = overlap and stage == "sample"
        # A set can be followed as soon as it has a plan.
        out = yaml.safe_load(files[stage].read_text("utf-8"))["out"] if beside else None
        more = ["--follow"] if overlap and stage == "distill" else []
        if "--dry-run" in flags and stage == "distill" and "sample" in files:
            # What training takes can be told before there is a set, by the teacher's sizes.
            sampling = SampleConfig(**yaml.safe_load(files["sample"].read_text("utf-8")))
            more += ["--teacher", sampling.teacher]
        running.append(start(stage, files[stage], *more, *flags))
        if out is not None:
            while running[0].poll() is None and not open_storage(out).exists("manifest.json"):
                time.sleep(1)
            if not running[0].poll():
                continue
        if status := wait(running):
            return status
        running.clear()
    return 0


def main() -> int:
    """Exit status: that of the first stage that failed, or 0."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, required=True)
    arguments, flags = parser.parse_known_args()
    path = arguments.config
    parts = yaml.safe_load(path.read_text("utf-8"))
    overlap = parts.pop("overlap", False)
    files = {stage: path.with_name(name) for stage, name in parts.items()}
    if unknown := set(files) - set(STAGES):
        sys.exit(f"{path}: no stage is called {', '.join(sorted(unknown))}; there are {STAGES}")
    running: list[subprocess.Popen[bytes]] = []
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        return run(files, overlap, flags, running)
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        stop(running)


if __name__ == "__main__":
    sys.exit(main())
