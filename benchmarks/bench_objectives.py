"""What each part of a student's objective is worth: Frechet distance after so many steps with it.

    python benchmarks/bench_objectives.py --teacher digits-llamagen --data URI --steps 400 \
        --start digits-llamagen-dd --row score [--json FILE]

Plain torch, one process: the step of `ddray distill` without Ray and DeepSpeed. All rows of a call
start from the same student and read the same batches; every row is one seed. Images are judged on a
seed that the final evaluation does not use. `--set key=value` overrides the config of all rows.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ddray.adversary import Adversary
from ddray.checkpoint import save_folder
from ddray.config import DistillConfig, load_config
from ddray.distill import (
    MovingAverage,
    TrajectoryBatches,
    batch_loss,
    default_code_precision,
    learning_rate,
    parameter_groups,
    set_learning_rate,
)
from ddray.generate import Student, Teacher
from ddray.metrics import DigitsMetric
from ddray.models.zoo import METRIC_FOLDER, continue_student, load_teacher, new_student
from ddray.score_distillation import ScoreDistillation
from ddray.shards import TrajectorySet

SELECTION_SEED = 555

FINE_TUNING = {"batch_size": 32, "lr": 5e-4, "ema_decay": 0.995, "decay": 0.4}

ROWS: dict[str, dict[str, Any]] = {
    "start": {},
    "plain": {},
    "score": {"score_weight": 1.0},
    "adversary": {"adversary_weight": 0.1},
}


def train(
    config: DistillConfig, teacher: Teacher, network: nn.Module, trajectories: TrajectorySet
) -> dict[str, Any]:
    """Run the steps of a config; `network` ends with the averaged weights."""
    plan = trajectories.plan
    batches = TrajectoryBatches(*trajectories.rows(0, plan.count), plan.seed, config.seed)
    precision = default_code_precision(teacher.stages)
    critics: list[Any] = []
    if config.score_weight:
        critics.append(ScoreDistillation(config, teacher, code_precision=precision, cfg=plan.cfg))
    if config.adversary_weight:
        critics.append(Adversary(config, teacher, code_precision=precision))
    optimizer = torch.optim.AdamW(
        parameter_groups(network, teacher.codebook, config.weight_decay),
        config.lr,
        betas=(0.9, 0.95),
        fused=True,
    )
    weights = [*network.parameters()]
    average = MovingAverage(weights, config.ema_decay)
    sums: dict[str, float] = {}
    began, cpu = time.monotonic(), time.process_time()
    for step in range(config.steps):
        rate = learning_rate(step, config.steps, config.lr, config.warmup, config.decay)
        set_learning_rate(optimizer, rate)
        losses = batch_loss(
            network,
            batches,
            teacher.stages,
            teacher.codebook,
            first=step * config.batch_size,
            count=config.batch_size,
            schedule=config.schedule or (0,),
            logits_weight=config.logits_weight,
            code_weight=config.code_weight,
        )
        total = losses.total
        logged = {"cross_entropy": losses.cross_entropy, "token_accuracy": losses.token_accuracy}
        for critic in critics:
            loss, scalars = critic.loss(losses.prediction)
            total, logged = total + loss, logged | scalars
        total.backward()
        nn.utils.clip_grad_norm_(weights, config.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        for critic in critics:
            critic.update()
        # As if far into a run: the average of a short one would forget its start too soon.
        average.update(weights, step + 10**6)
        for name, value in logged.items():
            sums[name] = sums.get(name, 0.0) + float(value) / config.log_every
        if (step + 1) % config.log_every == 0:
            print(f"{step + 1:6d}", *(f"{k} {v:.3f}" for k, v in sums.items()), flush=True)
            last, sums = sums, {}
    for weight, smooth in zip(weights, average.average, strict=True):
        weight.data.copy_(smooth)
    steps = max(config.steps, 1)
    return {
        **(last if config.steps >= config.log_every else {}),
        "seconds_per_step": (time.monotonic() - began) / steps,
        "cpu_seconds_per_step": (time.process_time() - cpu) / steps,
    }


@torch.no_grad()
def judge(student: Student, teacher: Teacher, schedules: list[tuple[int, ...]], count: int) -> Any:
    """Frechet distance and class accuracy along each schedule, and of the teacher's samples."""
    metric, index = DigitsMetric(METRIC_FOLDER), torch.arange(count)
    labels = index % teacher.num_classes

    def measure(make: Any) -> dict[str, float]:
        parts = zip(labels.split(64), index.split(64), strict=True)
        images: list[Tensor] = [teacher.decode(make(*part)) for part in parts]
        return metric(torch.cat(images), labels)

    rows = {}
    for schedule in schedules:

        def jump(cond: Tensor, rows: Tensor, schedule: tuple[int, ...] = schedule) -> Tensor:
            return student.generate(cond, index=rows, seed=SELECTION_SEED, schedule=schedule)

        rows[",".join(map(str, schedule))] = measure(jump)
    return rows


def main() -> None:
    """Train and judge the rows asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--teacher", default="digits-llamagen")
    parser.add_argument("--data", required=True)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--start", help="student to start from; absent = the teacher")
    parser.add_argument("--row", action="append", choices=[*ROWS], help="absent = all")
    parser.add_argument("--set", action="append", default=[], metavar="key=value")
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--json", type=Path, help="file that rows are added to")
    parser.add_argument("--save", help="folder of the last row's student")
    arguments = parser.parse_args()
    teacher = load_teacher(arguments.teacher, device="cpu")
    trajectories = TrajectorySet.open(arguments.data)
    for name in arguments.row or [*ROWS]:
        steps = 0 if name == "start" else arguments.steps
        values = {**FINE_TUNING, **ROWS[name]}
        config = load_config(DistillConfig, preset=values, settings=arguments.set)
        config = config.model_copy(update={"steps": steps})
        start = arguments.start
        network, card = continue_student(start, teacher) if start else new_student(teacher)
        figures = train(config, teacher, network, trajectories)
        card["code_precision"] = default_code_precision(teacher.stages)
        student = Student(network.eval(), teacher.tokenizer, card, name)
        schedule = config.schedule or (0,)
        schedules = [(0,), *((0, t) for t in schedule[1:])]
        row = {
            "row": name,
            "teacher": teacher.name,
            "start": start,
            "steps": steps,
            "settings": values,
            "set": arguments.set,
            "images": arguments.images,
            **figures,
            "quality": judge(student, teacher, schedules, arguments.images),
        }
        print(json.dumps(row))
        if arguments.json:
            with arguments.json.open("a") as file:
                file.write(json.dumps(row) + "\n")
        if arguments.save:
            card = {**card, "schedule": [*schedule], "teacher": teacher.name}
            state = network.state_dict()
            for implied in getattr(network, "constants", dict)():
                state.pop(implied)
            save_folder(arguments.save, card, model=state, tokenizer=teacher.tokenizer.state_dict())


if __name__ == "__main__":
    main()
