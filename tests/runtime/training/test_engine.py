"""The engine under every ZeRO stage, in two processes, against a plain torch loop in one."""

import multiprocessing
import os
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch._dynamo.utils import counters

from ddray.config.distillation import DistillConfig
from ddray.config.sampling import SampleConfig
from ddray.distillation.objective import new_objective
from ddray.distillation.optimization import (
    MovingAverage,
    batch_loss,
    compile_blocks,
    learning_rate,
    parameter_groups,
    set_learning_rate,
)
from ddray.distillation.step import Agreement, TrainingStep
from ddray.distillation.stream import Batch
from ddray.errors import CheckpointError
from ddray.method.teacher import Teacher
from ddray.models.zoo import new_student
from ddray.sets.trajectories.making import make_plan
from tests.core.tiny import tiny_teacher
from tests.patience import PATIENCE_S

pytestmark = pytest.mark.ray

STEPS, FEW, ROWS = 50, 12, 8
SCHEDULE = (0, 2)


@cache
def _teacher() -> Teacher:
    return tiny_teacher()


def _config(**other: Any) -> DistillConfig:
    values = {"batch_size": ROWS, "steps": STEPS, "ema_decay": 0.9, "lr": 2e-3, "threads": 1}
    return DistillConfig(**{**values, **other})


def _rows(step: int) -> Batch:
    """The batch of a step, the same in every process."""
    generator = torch.Generator().manual_seed(step)
    teacher = _teacher()
    length, width = teacher.num_tokens, teacher.codebook.shape[1]
    return Batch(
        torch.randn(ROWS, length, width, generator=generator),
        torch.randint(len(teacher.codebook), (ROWS, length), generator=generator),
        torch.randint(teacher.num_classes, (ROWS,), generator=generator),
        torch.arange(ROWS),
    )


def _loss(network: Any, batch: Batch, first: int) -> Any:
    teacher = _teacher()
    return batch_loss(
        network,
        batch,
        teacher.stages,
        teacher.codebook,
        first=first,
        schedule=SCHEDULE,
        logits_weight=1.0,
        code_weight=0.1,
    )


@cache
def _plain(steps: int, skip: int | None = None) -> tuple[list[float], dict[str, Any]]:
    """Losses and averaged weights of a loop without DeepSpeed."""
    config, teacher = _config(), _teacher()
    torch.manual_seed(0)
    network, _ = new_student(teacher)
    groups = parameter_groups(network, teacher.codebook, config.weight_decay)
    optimizer = torch.optim.AdamW(groups, config.lr, betas=(0.9, 0.95))
    average = MovingAverage(network.parameters(), config.ema_decay)
    losses = []
    for step in range(steps):
        if step == skip:
            continue
        loss = _loss(network, _rows(step), 0).total
        losses.append(loss.item())
        rate = learning_rate(step, config.steps, config.lr, config.warmup, config.decay)
        set_learning_rate(optimizer, rate)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), config.grad_clip)
        optimizer.step()
        average.update(network.parameters(), step)
    names = [name for name, _ in network.named_parameters()]
    return losses, dict(zip(names, average.average, strict=True))


class _Worker:
    """One process of a group: an engine and its part of every batch."""

    def __init__(self, rank: int, world: int, config: DistillConfig):
        from ddray.runtime.training.engine import Engine

        self.rank, self.world, self.config = rank, world, config
        torch.manual_seed(0)
        self.network, _ = new_student(_teacher())
        self.engine = Engine(self.network, _teacher().codebook, config, world)

    def steps(self, first: int, stop: int, skip: int | None = None) -> list[float]:
        """Losses, over all workers."""
        losses = []
        for step in range(first, stop):
            mine = _rows(step).split(self.world)[self.rank]
            total = 0.0
            for number, part in enumerate(mine.split(self.config.accumulation)):
                loss = _loss(self.engine, part, 0).total
                if step == skip and number == self.config.accumulation - 1:
                    self.engine.discard()
                    break
                self.engine.backward(loss)
                rate = learning_rate(step, STEPS, self.config.lr, self.config.warmup, 0.3)
                self.engine.step(rate, step)
                total += loss.item() / self.config.accumulation
            else:
                mean = torch.tensor(total)
                torch.distributed.all_reduce(mean)
                losses.append(mean.item() / self.world)
        return losses


