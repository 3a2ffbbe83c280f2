"""What each part of a student's objective is worth: Frechet distance after so many steps with it.

    python benchmarks/bench_objectives.py --data URI --start digits-llamagen-dd --steps 400 \
        --json benchmarks/results/objectives-digits-llamagen.json

The step of `ddray distill` in plain torch, one process, one thread. All rows start from the same
student and read the same batches; every row is one seed. The teacher's own samples are judged in
the same call. Of two jumps each is judged by itself too, beside a part of the teacher's: the tokens
that the second one keeps, and the second one on the teacher's tokens. Images have a seed that the
final evaluation does not use. `--set key=value` overrides the config of all rows; rows are added to
a file that has the same settings.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import frame
import torch
from torch import Tensor, nn

from ddray.config.distillation import DistillConfig
from ddray.config.loading import load_config
from ddray.distillation.critics import new_critics
from ddray.distillation.distilled import DistilledDecoding
from ddray.distillation.optimization import (
    MovingAverage,
    default_code_precision,
    parameter_groups,
    set_learning_rate,
)
from ddray.distillation.order import default_lanes
from ddray.distillation.step import Agreement, Means, TrainingStep
from ddray.distillation.stream import TrajectoryStream
from ddray.method.schedule import default_schedule
from ddray.method.student import Student
from ddray.method.teacher import Teacher
from ddray.metrics.fd_digits import DigitsMetric
from ddray.models.zoo import METRIC_FOLDER, continue_student, load_teacher, new_student
from ddray.report.table import Column
from ddray.sets.trajectories.trajectory_set import TrajectorySet

SELECTION_SEED = 555
TOGETHER = 64
LOG_EVERY = 20

FINE_TUNING = {"batch_size": 32, "lr": 5e-4, "ema_decay": 0.995, "decay": 0.4}

START = "start"
ROWS: dict[str, dict[str, Any]] = {
    START: {},
    "plain": {},
    "score": {"score": {"weight": 1.0}},
    "adversary": {"adversary": {"weight": 1.0}},
    "both": {"score": {"weight": 1.0}, "adversary": {"weight": 1.0}},
    "perceptual": {"perceptual": {"distance": "tokenizer"}},
}


class Bench:
    """Rows of one call: the same teacher, set, start and images.

    Args:
        args: of the command line.
    """

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.trajectories = TrajectorySet.open(args.data)
        self.plan = self.trajectories.plan
        self.teacher = load_teacher(self.plan.teacher, device="cpu")
        self.metric = DigitsMetric(METRIC_FOLDER)

    def config(self, row: str) -> DistillConfig:
        """The job of a row."""
        schedule = self.args.schedule or default_schedule(self.teacher.stages)
        values = {"steps": self.args.steps, "schedule": schedule, **FINE_TUNING, **ROWS[row]}
        values |= {"data": self.args.data, "init": self.args.start, "seed": self.args.seed}
        return load_config(DistillConfig, preset=values, settings=self.args.set)

    def settings(self) -> dict[str, Any]:
        """What rows of one table have in common."""
        varied = {key for row in ROWS.values() for key in row}
        common = self.config(START).model_dump(mode="json", exclude=varied | {"data", "out"})
        return {
            "config": common,
            "set": self.args.set,
            "plan_hash": self.plan.hash,
            "trajectories": self.plan.count,
            "images": self.args.count,
            "images_seed": SELECTION_SEED,
        }

    def judge(self, make: Callable[[Tensor, Tensor], Tensor]) -> dict[str, float]:
        """Figures of make(classes, indices), which gives tokens or codes."""
        index = torch.arange(self.args.count)
        labels = index % self.teacher.num_classes
        parts = zip(labels.split(TOGETHER), index.split(TOGETHER), strict=True)
        return self.metric(torch.cat([self.teacher.decode(make(*part)) for part in parts]), labels)

    @property
    def sampling(self) -> dict[str, Any]:
        """How the teacher was sampled for the set."""
        return {key: getattr(self.plan, key) for key in ("cfg", "top_k", "top_p", "temperature")}

    def judge_teacher(self) -> dict[str, float]:
        """Of the teacher, sampled as the set was."""
        return self.judge(
            lambda labels, index: self.teacher.sample(
                labels, seed=SELECTION_SEED, index=index, **self.sampling
            )
        )

    def judge_student(self, student: Student, schedule: str) -> dict[str, float]:
        """Of a student along a schedule, parts of the teacher's sampled as the set was."""
        involved = {"teacher": self.teacher, **self.sampling} if "teacher" in schedule else {}
        return self.judge(
            lambda labels, index: student.generate(
                labels, index=index, seed=SELECTION_SEED, schedule=schedule, **involved
            )
        )

    def row(self, name: str) -> dict[str, Any]:
        """Train a row and judge it along every schedule that it was trained for."""
        config, teacher = self.config(name), self.teacher
        assert config.schedule is not None
        torch.manual_seed(config.seed)
        start = config.init
        network, card = new_student(teacher) if start is None else continue_student(start, teacher)
        precision = config.code_precision
        if precision is None:
            precision = default_code_precision(teacher.stages)
        steps = 0 if name == START else config.steps
        load = frame.load()
        figures = train(config, steps, teacher, network, self.trajectories, precision)
        card = {**card, "code_precision": precision}
        student = Student(network.eval(), teacher.tokenizer, card, name)
        quality = {
            schedule: self.judge_student(student, schedule)
            for schedule in judged_schedules(config.schedule, len(teacher.stages))
        }
        loads = [load, frame.load()]
        return {
            "objective": ROWS[name],
            "steps": steps,
            **figures,
            "load": loads,
            "quality": quality,
        }


