"""Facts about what DeepSpeed is told, which need no DeepSpeed."""

import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook

from ddray.config.distillation import DistillConfig
from ddray.runtime.training import engine
from ddray.runtime.training.engine import deepspeed_config


@pytest.mark.parametrize(("weights", "bucket"), [(10**6, 2**22), (310 * 10**6, 310 * 10**6 // 8)])
def test_deepspeed_is_told_what_a_gpu_needs(weights: int, bucket: int) -> None:
    config = DistillConfig(batch_size=16, zero=1, use_gpu=True, precision="bfloat16")
    told = deepspeed_config(config, 2, weights)
    assert told["train_micro_batch_size_per_gpu"] == 8
    assert told["timers"] == {"throughput": {"enabled": False}}
    zero = {"stage": 1, "overlap_comm": True, "reduce_bucket_size": bucket}
    assert told["zero_optimization"] == zero
    safe = told["torch_autocast"]["lower_precision_safe_modules"]
    # It looks for these very classes.
    for name in safe:
        module, _, kind = name.rpartition(".")
        assert getattr(importlib.import_module(module), kind)
    assert "ddray.models.linear.Linear" in safe


def test_on_cpus_gradients_do_not_overlap() -> None:
    told = deepspeed_config(DistillConfig(batch_size=16, zero=1), 2, 10**6)
    assert told["zero_optimization"] == {"stage": 1} and "torch_autocast" not in told


def test_without_zero_the_engine_clips_and_not_deepspeed() -> None:
    clips = [
        deepspeed_config(DistillConfig(zero=zero, grad_clip=0.5), 1, 10**6)["gradient_clipping"]
        for zero in range(4)
    ]
    assert clips == [0.0, 0.5, 0.5, 0.5]


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """A group of one process."""
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("alone")
def test_without_zero_gradients_travel_in_parts_and_on_gpus_in_bfloat16(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hooks: list[object] = []
    monkeypatch.setattr(
        engine.DistributedDataParallel,
        "register_comm_hook",
        lambda _, state, hook: hooks.append(hook),
    )
    network = nn.Sequential(*(nn.Linear(1024, 1024, bias=False) for _ in range(10)))
    for use_gpu, precision in ((False, "bfloat16"), (True, "float32"), (True, "float16")):
        config = DistillConfig(use_gpu=use_gpu, precision=precision)
        parallel = engine.in_parallel(network, config)
        assert not hooks
    # Ten million numbers in buckets of four.
    assert parallel.bucket_bytes_cap == 4 * 2**22
    engine.in_parallel(network, DistillConfig(use_gpu=True, precision="bfloat16"))
    assert hooks == [bf16_compress_hook]
