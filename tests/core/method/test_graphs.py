"""Facts about passes that a GPU may replay: they are work on their tensors alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

import ddray
from ddray.method import graphs
from ddray.method.model import Model
from tests.core.tiny import tiny_student, tiny_teacher

Recorded = dict[Any, Any]


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Recorded:
    """Every pass is traced when its kind is first met; from then on its operations are replayed.

    A trace keeps what a CUDA graph keeps: operations and the memory of all that is not given. What
    the host decided by numbers, or made of its own, is in it as it was.
    """
    traces: Recorded = {}

    def replayed(self: Model, kind: Any, work: graphs.Pass, *given: Tensor) -> Any:
        key = (id(self), kind, *(tensor.shape for tensor in given))
        if key not in traces:
            traces[key] = make_fx(lambda *tensors: work(*tensors))(*map(torch.clone, given))
        return traces[key](*given)

    monkeypatch.setattr(Model, "replayed", replayed)
    return traces


@pytest.mark.slow
def test_a_replayed_teacher_writes_what_it_would_have_written(
    recorded: Recorded, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = tiny_teacher()
    rules = {"cfg": 2.0, "top_k": 6, "top_p": 0.9, "temperature": 1.1}

    def all_three(cond: list[int], index: list[int], seed: int) -> Tensor:
        sampled = teacher.sample(cond, index=index, seed=seed, cfg_interval=1, **rules)
        skipped = teacher.sample(cond, index=index, seed=seed, skip=2, **rules)
        carried = teacher.trajectories(cond, index, seed=seed, **rules)
        return torch.cat((sampled, skipped, carried))

    calls = [([0, 1, 2], [0, 1, 2], 1), ([3, 3, 0], [9, 2**40, 5], 7)]
    replayed = [all_three(*call) for call in calls]
    assert len(recorded) == 3  # one of each kind, for both calls
    monkeypatch.undo()
    for call, tokens in zip(calls, replayed, strict=True):
        assert torch.equal(tokens, all_three(*call))


@pytest.mark.slow
def test_a_replayed_student_and_decoder_too(
    recorded: Recorded, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, teacher = tiny_student(), tiny_teacher()
    calls = [([0, 1], [0, 1], 1), ([3, 2], [7, 5], 2)]

    def images(cond: list[int], index: list[int], seed: int) -> Tensor:
        codes = student.generate(
            cond, index=index, seed=seed, schedule="0,teacher:1-2,2", teacher=teacher, cfg=2.0
        )
        return student.decode(codes)

    replayed = [images(*call) for call in calls]
    assert len(recorded) == 4  # two jumps, the teacher's part, the decoder
    monkeypatch.undo()
    for call, made in zip(calls, replayed, strict=True):
        assert torch.equal(made, images(*call))


@pytest.mark.slow
def test_var_is_replayed_scale_by_scale(
    recorded: Recorded, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = ddray.load_teacher("digits-var", device="cpu")
    calls = [([0, 1], [0, 1]), ([7, 2], [8, 3])]
    replayed = [teacher.trajectories(*call, seed=1, cfg=2.0) for call in calls]
    assert len(recorded) == 1
    monkeypatch.undo()
    for call, tokens in zip(calls, replayed, strict=True):
        assert torch.equal(tokens, teacher.trajectories(*call, seed=1, cfg=2.0))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there it works")
def test_where_recording_fails_work_goes_on_with_one_line() -> None:
    passes, x = graphs.Graphs("toy"), torch.arange(3.0)

    def run() -> Tensor:
        (doubled,) = passes.run("double", lambda x: (x * 2,), x)
        return doubled

    with torch.no_grad():
        assert torch.equal(run(), 2 * x)
        with pytest.warns(UserWarning, match="^toy runs without CUDA graphs, .*batches: ") as told:
            assert torch.equal(run(), 2 * x)
        assert len(told) == 1 and "\n" not in str(told[0].message)
        assert torch.equal(run(), 2 * x)
    assert not passes.enabled and not len(passes)