def judged_schedules(schedule: tuple[int, ...], stages: int) -> list[str]:
    """One jump, two, ...; and of two: the tokens that the second keeps, and the second, alone."""
    found = [",".join(map(str, schedule[:stop])) for stop in range(1, len(schedule) + 1)]
    if len(schedule) == 2:
        second = schedule[1]
        found += [f"0,teacher:{second}-{stages}", f"teacher:0-{second},{second}"]
    return found


class PlainEngine:
    """What moves the weights in one process: `Engine` without Ray and DeepSpeed.

    Args:
        network: the student.
        codebook_VE: float32.
        config: the job.
    """

    def __init__(self, network: nn.Module, codebook_VE: Tensor, config: DistillConfig):
        self._network, self._config = network, config
        self._weights = [*network.parameters()]
        groups = parameter_groups(network, codebook_VE, config.weight_decay)
        self._optimizer = torch.optim.AdamW(groups, config.lr, betas=(0.9, 0.95), fused=True)
        self._average = MovingAverage(self._weights, config.ema_decay)
        self._micro_batches = 0

    def __call__(self, x_BLE: Tensor, cond: Any, t_B: Tensor) -> tuple[Tensor, Tensor]:
        """The forward pass."""
        logits_BLV, codes_BLE = self._network(x_BLE, cond, t_B)
        return logits_BLV, codes_BLE

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of one micro batch."""
        (loss / self._config.accumulation).backward()

    def step(self, rate: float, step: int) -> None:
        """After every micro batch: after the last one of a step, move weights and average."""
        self._micro_batches += 1
        if self._micro_batches % self._config.accumulation:
            return
        set_learning_rate(self._optimizer, rate)
        nn.utils.clip_grad_norm_(self._weights, self._config.grad_clip)
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._average.update(self._weights, step)

    def discard(self) -> None:
        """Forget the gradients of the micro batches since the last step."""
        self._optimizer.zero_grad()
        self._micro_batches = 0

    @torch.no_grad()
    def take_average(self) -> None:
        """Put the averaged weights into the network."""
        for weight, smooth in zip(self._weights, self._average.average, strict=True):
            weight.copy_(smooth)


def train(
    config: DistillConfig,
    steps: int,
    teacher: Teacher,
    network: nn.Module,
    trajectories: TrajectorySet,
    code_precision: float,
) -> dict[str, float]:
    """Run the first steps of a job; `network` ends with the averaged weights."""
    assert config.schedule is not None
    torch.manual_seed(config.seed)
    critics = new_critics(config, teacher, trajectories.plan, code_precision)
    engine, alone = PlainEngine(network, teacher.codebook, config), Agreement(1, teacher.device)
    objective = DistilledDecoding(config, teacher, critics)
    take = TrainingStep(engine, objective, config, alone).take
    stream = TrajectoryStream(
        trajectories,
        batch_size=config.batch_size,
        seed=config.seed,
        code_width=teacher.codebook.shape[1],
        lanes=default_lanes(config.batch_size),
    )
    means, said = Means(), dict[str, float]()
    wall, cpu = time.perf_counter(), time.process_time()
    with stream:
        for step, batch in zip(range(steps), stream.batches(), strict=False):
            figures, loss = take(batch, step)
            if figures is None:
                raise SystemExit(f"the loss of step {step} is {loss}")
            means.add(figures)
            if (step + 1) % LOG_EVERY == 0 or step + 1 == steps:
                said, means = means.over(alone), Means()
                print(f"{step + 1:6d}", *(f"{k} {v:.3f}" for k, v in said.items()), flush=True)
    engine.take_average()
    if not steps:
        return {}
    return {
        **said,
        "seconds_per_step": (time.perf_counter() - wall) / steps,
        "cpu_seconds_per_step": (time.process_time() - cpu) / steps,
    }


def table(result: dict[str, Any]) -> tuple[list[dict[str, Any]], list[Column]]:
    """Rows and columns: distances, their ratios to the teacher's, accuracies, time of a step."""
    rows = result["rows"]
    schedules = [*next(iter(rows.values()))["quality"]]
    columns = [Column("name", "objective")]
    for schedule in schedules:
        if "teacher" in schedule:
            columns.append(Column(f"ratio {schedule}", f'"{schedule}", x teacher', "", ".2f"))
            continue
        columns += [
            Column(f"fd {schedule}", f'fd_digits, "{schedule}"', "", ".2f"),
            Column(f"ratio {schedule}", "x teacher", "", ".2f"),
            Column(f"accuracy {schedule}", "class accuracy", "%", ".1f"),
        ]
    columns += [
        Column("token_accuracy", "tokens", "%", ".1f"),
        Column("cpu", "CPU seconds a step", "", ".3f"),
    ]
    base = result["teacher"]["fd_digits"]
    lines = []
    for name, row in rows.items():
        line: dict[str, Any] = {"name": name, "cpu": row.get("cpu_seconds_per_step")}
        if "token_accuracy" in row:
            line["token_accuracy"] = 100 * row["token_accuracy"]
        for schedule, found in row["quality"].items():
            line[f"fd {schedule}"] = found["fd_digits"]
            line[f"ratio {schedule}"] = found["fd_digits"] / base
            line[f"accuracy {schedule}"] = 100 * found["class_accuracy"]
        lines.append(line)
    return lines, columns