def _train(rank: int, world: int, folder: str) -> dict[str, Any]:
    """What every case of stage and precision learned."""
    results: dict[str, Any] = {}
    for zero in range(4):
        worker = _Worker(rank, world, _config(workers=world, zero=zero))
        results[f"zero {zero}"] = (worker.steps(0, STEPS), worker.engine.averaged())
        config = _config(workers=world, zero=zero, accumulation=2)
        worker = _Worker(rank, world, config)
        results[f"skip {zero}"] = (worker.steps(0, FEW, skip=6), worker.engine.averaged())
    compiled = {"compile": True}
    others: dict[str, dict[str, Any]] = {
        "recomputed": {"activation_checkpointing": True},
        "compiled, recomputed": {"activation_checkpointing": True} | compiled,
        **{f"compiled {zero}": {"zero": zero} | compiled for zero in range(3)},
        "compiled, accumulated": {"accumulation": 2} | compiled,
    }
    # The same graph, without a minute of C++.
    graphs = partial(compile_blocks, backend="aot_eager")
    with mock.patch("ddray.runtime.training.engine.compile_blocks", graphs):
        for name, other in others.items():
            worker = _Worker(rank, world, _config(workers=world, **other))
            results[name] = (worker.steps(0, FEW), worker.engine.averaged())
    results["graphs"] = counters["stats"]["unique_graphs"]
    # Last: DeepSpeed remembers, in the process, that gradients once travelled in 16 bits.
    for precision in ("bfloat16", "float16"):
        for zero in range(4):
            worker = _Worker(rank, world, _config(workers=world, zero=zero, precision=precision))
            key = f"{precision} {zero}"
            results[key] = (worker.steps(0, FEW), worker.engine.averaged())
    return results


def _judged(rank: int, world: int, folder: str) -> dict[str, Any]:
    """Figures of every step beside two critics, over all workers."""
    critics = {name: {"weight": 1.0, "start": 2} for name in ("score", "adversary")}
    config = _config(workers=world, steps=8, schedule=SCHEDULE, **critics)
    teacher = _teacher()
    worker, agree = _Worker(rank, world, config), Agreement(world, torch.device("cpu"))
    torch.manual_seed(1)
    objective = new_objective(config, teacher, make_plan(SampleConfig(cfg=2.0), teacher))
    step = TrainingStep(worker.engine, objective, config, agree, rank=rank, workers=world)
    lines = []
    for number in range(config.steps):
        figures, _ = step.take(_rows(number).split(world)[rank], number)
        assert figures is not None
        means = agree.mean(torch.stack(list(figures.values())))
        lines.append(dict(zip(figures, means, strict=True)))
    return {"lines": lines}


def _resume(rank: int, world: int, folder: str) -> dict[str, Any]:
    """Losses without a break, and through a checkpoint."""
    results: dict[str, Any] = {}
    for zero in range(4):
        config = _config(workers=world, zero=zero)
        worker = _Worker(rank, world, config)
        before = worker.steps(0, 10)
        # All ranks write into one folder here, as Ray Train would merge theirs.
        worker.engine.save(f"{folder}/{zero}")
        averaged = worker.engine.averaged()
        results[f"whole {zero}"] = (before + worker.steps(10, 20), worker.engine.averaged())
        torch.distributed.barrier()
        again = _Worker(rank, world, config)
        again.engine.load(f"{folder}/{zero}", _share(averaged))
        results[f"again {zero}"] = (before + again.steps(10, 20), again.engine.averaged())
        results[f"average {zero}"] = ([], averaged)
    return results


def _share(averaged: dict[str, Any]) -> dict[str, Any]:
    """What rank 0 has, on every rank, as a file would give it."""
    values = [averaged]
    torch.distributed.broadcast_object_list(values)
    return values[0]


