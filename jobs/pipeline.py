"""All stages of a student: trajectories, distillation, images, evaluation.

    ray job submit --working-dir jobs -- python pipeline.py configs/digits-pipeline.yaml

The file has a config under the name of each stage, and leaves out what is not to run. Each stage asks for
its own resources, as if it were submitted alone. With `follow: true` under `distill`, the student trains
while its trajectories are still being sampled. Submitted again, it goes on from what is written.
"""

import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

from ddray.storage import open_storage

STAGES = ("sample", "distill", "generate", "evaluate")


def start(stage: str, config: dict[str, Any]) -> subprocess.Popen[bytes]:
    """Begin one stage in a process of its own."""
    with tempfile.NamedTemporaryFile("w", suffix=".yaml", delete=False) as file:
        yaml.safe_dump(config, file)
    return subprocess.Popen([sys.executable, "-m", "ddray.cli", stage, "--config", file.name])


def main(path: str) -> int:
    """Exit status: that of the first stage that failed, or 0."""
    parts = yaml.safe_load(Path(path).read_text("utf-8"))
    unknown = set(parts) - set(STAGES)
    if unknown:
        sys.exit(f"{path}: no stage is called {', '.join(sorted(unknown))}; there are {STAGES}")
    running: list[subprocess.Popen[bytes]] = []

    def stop(number: int, frame: object) -> None:
        for process in running:
            process.send_signal(number)

    signal.signal(signal.SIGTERM, stop)
    for stage in (stage for stage in STAGES if stage in parts):
        running.append(start(stage, parts[stage]))
        ahead = stage == "sample" and parts.get("distill", {}).get("follow")
        while ahead and running[-1].poll() is None:
            if "manifest.json" in open_storage(parts[stage]["out"]).list():
                break
            time.sleep(1)
        else:
            for process in running:
                if process.wait():
                    stop(signal.SIGTERM, None)
                    return process.returncode
            running.clear()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
