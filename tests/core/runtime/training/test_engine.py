"""Facts about what DeepSpeed is told, which need no DeepSpeed."""

import importlib

import pytest

from ddray.config.distillation import DistillConfig
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