def _process(rank: int, world: int, case: str, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = str(rank)
    from ddray.runtime.training.engine import import_deepspeed

    import_deepspeed(use_gpu=False)
    # A file: a port that is free now may be taken by the time it is asked for.
    meeting = f"file://{folder}/{case}.meeting"
    torch.distributed.init_process_group("gloo", meeting, rank=rank, world_size=world)
    results = globals()[case](rank, world, folder)
    if rank == 0:
        torch.save(results, f"{folder}/{case}.pt")
    torch.distributed.destroy_process_group()
    # Nothing is left to do but C++'s own end, in which a thread of gloo's may still run: it aborts.
    os._exit(0)


def _in_processes(world: int, case: Callable[..., Any], folder: Path) -> dict[str, Any]:
    context = multiprocessing.get_context("spawn")
    arguments = [(rank, world, case.__name__, str(folder)) for rank in range(world)]
    processes = [context.Process(target=_process, args=given) for given in arguments]
    for process in processes:
        process.start()
    for process in processes:
        process.join(PATIENCE_S)
        assert process.exitcode == 0
    return torch.load(folder / f"{case.__name__}.pt", weights_only=False)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return _in_processes(2, _train, tmp_path_factory.mktemp("trained"))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def resumed(checkpoints: Path) -> dict[str, Any]:
    return _in_processes(2, _resume, checkpoints)


def _assert_same(result: Any, losses: list[float], average: dict[str, Any], rel: float) -> None:
    assert result[0] == pytest.approx(losses, rel=rel)
    assert {name for name, _ in average.items()} <= result[1].keys()
    for name, expected in average.items():
        torch.testing.assert_close(result[1][name], expected, atol=10 * rel, rtol=rel, msg=name)


@pytest.mark.parametrize("zero", range(4))
def test_two_workers_learn_over_50_steps_what_a_plain_loop_learns(
    trained: dict[str, Any], zero: int
) -> None:
    losses, average = _plain(STEPS)
    _assert_same(trained[f"zero {zero}"], losses, average, rel=1e-3)


@pytest.mark.parametrize("zero", range(4))
def test_a_discarded_step_leaves_no_trace_of_its_first_micro_batch(
    trained: dict[str, Any], zero: int
) -> None:
    losses, average = _plain(FEW, skip=6)
    _assert_same(trained[f"skip {zero}"], losses, average, rel=1e-3)


@pytest.mark.parametrize("zero", range(4))
@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_half_precision_learns_nearly_the_same(
    trained: dict[str, Any], precision: str, zero: int
) -> None:
    losses, _ = _plain(FEW)
    assert trained[f"{precision} {zero}"][0] == pytest.approx(losses, rel=0.05)


OTHER_WAYS = (
    "recomputed",
    "compiled, recomputed",
    *(f"compiled {zero}" for zero in range(3)),
    "compiled, accumulated",
)


@pytest.mark.parametrize("way", OTHER_WAYS)
def test_recomputed_and_compiled_blocks_learn_the_same(trained: dict[str, Any], way: str) -> None:
    losses, average = _plain(FEW)
    _assert_same(trained[way], losses, average, rel=1e-4)


def test_blocks_share_one_graph_for_each_size_of_batch(trained: dict[str, Any]) -> None:
    assert trained["graphs"] == 2


@pytest.mark.chaos
def test_critics_of_two_workers_say_what_those_of_one_say(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    one, two = (
        _in_processes(world, _judged, tmp_path_factory.mktemp("judged"))["lines"]
        for world in (1, 2)
    )
    beside = [line["loss"] - line["cross_entropy"] for line in one]
    # The weights of both losses are 0 for the first two steps.
    assert beside[2] > beside[1] + 0.5
    for name in ("loss", "imitator_nats", "teacher_nats", "discriminator", "cross_entropy_t0"):
        assert [x[name] for x in two] == pytest.approx([x[name] for x in one], rel=5e-3), name


@pytest.mark.chaos
@pytest.mark.parametrize("zero", range(4))
def test_a_loaded_checkpoint_goes_on_as_if_nothing_had_happened(
    resumed: dict[str, Any], zero: int
) -> None:
    _assert_same(resumed[f"again {zero}"], *resumed[f"whole {zero}"], rel=1e-6)


@pytest.mark.chaos
@pytest.mark.parametrize("zero", range(4))
def test_the_whole_weights_of_a_checkpoint_of_two_workers_serve_one(
    resumed: dict[str, Any], checkpoints: Path, zero: int
) -> None:
    from ddray.runtime.training.engine import whole_weights

    weights = whole_weights(str(checkpoints / str(zero)), zero)
    network, _ = new_student(_teacher())
    missing, unexpected = network.load_state_dict(weights, strict=False)
    assert not unexpected
    assert not {name for name, _ in network.named_parameters()} & {*missing}
    # The next loss is the one that the two workers had.
    loss = _loss(network, _rows(10), 0).total.item()
    assert loss == pytest.approx(resumed[f"whole {zero}"][0][10], rel=1e-4)


@pytest.mark.chaos
def test_a_checkpoint_that_lacks_a_part_is_refused_by_name(
    resumed: dict[str, Any], checkpoints: Path
) -> None:
    from ddray.runtime.training.engine import check_parts

    folder = checkpoints / "1"
    check_parts(str(folder), "s3://bucket/step-10")
    part = next(folder.rglob("*rank_1*optim_states.pt"))
    content = part.read_bytes()
    part.write_bytes(content[:-1])
    with pytest.raises(
        CheckpointError, match=r"step-10 has \d+ of \d+ bytes of deepspeed/.*rank_1"
    ):
        check_parts(str(folder), "s3://bucket/step-10")
    part.unlink()
    with pytest.raises(CheckpointError, match=r"step-10 lacks deepspeed/.*rank_1"):
        check_parts(str(folder), "s3://bucket/step-10")
    (folder / "parts.json").unlink()
    with pytest.raises(CheckpointError, match="is not whole"):
        check_parts(str(folder), "s3://bucket/step-10")
