"""Trajectories at scale: a plan, a pool of teachers, shards.

Imports ddray.config, captions, conditions, generate (through the zoo), shards, storage and the
pool.
"""

from typing import Any

import numpy as np
import torch

from ddray import __version__
from ddray.caption_file import CaptionFile
from ddray.captions import cut_captions
from ddray.conditions import (
    check_encoder,
    encoder_name,
    load_encoder,
    open_captions,
    read_conditions,
)
from ddray.config import SampleConfig
from ddray.errors import ShardError
from ddray.generate import AskedFor, Teacher
from ddray.models.zoo import load_teacher
from ddray.plan import Plan
from ddray.run_folder import SUMMARY_FILE, write_json
from ddray.runtime.pool import fill
from ddray.seeding import SCHEME
from ddray.shards import TrajectorySet
from ddray.storage import open_storage


def make_plan(config: SampleConfig, teacher: Teacher, captions: CaptionFile | None = None) -> Plan:
    """Everything that decides the bytes of a trajectory set, but the captions themselves."""
    vocab_size = len(teacher.codebook)
    return Plan(
        teacher=teacher.name,
        teacher_fingerprint=teacher.fingerprint,
        tokenizer_fingerprint=teacher.tokenizer.fingerprint,
        conditioning=teacher.conditioning,
        num_classes=teacher.num_classes,
        seed=config.seed,
        noise_scheme=SCHEME,
        cfg=teacher.default_cfg if config.cfg is None else config.cfg,
        top_k=config.top_k,
        top_p=config.top_p,
        temperature=config.temperature,
        solver=config.solver,
        num_evals=teacher.transport(config.solver, config.num_evals).num_evals,
        dtype=config.dtype,
        threads=config.threads,
        count=config.count,
        shard_rows=config.shard_rows,
        batch_size=config.batch_size,
        stages=teacher.stages,
        vocab_size=vocab_size,
        classes=config.classes,
        text_encoder=encoder_name(config, captions),
    )


def sample_rows(
    teacher: Teacher, plan: Plan, rows: range, cond: AskedFor | None = None
) -> np.ndarray:
    """Tokens [rows, L] of consecutive indices, as the plan's settings give them, int64.

    Args:
        teacher: the plan's.
        plan: of the set.
        rows: indices.
        cond: what the rows are asked for by; None = the plan's classes.
    """
    index = np.arange(rows.start, rows.stop)
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


class TrajectoryWorker:
    """An actor's teacher, which writes whole shards.

    Args:
        uri: of the trajectory set.
        device: "auto", "cpu" or "cuda".
    """

    def __init__(self, uri: str, device: str):
        self._set = TrajectorySet.open(uri)
        plan = self._set.plan
        self._teacher = load_teacher(plan.teacher, device=device, dtype=plan.dtype)
        for what, here, there in (
            ("network", self._teacher.fingerprint, plan.teacher_fingerprint),
            ("tokenizer", self._teacher.tokenizer.fingerprint, plan.tokenizer_fingerprint),
        ):
            if here != there:
                raise ShardError(f"{plan.teacher} on this worker has another {what} than the plan")
        self._encode = load_encoder(plan, self._teacher)

    def do(self, shard: int) -> int:
        """Sample and write one shard."""
        plan = self._set.plan
        conditions = read_conditions(self._set, [shard], self._encode)
        index = np.asarray(plan.shard_range(shard))
        tokens = [
            sample_rows(self._teacher, plan, rows, conditions.of(np.asarray(rows) - index[0]))
            for rows in plan.batches(shard)
        ]
        self._set.write_shard(
            shard, index, conditions.label, np.concatenate(tokens).astype(plan.token_dtype)
        )
        return len(index)


def estimate(config: SampleConfig) -> dict[str, Any]:
    """What a run will write, for `--dry-run`."""
    teacher = load_teacher(config.teacher, device="cpu", dtype=config.dtype)
    plan = make_plan(config, teacher, open_captions(config, teacher))
    bytes_per_token = np.dtype(plan.token_dtype).itemsize
    return {
        "shards": plan.num_shards,
        "stages_per_image": len(plan.stages),
        "megabytes": round(plan.count * plan.num_tokens * bytes_per_token / 1e6, 2),
    }


def sample(config: SampleConfig) -> dict[str, Any]:
    """Fill a trajectory set: plan, refuse what cannot work, sample what is missing, prove it whole.

    Args:
        config: the job.

    Returns:
        Summary: what is there, what was made, and how fast.

    Raises:
        ConfigError: another plan at the URI, or settings or captions that do not fit.
        StorageError: the URI cannot be written, or the captions not read.
        ClusterError: Ray cannot start, or the pool keeps failing.
        ShardError: shards are missing although the pool finished.
    """
    storage = open_storage(config.out)
    storage.check_writable()
    teacher = load_teacher(config.teacher, device="cpu", dtype=config.dtype)
    captions = open_captions(config, teacher)
    plan = make_plan(config, teacher, captions)
    if captions is not None:
        check_encoder(plan, teacher)
        captions.check(plan.count)
    trajectories = TrajectorySet.create(config.out, plan)
    plan = trajectories.plan
    if captions is not None:
        cut_captions(captions, storage, plan)
    filled = fill("trajectories", trajectories, TrajectoryWorker, config)
    summary = {
        "uri": trajectories.uri,
        "ddray_version": __version__,
        "plan_hash": plan.hash,
        "teacher": plan.teacher,
        "rows": plan.count,
        **filled.summary(),
    }
    write_json(storage, SUMMARY_FILE, summary)
    return summary
