"""Facts about every path of tensors on a CUDA device, without one.

torch's fake tensors have a device and a shape, and refuse to meet on two devices. What pulls a
number to the host is counted: in a hot path each such look lets a GPU run empty.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import ddray
from benchmarks.fake_device import FakeDevice
from ddray.config.distillation import DistillConfig
from ddray.config.evaluation import EvaluateConfig
from ddray.config.generation import GenerateConfig
from ddray.distillation.critics import new_critics
from ddray.distillation.distilled import DistilledDecoding
from ddray.distillation.masked import MaskedDecoding
from ddray.distillation.optimization import batch_loss
from ddray.distillation.perceptual import Perceptual
from ddray.distillation.step import Agreement, TrainingStep
from ddray.distillation.stream import Batch
from ddray.errors import ConfigError
from ddray.evaluation import look
from ddray.evaluation.feature_set import FeatureSet, HeldFeatures
from ddray.evaluation.generators import Generators
from ddray.evaluation.plan import EvaluationPlan, Generator
from ddray.evaluation.planning import Preparation
from ddray.evaluation.rows import student_row
from ddray.evaluation.student_check import _Beside, _FirstRows, code_features
from ddray.method.flow import full_float32
from ddray.method.masked_decoding import Masked
from ddray.method.model import Model, Tokenizer
from ddray.method.student import Student
from ddray.method.teacher import Teacher
from ddray.models import zoo
from ddray.models.zoo import load_student, load_teacher
from ddray.serving.rendering import ImageJob, Renderer
from ddray.sets.conditions import Conditions
from ddray.sets.images.making import make_plan, planned_student
from ddray.sets.images.orders import RowsOrder
from ddray.sets.makers import Maker, maker_on
from ddray.storage import open_storage
from tests.core.sets.trajectories.test_trajectory_set import plan_of
from tests.core.tiny import tiny_masked, tiny_student, tiny_teacher, tiny_var

pytestmark = pytest.mark.slow

FAMILIES: dict[str, tuple[Callable[[], Teacher], Callable[[], Student], str]] = {
    "llamagen": (tiny_teacher, tiny_student, "0,2"),
    "var": (tiny_var, lambda: tiny_var("var-dd"), "0,1"),
}


class Pair:
    """Teacher and student of a family on the device that is not here."""

    def __init__(self, family: str, device: str = "cuda", codec_on: str | None = None):
        self.family = family
        teacher, student, self.schedule = FAMILIES[family]
        self.jumps = tuple(map(int, self.schedule.split(",")))
        self.gpu = FakeDevice(device, num_evals=4)
        self.teacher: Teacher = self.gpu.model(teacher(), codec_on)
        self.student: Student = self.gpu.model(student(), codec_on)


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request: pytest.FixtureRequest) -> Pair:
    return Pair(request.param)


def test_the_device_that_is_not_here_refuses_the_host_and_counts() -> None:
    gpu = FakeDevice()
    with gpu.here() as meter:
        there, here = torch.ones(3, device="cuda"), torch.ones(3)
        with pytest.raises(RuntimeError, match="two devices, cuda:0 and cpu"):
            there + here
        assert (there.sum().item(), meter.waits) == (1, 1)
        assert not gpu.holds(there.cpu()) and meter.moves == {"to host": 1}
        assert meter.kernels == {"ones": 1, "sum": 1}


def test_a_teacher_is_looked_at_once_a_batch(pair: Pair) -> None:
    teacher, gpu = pair.teacher, pair.gpu
    with gpu.here() as meter:
        tokens = teacher.sample([1, 2], cfg=2.0, seed=1, top_k=3, top_p=0.9)
        assert gpu.holds(tokens) and tokens.shape == (2, teacher.num_tokens)
        assert meter.looks == {"teacher.py:_roll_out": 1}  # whether all logits were finite
        assert gpu.holds(teacher.trajectories([1, 2], [0, 1], cfg=2.0, seed=1))
        assert gpu.holds(teacher.sample([1, 2], cfg=2.0, seed=1, skip=2))
        assert meter.looks == {"teacher.py:_roll_out": 3}
        images = teacher.decode(tokens)
        assert gpu.holds(teacher.guided_logits([1, 2], tokens, 2.0), images, teacher.encode(images))
        # Whether tokens that come from the device are in range.
        assert meter.looks == {"teacher.py:_roll_out": 3, "model.py:_tokens": 2}
        assert not meter.moves["to host"]


def test_a_student_jumps_without_a_look(pair: Pair) -> None:
    student, gpu = pair.student, pair.gpu
    with gpu.here() as meter:
        codes = student.generate([1, 2], seed=1, schedule=pair.schedule)
        assert gpu.holds(codes, student.decode(codes))
        assert not meter.waits
        first, last = pair.jumps
        turns = f"{first},teacher:1-2,{max(2, last)}"
        with_teacher = {"teacher": pair.teacher, "cfg": 2.0}
        assert gpu.holds(student.generate([1, 2], seed=1, schedule=turns, **with_teacher))
        assert meter.looks == {"teacher.py:_roll_out": 1} and meter.waits == 1
        assert gpu.holds(*student.predict(codes, [0, 1], torch.ones(2, device="cuda")))


def test_masked_decoding_is_looked_at_once(pair: Pair) -> None:
    masked: Masked = pair.gpu.model(tiny_masked(FAMILIES[pair.family][0]()))
    with pair.gpu.here() as meter:
        tokens = masked.generate([1, 2], steps=2, seed=1, cfg=2.0)
        assert pair.gpu.holds(tokens)
        assert meter.looks == {"masked_decoding.py:generate": 1}  # whether all logits were finite
        assert not meter.moves["to host"]


def test_a_masked_model_learns_without_a_look(pair: Pair) -> None:
    config = DistillConfig(objective="masked", batch_size=4)
    masked: Masked = pair.gpu.model(tiny_masked(FAMILIES[pair.family][0]()))
    with pair.gpu.here() as meter:
        rows = a_batch(pair)
        meter.looks.clear()
        loss, figures = MaskedDecoding(config, pair.teacher).loss(masked.model, rows, step=0, row=0)
        assert pair.gpu.holds(loss, *figures.values())
        assert not meter.waits and not meter.moves["to host"]


def test_what_a_graph_records_asks_nothing_of_the_host(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds = set()
    with pair.gpu.here() as meter:

        def replayed(self: Model, kind: Any, work: Any, *given: Tensor) -> Any:
            work(*given)  # tables are made that later calls find
            before = meter.looks.copy(), meter.moves.copy()
            made = work(*given)
            assert (meter.looks, meter.moves) == before
            kinds.add(kind if isinstance(kind, str) else kind[0])
            return made

        monkeypatch.setattr(Model, "replayed", replayed)
        pair.teacher.sample([1, 2], cfg=2.0, seed=1, top_k=3, top_p=0.9)
        for skip in (2, len(pair.teacher.stages)):
            pair.teacher.sample([1, 2], cfg=2.0, seed=1, skip=skip)
        pair.teacher.trajectories([1, 2], [0, 1], cfg=2.0, seed=1)
        first, last = pair.jumps
        turns = f"{first},teacher:1-2,{max(2, last)}"
        codes = pair.student.generate([1, 2], schedule=turns, teacher=pair.teacher, cfg=2.0)
        pair.student.decode(codes)
    assert len(kinds) == 4, kinds


def test_a_pass_of_the_service_is_one_copy_to_the_host(pair: Pair) -> None:
    renderer = Renderer(pair.student, rows=2)
    vars(renderer)["sizes"] = (2,)
    jobs = [ImageJob(1, 0, 3), ImageJob(2, 5, 4)]
    order = RowsOrder("tiny", np.array([0, 1]), np.array([0, 1]), 3, "0", "tokens")
    for work in (lambda: renderer.images(jobs, "0"), lambda: renderer.rows(order)):
        # The very last step takes numbers, which a fake has not.
        with pair.gpu.here() as meter, pytest.raises(RuntimeError, match="numpy"):
            work()
        assert meter.moves["to host"] == meter.waits == 1


class PlainEngine:
    """What a step asks of an engine, by one optimizer of torch's."""

    def __init__(self, network: nn.Module):
        self.network = network.requires_grad_(True).train()
        self._optimizer = torch.optim.AdamW(network.parameters(), 1e-3)

    def __call__(self, *inputs: Any) -> tuple[Tensor, Tensor]:
        said: tuple[Tensor, Tensor] = self.network(*inputs)
        return said

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self, rate: float, step: int) -> None:
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=False)

    def discard(self) -> None:
        self._optimizer.zero_grad()


