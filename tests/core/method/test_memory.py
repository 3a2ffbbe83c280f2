"""Facts about memory that does not suffice: the number of images, and what to lower."""

from __future__ import annotations

from typing import Any, NoReturn

import pytest
import torch

from ddray.config.sampling import SampleConfig
from ddray.errors import ConfigError
from ddray.method.memory import in_memory
from ddray.serving.rendering import ImageJob, Renderer
from ddray.sets.trajectories.making import make_plan, sample_rows
from tests.core.tiny import tiny_student, tiny_teacher

CPU = torch.device("cpu")
FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def no_room(*_: Any, **__: Any) -> NoReturn:
    raise FULL


@pytest.mark.parametrize(
    "error", [FULL, MemoryError("no"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_the_number_of_images_and_what_to_lower_are_told(error: Exception) -> None:
    message = r"this machine does not suffice for 64 images at once; lower it \(.*\)$"
    with pytest.raises(ConfigError, match=message), in_memory(64, CPU, "lower it"):
        raise error


def test_other_errors_are_as_they_are() -> None:
    with pytest.raises(RuntimeError, match="^else$"), in_memory(1, CPU, "lower it"):
        raise RuntimeError("else")


def test_sampling_and_rendering_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, renderer = tiny_teacher(), Renderer(tiny_student())
    plan = make_plan(SampleConfig(teacher="tiny", count=8, batch_size=8), teacher)
    monkeypatch.setattr(teacher, "trajectories", no_room)
    with pytest.raises(ConfigError, match="8 images at once; make the set anew with a smaller"):
        sample_rows(teacher, plan, range(8))
    monkeypatch.setattr(renderer.student, "generate", no_room)
    # At its start already, when it looks for the sizes of its passes.
    with pytest.raises(ConfigError, match="8 images at once; lower max_batch_size, or give dtype"):
        renderer.images([ImageJob(0, 0, 0)], "0")