def _earlier_rows(file: Path | None, settings: dict[str, Any]) -> dict[str, Any]:
    """Rows of a file that is being added to; ends the call where its settings are others."""
    if file is None or not file.exists():
        return {}
    earlier = json.loads(file.read_text())
    if earlier["settings"] != settings:
        raise SystemExit(f"{file} was measured with other settings; name another file")
    return dict(earlier["rows"])


def main() -> None:
    """Train and judge the rows asked for; print the table."""
    parser = frame.arguments(__doc__, json_help="file that rows are added to")
    parser.add_argument("--data", required=True, help="URI of the set, which names the teacher")
    parser.add_argument("--start", help="student to start from; absent = the teacher")
    parser.add_argument("--rows", default=",".join(ROWS), help="absent = all")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--schedule", help='such as "0,16"; absent = as `ddray distill`')
    parser.add_argument("--count", type=int, default=2000, help="images of each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--set", action="append", default=[], metavar="key=value")
    args = parser.parse_args()
    names = args.rows.split(",")
    unknown = [name for name in names if name not in ROWS]
    if unknown:
        parser.error(f"unknown row {unknown[0]!r}; known are {', '.join(ROWS)}")
    torch.set_num_threads(args.threads)
    bench = Bench(args)
    settings = bench.settings()
    rows = _earlier_rows(args.json, settings)
    result = {
        "settings": settings,
        **frame.about("torch", note=f"{args.threads} thread(s)"),
        "teacher": {"name": bench.teacher.name, **bench.judge_teacher()},
        "rows": rows,
    }
    for name in names:
        print(name, flush=True)
        rows[name] = bench.row(name)
        frame.write(args.json, result)
    fd, accuracy = result["teacher"]["fd_digits"], 100 * result["teacher"]["class_accuracy"]
    teacher = f"{bench.teacher.name}: fd_digits {fd:.2f}, class accuracy {accuracy:.1f} %"
    frame.tell(result, f"{teacher}, {args.count} images", table(result))


if __name__ == "__main__":
    main()
