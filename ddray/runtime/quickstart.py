"""All of ddray in one run: trajectories, a student, bulk images, an evaluation, a report.

Each part is the one that a cluster runs.
"""

import shlex
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

from ddray.config.distillation import DistillConfig
from ddray.config.evaluation import EvaluateConfig
from ddray.config.generation import GenerateConfig
from ddray.config.loading import in_todays_keys
from ddray.config.quickstart import QuickstartConfig
from ddray.config.sampling import SampleConfig
from ddray.evaluation.evaluate import evaluate
from ddray.evaluation.report import build_report, tables_as_text, write_evaluation
from ddray.method.seeding import next_seed
from ddray.runtime.cluster.connection import connect
from ddray.runtime.cluster.limits import cap_threads
from ddray.runtime.memory import PeakMemory
from ddray.runtime.pools.bulk import generate
from ddray.runtime.pools.sampling import sample
from ddray.runtime.training.driver import distill, read_history
from ddray.runtime.training.worker import STUDENT_FOLDER
from ddray.storage import open_storage
from ddray.storage.checkpoint import read_config
from ddray.storage.run_folder import claim
from ddray.text.loading import makes_emoji

T = TypeVar("T")

# Keys of the parts that `parts` sets, whatever they were told.
_PUT_IN = {"teacher", "student", "data", "out", "seed"}


def parts(
    config: QuickstartConfig,
) -> tuple[SampleConfig, DistillConfig, GenerateConfig, EvaluateConfig]:
    """The four jobs of a quickstart, with its teacher, seed and folder put in."""
    out = config.out
    data, run, student = f"{out}/trajectories", f"{out}/distill", f"{out}/{STUDENT_FOLDER}"
    return (
        config.sample.model_copy(
            update={"teacher": config.teacher, "out": data, "seed": config.seed}
        ),
        config.distill.model_copy(
            update={"teacher": config.teacher, "data": data, "out": run, "seed": config.seed}
        ),
        config.generate.model_copy(
            update={"student": student, "out": f"{out}/images", "seed": next_seed(config.seed)}
        ),
        config.evaluate.model_copy(
            update={
                "student": student,
                "teacher": config.teacher,
                "data": data,
                "out": f"{out}/evaluation",
            }
        ),
    )


def quickstart(config: QuickstartConfig) -> dict[str, Any]:
    """Run everything under one folder; a rerun goes on where the last one ended.

    Args:
        config: the job.

    Returns:
        What `summary.json` holds.

    Raises:
        DDRayError: whatever a part refuses or fails with.
    """
    started = time.monotonic()
    storage = open_storage(config.out)
    resolved = config.model_dump(mode="json")
    # Evaluation reads what is there; anything about it may change.
    identity = {part: resolved[part] for part in ("teacher", "seed")}
    for part in ("sample", "distill", "generate"):
        identity[part] = {k: v for k, v in resolved[part].items() if k not in _PUT_IN}
    advice = "use another --out, or delete it"
    claim(storage, resolved, identity, advice, partial(in_todays_keys, QuickstartConfig))
    sampling, distilling, generating, evaluating = parts(config)
    summary: dict[str, Any] = {"config": resolved}
    with PeakMemory() as memory:
        with connect():
            summary["trajectories"] = _stage("trajectories", lambda: sample(sampling))
            summary["distillation"] = _stage("distillation", lambda: distill(distilling))
            _copy_folder(f"{distilling.out}/{STUDENT_FOLDER}", f"{config.out}/{STUDENT_FOLDER}")
            summary["images"] = _stage("images", lambda: generate(generating))
        # Ray's processes are gone by now: speed is measured on a machine of one's own.
        cap_threads()
        evaluation = _stage("evaluation", lambda: evaluate(evaluating))
    evaluated, pictures = evaluation.summary, evaluation.pictures
    minutes, gigabytes = (time.monotonic() - started) / 60, memory.peak_bytes / 1e9
    summary |= {
        "evaluation": evaluated,
        "minutes": round(minutes, 2),
        "peak_memory_gb": round(gigabytes, 2),
    }
    of_emoji = makes_emoji(read_config(evaluating.student))
    report = build_report(
        evaluated,
        pictures,
        evaluation.columns,
        title=f"Distilled Decoding on {'emoji' if of_emoji else 'real digits'}",
        subtitle=f"{config.teacher}, distilled on this machine into a student of "
        f"one and two steps: {sampling.count} trajectories, "
        f"{distilling.steps} steps of {distilling.batch_size}",
        history=read_history(distilling.out),
        settings={
            "sample": sampling.model_dump(mode="json"),
            "distill": distilling.model_dump(mode="json"),
            "generate": generating.model_dump(mode="json"),
            "evaluate": evaluating.model_dump(mode="json"),
        },
        commands=[
            shlex.join(["ddray", "quickstart", "--teacher", config.teacher, "--out", config.out])
        ],
    )
    write_evaluation(config.out, summary, report, pictures, evaluation.columns)
    print(tables_as_text(evaluated))
    _say(f"{minutes:.1f} minutes, {gigabytes:.1f} GB; open {storage.join('report.html')}")
    return summary


def _stage(name: str, work: Callable[[], T]) -> T:
    """Say what comes, do it, say how long it took."""
    _say(f"{name} ...")
    started = time.monotonic()
    result = work()
    _say(f"{name} done in {time.monotonic() - started:.0f} s")
    return result


def _copy_folder(source: str, target: str) -> None:
    here, there = open_storage(source), open_storage(target)
    for name in sorted(here.list(), key=lambda n: n == "config.json"):
        there.write(name, here.read(name))


def _say(text: str) -> None:
    print(f"ddray: {text}", file=sys.stderr, flush=True)
