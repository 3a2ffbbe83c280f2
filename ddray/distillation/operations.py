"""Operations of a training step, counted: the step is taken once, without numbers.

Shapes: B rows of a step, L tokens, V codebook size, E code width, T condition tokens.
"""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ddray.config.distillation import DistillConfig
from ddray.distillation.objective import new_objective
from ddray.distillation.stream import Batch
from ddray.method.conditioning import Captions, Condition
from ddray.method.model import Tokenizer
from ddray.method.teacher import Teacher
from ddray.sets.trajectories.plan import TrajectoryPlan


def step_operations(
    student: nn.Module, teacher: Teacher, config: DistillConfig, plan: TrajectoryPlan
) -> int:
    """Operations of a training step over all workers, those of critics included.

    Forward and backward passes are taken on the meta device, and torch counts their products and
    convolutions; a multiplication and an addition are two. The step is taken as one batch: into
    what parts workers and micro batches cut it does not matter. What activation checkpointing
    computes again is left out: that is no progress.

    Args:
        student: network in training, on any device, before blocks are compiled or recomputed.
        teacher: likewise.
        config: the job; of it batch size and objective.
        plan: of the set, whose guidance the critics judge with.
    """
    network, (model, codec) = _empty(student), _empty(teacher.model, teacher.tokenizer.module)
    empty = Teacher(model, Tokenizer(codec), teacher.config, teacher.name)
    # There is no autocast of the meta device, and it would change no operation.
    told = {"precision": "float32", "compile": False, "accumulation": 1}
    objective = new_objective(config.model_copy(update=told), empty, plan)
    rows, width = config.batch_size, empty.codebook.shape[1]
    with torch.device("meta"), _Counter() as counter:
        batch = Batch(
            torch.empty(rows, empty.num_tokens, width),
            torch.zeros(rows, empty.num_tokens, dtype=torch.int64),
            _condition(empty, rows),
            torch.zeros(rows, dtype=torch.int64),
        )
        objective.loss(network, batch, step=0, row=0)[0].backward()
    return counter.operations


class _Counter(TorchDispatchMode):
    """Adds up what torch's own formulas say of each operation.

    Not FlopCounterMode: its attribution to modules admits no gradient inside a forward pass, which
    the adversary takes.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        from torch.utils.flop_counter import flop_registry  # a second of imports

        self._formulas: Mapping[Any, Any] = flop_registry
        self.operations = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        formula = self._formulas.get(func.overloadpacket)
        if formula is not None:
            self.operations += int(formula(*args, **kwargs, out_val=out))
        return out


def _empty(*modules: nn.Module) -> Any:
    """Copies without memory on the meta device; what they share they share again."""
    memo: dict[int, Any] = {}
    for module in modules:
        for tensor in (*module.parameters(), *module.buffers()):
            empty = tensor.detach().to("meta")
            if isinstance(tensor, nn.Parameter):
                empty = nn.Parameter(empty, tensor.requires_grad)
            memo[id(tensor)] = empty
    copies = copy.deepcopy(modules, memo)
    return copies if len(copies) > 1 else copies[0]


def _condition(teacher: Teacher, rows: int) -> Condition:
    """Classes or captions of a batch, on the meta device."""
    if teacher.conditioning == "class":
        return torch.zeros(rows, dtype=torch.int64)
    sizes = teacher.model.config
    shape = (rows, sizes.cls_token_num)
    return Captions(torch.empty(*shape, sizes.caption_dim), torch.ones(shape, dtype=torch.bool))
