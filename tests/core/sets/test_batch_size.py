"""What `batch_size=auto` stands for: by the sizes of the model and the settings alone."""

import weakref
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.fake_device import FakeDevice
from ddray.config.generation import GenerateConfig
from ddray.config.sampling import SampleConfig
from ddray.errors import ConfigError
from ddray.models.zoo import empty_student, load_teacher
from ddray.sets.batch_size import batch_size, image_bytes
from ddray.sets.making import create_set
from ddray.sets.trajectories.making import make_plan
from ddray.sets.trajectories.trajectory_set import TrajectorySet
from tests.core.tiny import tiny_student, tiny_teacher, tiny_var
from tests.runtime.tiny import sampling, write_teacher


def test_on_cpus_it_is_what_it_always_was() -> None:
    network = empty_student("digits-llamagen")
    assert batch_size(SampleConfig(), network) == 100
    assert batch_size(GenerateConfig(), network) == 64
    assert batch_size(SampleConfig(batch_size=7, num_gpus=1), network) == 7


@pytest.mark.parametrize(
    ("model", "of_24_gb", "of_80_gb", "images"),
    [
        ("llamagen-b-256", 512, 512, 256),
        ("llamagen-l-256", 256, 512, 256),
        ("var-d16", 64, 256, 64),
        ("var-d20", 64, 256, 64),
        ("digits-llamagen", 512, 512, 1024),
    ],
)
def test_on_gpus_it_is_what_fits(model: str, of_24_gb: int, of_80_gb: int, images: int) -> None:
    network, job = empty_student(model), SampleConfig(num_gpus=1, dtype="bfloat16")
    assert batch_size(job, network) == of_24_gb
    large = job.model_copy(update={"gpu_gb": 80.0})
    assert batch_size(large, network) == of_80_gb
    assert batch_size(GenerateConfig(num_gpus=1), network) == images
    # Of what two actors on a GPU have, none takes more than its part.
    half = large.model_copy(update={"num_gpus": 0.5})
    assert batch_size(half, network) * image_bytes(half, network) < 0.6 * 40e9
    none = job.model_copy(update={"gpu_gb": 0.001})
    assert batch_size(none, network) == 1


class Live(TorchDispatchMode):
    """Follows the memory of a device: bytes of all tensors there that something refers to."""

    def __init__(self) -> None:
        super().__init__()
        self._tensors: Counter[int] = Counter()
        self._sizes: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor) and tensor.device.type == "cuda":
                storage = tensor.untyped_storage()
                self._tensors[storage._cdata] += 1
                self._sizes[storage._cdata] = storage.nbytes()
                weakref.finalize(tensor, self._drop, storage._cdata)
        self.peak = max(self.peak, sum(self._sizes.values()))
        return out

    def _drop(self, storage: int) -> None:
        self._tensors[storage] -= 1
        if not self._tensors[storage]:
            del self._sizes[storage]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llamagen", "var"])
def test_what_an_image_takes_is_about_what_is_reckoned(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = FakeDevice(num_evals=2)
    # As on a GPU: no scores in memory.
    attend = "torch.nn.functional.scaled_dot_product_attention"
    monkeypatch.setattr(attend, lambda query, *_, **__: torch.empty_like(query))
    wide = {"n_layer": 4, "dim": 64, "vocab_size": 64, "block_size": 16}
    of_family = {
        "llamagen": lambda: (tiny_teacher(**wide), tiny_student(**wide)),
        "var": lambda: (tiny_var(embed_dim=64), tiny_var("var-dd", embed_dim=64)),
    }
    teacher, student = (gpu.model(model) for model in of_family[family]())

    def taken(make: Any) -> float:
        peaks = []
        for count in (1, 5):
            with gpu.here(), Live() as live:
                make(torch.zeros(count, dtype=torch.long), torch.arange(count))
            peaks.append(live.peak)
        return (peaks[1] - peaks[0]) / 4

    filters = {"seed": 0, "cfg": 2.0, "top_k": 3, "top_p": 0.9}
    sampled = taken(lambda cond, index: teacher.trajectories(cond, index, **filters))
    generated = taken(lambda cond, index: student.generate(cond, index=index, seed=0))
    # Indices and noise, which are left out, are a part of so small a model's.
    assert 0.3 < sampled / image_bytes(SampleConfig(), teacher.model) < 1.1
    assert 0.3 < generated / image_bytes(GenerateConfig(), student.model) < 1.1


def test_a_set_keeps_the_batches_that_it_was_begun_with(tmp_path: Path) -> None:
    folder = write_teacher(tmp_path / "teacher")
    teacher = load_teacher(folder, device="cpu")

    def begin(**other: Any) -> int:
        config = sampling(folder, tmp_path / "set", **other)
        plan = make_plan(config, teacher)
        return create_set(TrajectorySet, config, plan, teacher, None).plan.batch_size

    assert begin(batch_size=8) == begin(batch_size="auto") == begin(batch_size="auto", num_gpus=1)
    assert begin(batch_size="auto", count=80) == 8
    with pytest.raises(ConfigError, match="another plan: batch_size is 8 there and 9 here"):
        begin(batch_size=9, count=80)
