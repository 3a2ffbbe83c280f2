"""The plan of a trajectory set that no teacher made, for benchmarks of what surrounds one."""

from ddray.sets.trajectories.plan import TrajectoryPlan


def random_plan(
    count: int,
    shard_rows: int,
    stages: tuple[int, ...],
    vocab_size: int,
    num_classes: int = 1000,
) -> TrajectoryPlan:
    """A plan of the given sizes; its rows may be any tokens."""
    return TrajectoryPlan(
        teacher="random",
        teacher_fingerprint="none",
        tokenizer_fingerprint="none",
        conditioning="class",
        num_classes=num_classes,
        seed=0,
        noise_scheme="none",
        cfg=4.0,
        top_k=0,
        top_p=1.0,
        temperature=1.0,
        solver="ab4",
        num_evals=48,
        dtype="float32",
        threads=1,
        count=count,
        shard_rows=shard_rows,
        batch_size=2,
        stages=stages,
        vocab_size=vocab_size,
    )
