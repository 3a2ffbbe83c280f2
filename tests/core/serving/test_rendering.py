"""An image depends on its own job alone, whatever shares the pass, and is the one of the model."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ddray.errors import CheckpointError, ConfigError
from ddray.method.seeding import noise
from ddray.method.student import Student
from ddray.method.teacher import Teacher
from ddray.report.pictures import to_uint8
from ddray.serving.rendering import ImageJob, Renderer
from ddray.sets.images.orders import RowsOrder
from ddray.storage.checkpoint import save_folder
from tests.core.tiny import (
    DrawnEncoder,
    student_config,
    student_state,
    teacher_config,
    teacher_state,
    tiny_student,
    tiny_teacher,
    tiny_var,
    tokenizer_state,
    write_text_encoder,
)

pytestmark = pytest.mark.slow

TEXT = {"cls_token_num": 5, "caption_dim": 3}
# Wide enough that a CPU sums several rows in another order than one. The students read half of
# their tokens only, so that every bit of the codes behind shows in the image.
WIDE = {"dim": 64, "n_head": 4, "block_size": 16}
FAMILIES: dict[str, Callable[[], tuple[Student, Teacher]]] = {
    "llamagen": lambda: (_half_read(tiny_student(**WIDE), 8), tiny_teacher(**WIDE)),
    "var": lambda: (
        _half_read(tiny_var("var-dd", embed_dim=64, num_heads=4), 1),
        tiny_var(embed_dim=64, num_heads=4),
    ),
}
ALONE = {"llamagen": ("0", "0,8"), "var": ("0", "0,1")}
TAUGHT = {
    "llamagen": ("0,teacher:4-8,8", "teacher:0-8,8", "teacher:0-16", "teacher"),
    "var": ("0,teacher:1-2,2", "teacher:0-1,1", "teacher:0-3", "teacher"),
}


def _half_read(student: Student, stages: int) -> Student:
    student.config = {**student.config, "split": stages}
    return student


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def renderer(family: str) -> Renderer:
    return Renderer(*FAMILIES[family]())


def _teacher(renderer: Renderer) -> Teacher:
    assert renderer.teacher is not None
    return renderer.teacher


def _check_company(
    renderer: Renderer, jobs: list[ImageJob], schedule: str, counts: Iterable[int]
) -> None:
    alone = [renderer.images([job], schedule)[0] for job in jobs]
    assert len({image.tobytes() for image in alone}) > len(jobs) // 2  # few codes, some twice
    places = np.random.default_rng(0)
    for count in counts:
        order = places.permutation(len(jobs))[:count]
        together = renderer.images([jobs[k] for k in order], schedule)
        assert np.array_equal(together, [alone[k] for k in order]), (schedule, count)


def test_an_image_does_not_depend_on_its_company(renderer: Renderer, family: str) -> None:
    jobs = [ImageJob(k % 3, k % 4, 7 + k // 4) for k in range(17)]
    for schedule in ALONE[family]:
        _check_company(renderer, jobs, schedule, range(1, 18))


def test_nor_where_the_teacher_takes_part(renderer: Renderer, family: str) -> None:
    jobs = [ImageJob(k % 3, k, 7) for k in range(7)]
    for schedule in TAUGHT[family]:
        _check_company(renderer, jobs, schedule, (2, 3, 7))


def test_images_are_those_of_the_student(renderer: Renderer, family: str) -> None:
    student = renderer.student
    jobs = [ImageJob(k % 3, 5 + k, 9) for k in range(renderer.sizes[-1])]
    for schedule in ALONE[family]:
        codes = student.generate(
            [job.prompt for job in jobs],
            seed=9,
            index=[job.index for job in jobs],
            schedule=schedule,
        )
        expected = to_uint8(student.decode(codes).numpy())
        assert np.array_equal(renderer.images(jobs, schedule), expected)
        assert expected.dtype == np.uint8
        assert expected.std() > 1


def test_each_seed_has_its_own_noise(renderer: Renderer) -> None:
    jobs = [ImageJob(1, 3, seed) for seed in (0, 1, 2**63 - 1, 0)]
    images = renderer.images(jobs, "0")
    assert np.array_equal(images[0], images[3])
    assert len({image.tobytes() for image in images}) == 3
    student = renderer.student
    width = student.codebook.shape[1]
    given = noise(2**63 - 1, [3], (student.num_tokens, width))
    expected = to_uint8(student.decode(student.generate([1], noise=given)).numpy())
    assert np.abs(images[2].astype(int) - expected[0]).max() <= 1  # other rows may share its pass


def _order(schedule: str, content: Any = "pixels") -> RowsOrder:
    labels, index = np.array([2, 0, 1, 1, 2]), np.array([4, 8, 15, 16, 23])
    return RowsOrder("tiny", labels, index, 3, schedule, content)


def test_rows_are_those_of_the_same_batch_without_serving(renderer: Renderer, family: str) -> None:
    student, teacher = renderer.student, _teacher(renderer)
    asked: dict[str, Any] = {"seed": 3, "index": [4, 8, 15, 16, 23]}
    for schedule in (*ALONE[family], *TAUGHT[family][:3]):
        if "teacher" in schedule:
            asked |= {"teacher": teacher, "cfg": teacher.default_cfg}
        codes = student.generate([2, 0, 1, 1, 2], schedule=schedule, **asked)
        pixels = to_uint8(student.decode(codes).numpy())
        assert np.array_equal(renderer.rows(_order(schedule)), pixels)
        tokens = renderer.rows(_order(schedule, "tokens"))
        assert tokens.dtype == np.int64
        assert np.array_equal(tokens, student.tokenizer.module.nearest(codes).numpy())


def test_the_teacher_alone_maps_the_same_noise(
    renderer: Renderer, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = _teacher(renderer)
    # As it is recommended, and not with all of its mass.
    monkeypatch.setitem(teacher.config, "default_top_p", 0.5)
    rules = {"cfg": teacher.default_cfg, "top_p": 0.5}
    tokens = teacher.trajectories([2, 0, 1, 1, 2], [4, 8, 15, 16, 23], seed=3, **rules)
    everything = teacher.trajectories([2, 0, 1, 1, 2], [4, 8, 15, 16, 23], seed=3)
    assert not torch.equal(tokens, everything)
    assert np.array_equal(renderer.rows(_order("teacher", "tokens")), tokens.numpy())
    expected = to_uint8(teacher.decode(tokens).numpy())
    assert np.array_equal(renderer.rows(_order("teacher")), expected)
    jobs = [ImageJob(*job, 3) for job in zip([2, 0, 1, 1, 2], [4, 8, 15, 16, 23], strict=True)]
    images = renderer.images(jobs, "teacher")
    assert np.abs(images.astype(int) - expected).max() <= 1  # passes of other sizes


def test_the_schedule_is_the_one_that_the_student_was_trained_for() -> None:
    student = tiny_student()
    assert Renderer(student).schedule == "0"
    student.config = {**student.config, "schedule": [0, 2]}
    assert Renderer(student).schedule == "0,2"


class FakeStudent:
    """Its images are its noise, plus a fault that may depend on the pass."""

    device = torch.device("cpu")
    conditioning = "class"
    num_classes, num_tokens = 3, 1
    codebook = torch.zeros(2, 12)
    config: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self, fault: Callable[[int], Tensor | float]):
        self._fault = fault
        self.passes: list[int] = []

    def generate(self, cond: Tensor, *, noise: Tensor, schedule: str) -> Tensor:
        self.passes.append(len(noise))
        fault = torch.as_tensor(self._fault(len(noise)), dtype=torch.float32)
        return noise.sigmoid() + fault.reshape(-1, 1, 1)

    def decode(self, codes: Tensor) -> Tensor:
        return codes.reshape(-1, 3, 2, 2)


def _fake(fault: Callable[[int], Tensor | float], rows: int | None = None) -> Any:
    return Renderer(FakeStudent(fault), rows=rows)  # type: ignore[arg-type]


SMALL = 1e-7
FAULTS: dict[str, tuple[Callable[[int], Tensor | float], tuple[int, ...]]] = {
    "none": (lambda rows: 0.0, (1, 2, 4, 8)),
    "one row": (lambda rows: SMALL * (rows == 1), (2, 4, 8)),
    "the largest pass": (lambda rows: SMALL * (rows == 8), (8,)),
    "the place": (lambda rows: SMALL * torch.arange(rows), (1,)),
    "the place in large passes": (
        lambda rows: SMALL * torch.arange(rows) * (rows == 8),
        (1,),
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_passes_have_only_sizes_that_agree_to_the_last_bit(fault: str) -> None:
    of_pass, sizes = FAULTS[fault]
    renderer = _fake(of_pass)
    assert renderer.sizes == sizes
    jobs = [ImageJob(k % 3, k, k // 2) for k in range(11)]
    alone = [renderer.images([job], "0") for job in jobs]
    renderer.student.passes.clear()
    assert np.array_equal(renderer.images(jobs, "0"), np.concatenate(alone))
    assert set(renderer.student.passes) <= set(sizes)


def test_a_batch_is_cut_into_the_largest_passes_that_fit_and_only_its_end_is_padded() -> None:
    renderer = _fake(FAULTS["one row"][0])
    assert renderer.sizes == (2, 4, 8)
    renderer.student.passes.clear()
    assert len(renderer.images([ImageJob(0, k, 0) for k in range(15)], "0")) == 15
    assert renderer.student.passes == [8, 4, 2, 2]


@pytest.mark.parametrize(("rows", "sizes"), [(1, (1,)), (3, (1, 2)), (20, (1, 2, 4, 8, 16))])
def test_the_largest_pass_can_be_set(rows: int, sizes: tuple[int, ...]) -> None:
    assert _fake(FAULTS["none"][0], rows).sizes == sizes


def test_captions_are_encoded_one_by_one_and_do_not_depend_on_their_company() -> None:
    student, encoder = _half_read(tiny_student(**TEXT), 2), DrawnEncoder()
    renderer = Renderer(student, tiny_teacher(**TEXT), encoder)
    words = ["a cat", "red", "on the roof", "a red cat on the"]
    jobs = [ImageJob(words[k % 4], k, 7) for k in range(5)]
    for schedule in ("0,2", "0,teacher:1-2,2", "teacher"):
        _check_company(renderer, jobs, schedule, (2, 3, 5))
    assert sorted(encoder.calls) == sorted([word] for word in ["a photo", *words])


def test_a_student_of_captions_needs_an_encoder() -> None:
    renderer = Renderer(tiny_student(**TEXT))
    with pytest.raises(ConfigError, match="takes captions, which needs a text encoder"):
        renderer.images([ImageJob("a cat", 0, 0)], "0")


def test_images_of_a_broken_model_are_refused() -> None:
    with pytest.raises(ConfigError, match="NaN"):
        _fake(lambda rows: float("nan")).images([ImageJob(0, 0, 0)], "0")


def _write_student(folder: Path, **card: Any) -> str:
    text = TEXT if card.pop("text", False) else {}
    config = {**student_config(**text), **card}
    save_folder(folder, config, model=student_state(**text), tokenizer=tokenizer_state())
    return str(folder)


def _write_teacher(folder: Path) -> str:
    save_folder(folder, teacher_config(), model=teacher_state(), tokenizer=tokenizer_state())
    return str(folder)


def test_a_student_is_loaded_alone_or_with_the_teacher_that_its_config_names(
    tmp_path: Path,
) -> None:
    teacher = _write_teacher(tmp_path / "teacher")
    student = _write_student(tmp_path / "student", teacher=teacher, schedule=[0, 2])
    alone, both = Renderer.load(student), Renderer.load(student, teacher=True, rows=4)
    assert alone.teacher is None
    assert _teacher(both).fingerprint == tiny_teacher().fingerprint
    assert both.sizes[-1] == 4
    job = ImageJob(1, 0, 0)
    assert np.array_equal(alone.images([job], "0,2"), both.images([job], "0,2"))
    assert both.images([job], "teacher").shape == (1, 4, 4, 3)


def test_a_student_of_captions_is_loaded_with_its_encoder(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    encoder = write_text_encoder(tmp_path / "t5", TEXT["caption_dim"])
    student = _write_student(tmp_path / "student", text=True)
    renderer = Renderer.load(student, text_encoder=encoder)
    images = renderer.images([ImageJob("a cat", 0, 0), ImageJob("the red roof", 0, 0)], "0")
    assert images.shape == (2, 4, 4, 3)


def test_what_cannot_be_loaded_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no model"):
        Renderer.load(str(tmp_path / "absent"))
    student = _write_student(tmp_path / "student")
    with pytest.raises(ConfigError, match="names no teacher that could be deployed"):
        Renderer.load(student, teacher=True)
    orphan = _write_student(tmp_path / "orphan", teacher=str(tmp_path / "gone"))
    with pytest.raises(ConfigError, match=r"no model '.*gone'"):
        Renderer.load(orphan, teacher=True)
    with pytest.raises(ConfigError, match="llamagen"):
        Renderer.load(_write_teacher(tmp_path / "teacher"))
    texts = _write_student(tmp_path / "texts", text=True)
    with pytest.raises(CheckpointError, match="cannot load the text encoder"):
        Renderer.load(texts, text_encoder=str(tmp_path / "student"))
