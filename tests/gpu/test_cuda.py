"""What must hold on a CUDA device: the CPU's numbers, in float32, up to stated rounding."""

from itertools import islice

import pytest
import torch

import ddray
from ddray.config.evaluation import EvaluateConfig
from ddray.config.sampling import SampleConfig
from ddray.distillation.stream import TrajectoryStream
from ddray.evaluation.evaluate import evaluate
from ddray.method.flow import Transport, transport
from ddray.method.fused import can_fuse
from ddray.method.seeding import normals, standard_normal
from ddray.models.families import empty_network, empty_tokenizer
from ddray.models.zoo import resolve
from ddray.serving.rendering import ImageJob, Renderer
from ddray.sets.batch_size import image_bytes
from ddray.sets.makers import maker_on
from ddray.sets.trajectories.trajectory_set import TrajectorySet
from tests.core.sets.trajectories.test_trajectory_set import fill, plan_of
from tests.core.tiny import gradient_errors, tiny_student, tiny_teacher, tiny_var

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_noise_is_that_of_the_cpu():
    index = [0, 7, 2**40, 2**63 - 1]
    here, there = ddray.noise(3, index, (49, 8)), ddray.noise(3, index, (49, 8), device="cuda")
    torch.testing.assert_close(there.cpu(), here, rtol=0, atol=1e-6)


@pytest.mark.parametrize("tf32", [False, True])
def test_transport_gives_the_tokens_of_the_cpu_whatever_the_process_allows(tf32):
    torch.manual_seed(0)
    codes = torch.nn.functional.normalize(torch.randn(256, 8), dim=-1)
    noise, logits = torch.randn(4000, 8), torch.randn(4000, 256)
    expected = transport(noise, logits, codes)
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32" if tf32 else "ieee"
    try:
        tokens = transport(noise.cuda(), logits.cuda(), codes.cuda())
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert (tokens.cpu() == expected).float().mean() >= 0.999


def random_case(rows, vocab_size, width):
    """Noise, logits and codes of unit length."""
    torch.manual_seed(0)
    codes = torch.nn.functional.normalize(torch.randn(vocab_size, width), dim=-1)
    return torch.randn(rows, width), 2 * torch.randn(rows, vocab_size), codes


@pytest.mark.parametrize(("vocab_size", "width"), [(256, 8), (4096, 32), (16384, 8)])
def test_the_fused_transport_agrees_with_the_float64_map_of_the_cpu(vocab_size, width):
    pytest.importorskip("triton")
    noise, logits, codes = random_case(2000, vocab_size, width)
    exact = transport(noise, logits, codes, solver="exact")
    solve = Transport(codes.cuda())
    assert solve.fused
    tokens = solve(noise.cuda(), logits.cuda()).cpu()
    assert (tokens == exact).float().mean() >= 0.997
    assert (tokens == transport(noise, logits, codes)).float().mean() >= 0.999


@pytest.mark.parametrize("solver", ["euler", "ab2", "ab4"])
@pytest.mark.parametrize("width", [1, 5, 8, 16, 64])
def test_the_fused_transport_gives_the_tokens_of_the_torch_operations(solver, width):
    pytest.importorskip("triton")
    noise, logits, codes = random_case(4000, 300, width)
    codes *= torch.linspace(0.5, 2, 300)[:, None]  # codes of width 1 would all be 1 or -1
    logits[:, ::3] = -torch.inf
    expected = transport(noise, logits, codes, solver=solver)
    tokens = transport(noise.cuda(), logits.cuda(), codes.cuda(), solver=solver)
    assert (tokens.cpu() == expected).float().mean() >= 0.999


def test_the_fused_transport_keeps_no_array_of_rows_and_codes():
    pytest.importorskip("triton")
    noise, logits, codes = (x.cuda() for x in random_case(4000, 4096, 32))
    solve = Transport(codes)
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    solve(noise, logits)
    # One array of the logits' size would be 62 MiB.
    assert torch.cuda.max_memory_allocated() - held < 2**20


@pytest.mark.parametrize("family", ["llamagen", "var"])
def test_teacher_and_student_give_the_tokens_of_the_cpu(family):
    if family == "llamagen":
        teacher, student = tiny_teacher(), tiny_student()
    else:
        teacher, student = tiny_var(), tiny_var("var-dd")
    greedy = teacher.sample([0, 1, 2], top_k=1)
    codes = student.generate([0, 1, 2], seed=1)
    for model in (teacher, student):
        model.model.cuda()
        model.tokenizer.module.cuda()
        vars(model.tokenizer).pop("codebook", None)
    assert torch.equal(teacher.sample([0, 1, 2], top_k=1).cpu(), greedy)
    torch.testing.assert_close(student.generate([0, 1, 2], seed=1).cpu(), codes)


def test_bundled_teacher_in_bfloat16_stays_close():
    here = ddray.load_teacher("digits-llamagen", device="cpu")
    there = ddray.load_teacher("digits-llamagen", device="cuda", dtype="bfloat16")
    tokens = here.sample(range(10), cfg=2.0)
    expected = here.guided_logits(range(10), tokens)
    actual = there.guided_logits(range(10), tokens).cpu()
    assert (actual - expected).abs().mean() < 0.05


def test_batches_of_a_stream_are_those_of_the_cpu(tmp_path):
    trajectories = TrajectorySet.create(str(tmp_path), plan_of(count=57))
    fill(trajectories)
    settings = {"batch_size": 8, "seed": 3, "code_width": 4, "lanes": 4}
    with (
        TrajectoryStream(trajectories, **settings) as here,
        TrajectoryStream(trajectories, **settings, device="cuda") as there,
    ):
        for one, two in islice(zip(here.batches(5), there.batches(5), strict=True), 20):
            assert all(part.is_cuda for part in two)
            torch.testing.assert_close(two.noise_BLE.cpu(), one.noise_BLE, rtol=0, atol=1e-6)
            for name in ("tokens_BL", "cond_B", "index_B"):
                assert torch.equal(getattr(two, name).cpu(), getattr(one, name))