def a_batch(pair: Pair) -> Batch:
    """Rows of a set as the stream has them on its device."""
    teacher, device = pair.teacher, pair.gpu.type
    index = torch.arange(4, device=device)
    start = torch.randn(4, teacher.num_tokens, teacher.codebook.shape[1], device=device)
    tokens = torch.zeros(4, teacher.num_tokens, dtype=torch.long, device=device)
    return Batch(start, tokens, index % 3, index)


CRITICS: dict[str, Any] = {
    "score": {"weight": 1.0},
    "perceptual": {"weight": 1.0, "distance": "tokenizer"},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_training_step_is_looked_at_once(family: str) -> None:
    pair = Pair(family, "meta")
    config = DistillConfig(batch_size=4, steps=10, schedule=pair.jumps, **CRITICS)
    with pair.gpu.here() as meter:
        critics = new_critics(config, pair.teacher, plan_of(cfg=2.0), 8.0)
        for critic in critics:
            vars(critic)["update"] = lambda average: None  # fused Adam takes no such tensors
        agree, engine = Agreement(1, pair.teacher.device), PlainEngine(pair.student.model)
        step = TrainingStep(engine, DistilledDecoding(config, pair.teacher, critics), config, agree)
        batch = a_batch(pair)
        meter.looks.clear()
        figures, _ = step.take(batch, 0)
        assert figures is not None and pair.gpu.holds(*figures.values())
        assert meter.looks == {"step.py:take": 1}  # whether the loss is finite
        assert not meter.moves["to host"]
        # Its kernel adds row after row, in the rows' own dtype.
        assert not [name for name in meter.kernels if "index_put" in name]
    weights = pair.student.model.parameters()
    assert pair.gpu.holds(*(weight.grad for weight in weights if weight.grad is not None))


def test_losses_and_images_in_bfloat16(pair: Pair) -> None:
    config = DistillConfig(batch_size=4, precision="bfloat16", use_gpu=True, **CRITICS)
    perceptual = Perceptual(config, pair.teacher, code_precision=8.0)
    weights = {"logits_weight": 1.0, "code_weight": 1.0}
    teacher, network = pair.teacher, pair.student.model
    with pair.gpu.here(), torch.no_grad():
        batch = a_batch(pair)
        with torch.autocast("cuda", torch.bfloat16):
            losses = batch_loss(
                *(network, batch, teacher.stages, teacher.codebook),
                first=0,
                schedule=pair.jumps,
                **weights,
            )
        said = losses.prediction
        assert said.logits_BLV.dtype == torch.bfloat16 and said.codes_BLE.dtype == torch.float32
        assert all(pair.gpu.holds(value) for value in losses[:-1])
        assert pair.gpu.holds(*perceptual.loss(said)[1].values())


def test_an_evaluation_meets_on_one_device(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    sampling = {"cfg": 2.0, "top_k": 3}
    masked = pair.gpu.model(tiny_masked(FAMILIES[pair.family][0]()))
    turns = {"schedule": f"0,teacher:{len(pair.teacher.stages) - 1}-{len(pair.teacher.stages)}"}
    rows = (
        Generator("a", "teacher", 3, settings=sampling),
        Generator("b", "transport", 3, settings=sampling),
        Generator("c", "student", 3, settings={"schedule": pair.schedule}),
        Generator("d", "student", 3, settings={**turns, **sampling}),
        Generator("e", "skip", 3, settings={**sampling, "skip": 2}),
        Generator("f", "masked", 3, settings={"steps": 2}),
    )
    plan = EvaluationPlan(
        generators=rows, extractors=(), conditioning="class", classes=(0, 1, 2), seed=1
    )
    generators = Generators(
        *(FeatureSet(open_storage(str(tmp_path)), plan), "cuda"),
        teacher=pair.teacher,
        student=pair.student,
        masked=masked,
    )
    solve = pair.teacher.transport("ab4", None)
    monkeypatch.setattr(look, "Transport", lambda *_: solve)
    monkeypatch.setattr(look.Look, "_transport_cost", lambda *_: 1.0)
    with pair.gpu.here() as meter:
        for row in rows:
            images, content = generators.pixels(row, range(3))
            assert pair.gpu.holds(images, content) and images.dtype == torch.uint8
        assert not meter.moves["to host"]
        seen = look.Look(EvaluateConfig(count=3, transport_count=1), generators)
        transport = seen.transport()
        assert transport is not None and transport["tokens"] == pair.teacher.num_tokens
        assert not any(pair.gpu.holds(images) for _, images in seen.pictures())


def test_a_student_in_training_is_looked_at_on_its_device(pair: Pair, tmp_path: Path) -> None:
    student = pair.student
    rows = (Generator("teacher", "transport", 3), student_row(student, pair.schedule, 3))
    plan = EvaluationPlan(generators=rows, extractors=(), conditioning="class")
    features = HeldFeatures(open_storage(str(tmp_path)), plan)
    with pair.gpu.here():
        tokens = torch.zeros(3, student.num_tokens, dtype=torch.long)
        first = _FirstRows(1, torch.arange(3), tokens, Conditions(np.zeros(3, np.int32)))
        beside = _Beside(features, student, first)
        for row in rows:
            assert pair.gpu.holds(code_features(beside.codes(row, range(3))))
            assert pair.gpu.holds(beside.pixels(row, range(3))[0])


TOUCHES_THE_CODEBOOK: dict[str, Callable[[Teacher, Student], object]] = {
    "trajectories": lambda teacher, _: teacher.trajectories([1], [0], seed=1),
    "generate": lambda _, student: student.generate([1], seed=1),
}


def test_what_lies_on_the_wrong_device_is_found() -> None:
    """That the tests above can fail: the same paths with a tokenizer that stayed behind."""
    pair = Pair("llamagen", codec_on="cpu")
    for path in TOUCHES_THE_CODEBOOK.values():
        with pair.gpu.here(), pytest.raises(RuntimeError, match="device"):
            path(pair.teacher, pair.student)


LOADERS = ("load_teacher", "load_student", "planned_teacher", "planned_student")


def loads(folder: Path) -> Iterator[tuple[Path, ast.Call]]:
    """Every call by which a model is loaded, in the files of a folder."""
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in LOADERS:
                yield path, node


def test_no_job_takes_a_gpu_that_is_merely_there() -> None:
    """Whatever loads a model says where: on what was reserved, or on the CPU."""
    calls = [*loads(Path(ddray.__file__).parent)]
    assert len(calls) > 15
    for path, call in calls:
        named = {keyword.arg: keyword.value for keyword in call.keywords}
        by_place = call.args[1] if len(call.args) > 1 else None
        device = named.get("device", by_place)
        assert device is not None, f"{path}:{call.lineno} does not say on which device"
        assert ast.unparse(device) != "'auto'", f"{path}:{call.lineno} takes any GPU"


def test_dtypes_on_a_gpu_are_looked_at_before_any_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda _: (7, 5))
    monkeypatch.setattr("torch.cuda.get_device_name", lambda _: "Tesla T4")
    for dtype, refusal in (
        ("bfloat16", "Tesla T4 does not multiply bfloat16; give dtype=float16, or float32"),
        ("int8", "dtype='int8' is not one of auto, float32"),
    ):
        with pytest.raises(ConfigError, match=refusal):
            load_teacher("digits-var", device="cuda", dtype=dtype)


@pytest.mark.parametrize("device", ["auto", "cuda", "cuda:0"])
def test_attention_by_cudnn_is_off_wherever_a_gpu_is_taken(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # It would plan anew for every number of keys of a decoder, and give other bits elsewhere.
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda _: (9, 0))
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(True)
    try:
        with pytest.raises(ConfigError, match="dtype='int8' is not one of"):
            load_teacher("digits-var", device=device, dtype="int8")
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def test_what_makes_bits_on_a_gpu_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.get_device_name", lambda _: "NVIDIA L40S")
    monkeypatch.setattr("torch.version.cuda", "13.0")
    monkeypatch.setattr("torch.backends.cudnn.version", lambda: 92000)
    monkeypatch.setattr("torch.backends.cuda.cudnn_sdp_enabled", lambda: False)
    maker = maker_on(torch.device("cuda"))
    assert maker == Maker(
        "cuda", "NVIDIA L40S", torch.__version__, "13.0", "92000", "flash, efficient, math"
    )
    newer = replace(maker, cudnn="92100", attention="math")
    assert newer.is_like(maker) and not maker.is_like(replace(maker, device="NVIDIA A10G"))
    assert maker.differences(newer) == [
        "cudnn 92000 there, 92100 here",
        "attention flash, efficient, math there, math here",
    ]


DECODERS = {"float32": "float32", "bfloat16": "bfloat16", "float16": "float32"}


@pytest.mark.parametrize("dtype", DECODERS)
def test_who_serves_decodes_in_the_dtype_of_the_networks(dtype: str) -> None:
    config = GenerateConfig(student="digits-var-dd", dtype=dtype)
    plan = make_plan(config, load_student(config.student, device="cpu", dtype=dtype))
    evaluated = Preparation(EvaluateConfig(student=config.student, dtype=dtype)).models.values()
    models = [
        Renderer.load(config.student, dtype=dtype).student,
        planned_student(plan, "cpu"),
        *evaluated,
    ]
    assert plan.decode_dtype == DECODERS[dtype]
    for model in models:
        assert model.tokenizer.decode_dtype == getattr(torch, DECODERS[dtype])


def test_a_decoder_of_16_bits_stays_on_the_device_and_gives_float32(pair: Pair) -> None:
    tokenizer = Tokenizer(pair.student.tokenizer.module, decode_dtype=torch.bfloat16)
    shape = (2, pair.student.num_tokens, pair.student.codebook.shape[1])
    with pair.gpu.here() as meter:
        images = tokenizer.decode(torch.zeros(shape, device="cuda"))
        assert pair.gpu.holds(images) and images.dtype == torch.float32
        assert not meter.waits


def test_tf32_is_a_choice_on_gpus_that_have_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert EvaluateConfig(dtype="tf32").dtype == "tf32"
    refusal = "dtype=tf32 is of GPUs from compute capability 8.0 on; give float32 here"
    with pytest.raises(ConfigError, match=refusal):
        load_teacher("digits-var", device="cpu", dtype="tf32")
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda _: (7, 5))
    gpu = torch.device("cuda")
    with pytest.raises(ConfigError, match=refusal):
        zoo._dtype("tf32", gpu)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda _: (8, 0))
    products: Any = torch.backends.cuda.matmul
    before = products.fp32_precision
    try:
        assert zoo._dtype("tf32", gpu) == torch.float32 and products.fp32_precision == "tf32"
        with full_float32(gpu):
            assert products.fp32_precision == "ieee"  # the transport, and VAR's sums of codes
    finally:
        products.fp32_precision = before


def test_true_float32_is_of_convolutions_too() -> None:
    convolutions: Any = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    before = convolutions.fp32_precision
    with full_float32(torch.device("cpu")):
        assert convolutions.fp32_precision == torch.backends.cuda.matmul.fp32_precision == "ieee"
    assert convolutions.fp32_precision == before
