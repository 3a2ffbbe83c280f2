"""What a plan asks of its teacher: a plan for a job, the teacher of a plan, tokens of its rows.

The bare loop of trajectory sampling, without Ray: the pool runs it in its actors, a recomputation
in this process.

Shapes: B rows of a batch, L all tokens.
"""

import numpy as np
import numpy.typing as npt
import torch

from ddray.config.sampling import SampleConfig
from ddray.method.memory import in_memory
from ddray.method.teacher import AskedFor, Teacher
from ddray.models.zoo import load_teacher
from ddray.sets.making import planned_fields, require_planned
from ddray.sets.trajectories.plan import TrajectoryPlan
from ddray.storage.caption_file import CaptionFile


def make_plan(
    config: SampleConfig, teacher: Teacher, captions: CaptionFile | None = None
) -> TrajectoryPlan:
    """Everything that decides the bytes of a trajectory set, but the captions themselves."""
    return TrajectoryPlan(
        teacher=teacher.name,
        teacher_fingerprint=teacher.fingerprint,
        cfg=teacher.default_cfg if config.cfg is None else config.cfg,
        top_k=config.top_k,
        top_p=teacher.default_top_p if config.top_p is None else config.top_p,
        temperature=config.temperature,
        solver=config.solver,
        num_evals=teacher.transport(config.solver, config.num_evals).num_evals,
        dtype=config.dtype,
        **planned_fields(config, teacher, captions),
    )


def planned_teacher(plan: TrajectoryPlan, device: str | torch.device) -> Teacher:
    """Load the teacher that a plan names, in the plan's dtype.

    Raises:
        ConfigError: if there is no such teacher here.
        ShardError: if it has other weights than the plan's.
    """
    teacher = load_teacher(plan.teacher, device=device, dtype=plan.dtype)
    require_planned(teacher, plan.teacher, plan.teacher_fingerprint, plan)
    return teacher


def sample_rows(
    teacher: Teacher, plan: TrajectoryPlan, rows: range, cond: AskedFor | None = None
) -> npt.NDArray[np.int64]:
    """Tokens of consecutive indices as the plan's settings give them, int64 [B, L].

    Args:
        teacher: the plan's.
        plan: of the set.
        rows: indices.
        cond: what the rows are asked for by; None = the plan's classes.
    """
    index = np.arange(rows.start, rows.stop)
    with in_memory(len(rows), teacher.device, "make the set anew with a smaller batch_size"):
        tokens = teacher.trajectories(
            torch.from_numpy(plan.label(index)) if cond is None else cond,
            torch.from_numpy(index),
            seed=plan.seed,
            cfg=plan.cfg,
            top_k=plan.top_k,
            top_p=plan.top_p,
            temperature=plan.temperature,
            solver=plan.solver,
            num_evals=plan.num_evals,
        )
    return tokens.cpu().numpy()