def test_fused_noise_is_that_of_the_torch_operations():
    pytest.importorskip("triton")
    device = torch.device("cuda")
    assert can_fuse(device)
    index = torch.tensor([0, 7, 2**40, 2**63 - 1], device=device)
    for seed in (3, [0, 1, 2**62, 2**63 - 1]):
        fused = standard_normal(seed, index, (49, 5))
        torch.testing.assert_close(fused.flatten(1), normals(seed, index, 245), rtol=0, atol=1e-6)


def test_an_evaluation_runs_where_it_is_told(tmp_path):
    config = EvaluateConfig(
        student="digits-var-dd",
        num_gpus=1,
        count=20,
        batch_size=20,
        transport_count=2,
        speed_batches=(1,),
        speed_seconds=0.01,
        out=str(tmp_path),
    )
    summary = evaluate(config).summary
    assert "on cuda, " in summary["protocol"][-1] and summary["settings"]["gpu"]
    assert summary["transport"]["agreement"] > 0.9


def test_images_of_the_service_are_those_of_the_cpu():
    jobs = [ImageJob(k, k, 7) for k in range(10)]
    here, there = (
        Renderer.load("digits-var-dd", device=device).images(jobs, "0").astype(int)
        for device in ("cpu", "cuda")
    )
    assert abs(here - there).mean() < 2  # of 255; a token near a border may be another one


@pytest.mark.parametrize("name", ["digits-var-dd", "digits-llamagen-dd"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_gradients_in_bfloat16_are_those_of_float32(name, compiled):
    errors = gradient_errors(name, "cuda", compiled=compiled)
    assert max(errors.values()) <= 0.03, max(errors, key=errors.get)


@pytest.mark.parametrize("family", ["llamagen", "var"])
def test_what_is_replayed_has_the_bits_of_kernels_one_by_one(family):
    name = f"digits-{family}"
    teacher, student = ddray.load_teacher(name), ddray.load_student(f"{name}-dd")
    plain = ddray.load_teacher(name), ddray.load_student(f"{name}-dd")
    for model in plain:
        model.graphs.enabled = False

    def made(teacher, student, seed):
        index = range(seed, seed + 5)
        return (
            teacher.trajectories([1, 2, 3, 4, 5], index, seed=seed, cfg=2.0),
            teacher.sample([1, 2, 3, 4, 5], index=index, seed=seed, top_k=20, top_p=0.9),
            student.decode(student.generate([1, 2, 3, 4, 5], index=index, seed=seed)),
        )

    for seed in range(5):  # plain, recorded, and three times replayed
        for replayed, expected in zip(
            made(teacher, student, seed), made(*plain, seed), strict=True
        ):
            assert torch.equal(replayed, expected)
    assert teacher.graphs.enabled and len(teacher.graphs) == 2
    assert student.graphs.enabled and len(student.graphs) == 2
    assert not any(len(model.graphs) for model in plain)


def test_a_graph_reads_no_weights_that_have_moved():
    teacher = ddray.load_teacher("digits-var")
    calls = [lambda: teacher.trajectories([1, 2], [0, 1], seed=0)] * 3
    before = [call() for call in calls][-1]
    for weight in teacher.model.parameters():
        weight.data = torch.zeros_like(weight)
    assert not torch.equal(calls[0](), before)


def test_what_makes_bits_here_is_named():
    maker = maker_on(ddray.load_teacher("digits-var", device="cuda").device)
    assert maker.device == torch.cuda.get_device_name()
    assert maker.cuda and maker.cudnn and "cudnn" not in maker.attention.split(", ")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_images_of_the_service_in_16_bits_are_close_to_those_of_the_cpu(dtype):
    jobs = [ImageJob(k, k, 7) for k in range(10)]
    here = Renderer.load("digits-var-dd").images(jobs, "0").astype(int)
    renderer = Renderer.load("digits-var-dd", device="cuda", dtype=dtype)
    kept = torch.bfloat16 if dtype == "bfloat16" else torch.float32
    assert renderer.student.tokenizer.decode_dtype == kept
    assert abs(here - renderer.images(jobs, "0").astype(int)).mean() < 10  # of 255


@pytest.mark.parametrize("name", ["var-d16", "llamagen-b-256"])
def test_an_image_of_a_batch_takes_no_more_than_is_reckoned(name):
    sizes = resolve(name)
    states = [
        {
            key: 0.02 * torch.randn(weight.shape)
            for key, weight in module.state_dict().items()
            if key not in getattr(module, "constants", dict)()
        }
        for module in (empty_network(sizes), empty_tokenizer(sizes))
    ]
    there = {"device": "cuda", "dtype": "bfloat16"}
    teacher = ddray.load_teacher(sizes, checkpoint=states[0], tokenizer=states[1], **there)
    peaks = []
    for count in (8, 8, 40):  # the first one pays what is paid once
        torch.cuda.reset_peak_memory_stats()
        teacher.trajectories(torch.arange(count), torch.arange(count), seed=0, cfg=2.0)
        peaks.append(torch.cuda.max_memory_allocated())
    config = SampleConfig(num_gpus=1, dtype="bfloat16")
    assert (peaks[2] - peaks[1]) / 32 <= image_bytes(config, teacher.model)
