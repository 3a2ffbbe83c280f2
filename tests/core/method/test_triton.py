"""Facts about fused kernels that need no GPU: what they give, interpreted; that they compile."""

import json
import os
import subprocess
import sys

import pytest
import torch

from ddray.method import fused, seeding
from ddray.method.fused import can_fuse
from tests.patience import PATIENCE_S

pytestmark = pytest.mark.slow

triton = pytest.importorskip("triton", reason="triton comes with torch for CUDA")

# A process of its own: triton reads TRITON_INTERPRET when it is imported.
INTERPRETED = """
import json, math, torch
import torch.nn.functional as F
from ddray.method import flow_triton, seeding, seeding_triton
from ddray.method.flow import Transport

torch.set_num_threads(1)
# Few programs: the interpreter's time goes by operations.
flow_triton._ROWS, flow_triton._FEW = 128, 3
results = {}

def compare(name, codes, logits, noise, solver="ab4", evals=6):
    plain = Transport(codes, solver, evals)
    fused = flow_triton.solve(noise, logits, plain.keys_FV, plain._lambdas, plain._weights)
    results[name] = float((fused == plain(noise, logits)).double().mean())
    return fused

def case(vocab, width, rows=128):
    generator = torch.Generator().manual_seed(vocab + width)
    codes, logits, noise = (
        torch.randn(*shape, generator=generator)
        for shape in ((vocab, width), (rows, vocab), (rows, width))
    )
    return F.normalize(codes, dim=-1), 2 * logits, noise

for solver in ("euler", "ab2", "ab4"):
    compare(solver, *case(300, 8), solver)
compare("padded", *case(300, 5, 200))
compare("wide", *case(100, 32))
compare("few rows", *case(300, 8, 3))
codes, logits, noise = case(300, 8)
compare("bfloat16", codes, logits.bfloat16(), noise)
compare("strided", codes, logits.T.contiguous().T, noise)
compare("one row for all", codes, logits[:1].expand(128, -1), noise)
logits[:, ::3] = -math.inf
logits[:70, 128:256] = -math.inf
logits[7] = -math.inf
logits[7, 299] = -5.0
results["last code"] = int(compare("removed", codes, logits, noise)[7])
codes[140] = codes[3] = codes[260]
logits[:] = logits[:, 3:4] = 0.0
results["twins"] = sorted({3, 140, 260} & set(compare("ties", codes, logits, noise).tolist()))
empty = Transport(codes, "ab4", 4)
results["no rows"] = list(flow_triton.solve(
    noise[:0], logits[:0], empty.keys_FV, empty._lambdas, empty._weights).shape)
results["noise"] = []
for seed, index, numbers in (
    (7, [0, 1, 2**40 + 5], 13),
    (2**63 - 1, [3, 2**63 - 1], 1100),
    ([5, 2**62 + 1], [9, 2**33], 34),
):
    index = torch.tensor(index)
    made = seeding_triton.noise(seed, index, numbers, seeding.NOISE_STREAM)
    results["noise"].append(torch.equal(made, seeding.normals(seed, index, numbers)))
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def interpreted():
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        env={**os.environ, "TRITON_INTERPRET": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    "case",
    [
        "euler", "ab2", "ab4", "padded", "wide", "few rows", "bfloat16", "strided",
        "one row for all", "removed", "ties",
    ],
)  # fmt: skip
def test_the_kernel_gives_the_tokens_of_the_torch_operations(interpreted, case):
    assert interpreted[case] >= 0.999


def test_a_row_whose_last_code_alone_is_left_takes_it(interpreted):
    assert interpreted["last code"] == 299


def test_of_equal_codes_the_first_is_taken(interpreted):
    assert interpreted["twins"] == [3]


def test_no_rows_give_no_tokens(interpreted):
    assert interpreted["no rows"] == [0]


def test_noise_is_that_of_the_torch_operations_bit_for_bit(interpreted):
    assert interpreted["noise"] == [True] * 3


def test_a_device_is_tried_with_numbers_of_the_noise():
    made = seeding.normals(fused._SEED, torch.tensor(fused._INDEX), 2)
    assert torch.equal(made, torch.tensor(fused._NOISE))
    assert fused._STREAM == seeding.NOISE_STREAM


@pytest.mark.skipif(torch.cuda.is_available(), reason="there it works")
def test_where_triton_fails_torch_takes_its_place_with_one_line():
    with pytest.warns(UserWarning, match="Triton does not work on cuda, and torch") as told:
        assert not can_fuse.__wrapped__(torch.device("cuda"))
    assert "\n" not in str(told[0].message)
    assert not can_fuse(torch.device("cpu"))


@pytest.mark.parametrize("capability", [80, 90])
def test_the_kernel_of_noise_compiles_for_gpus_that_are_not_here(capability):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from ddray.method.seeding_triton import noise_kernel

    signature = {"out": "*fp32", "index": "*i64", "seeds": "*i64", "seed": "i64", "numbers": "i32"}
    constants = {"STREAM": 0, "OWN": False, "C": 256}
    names = {**signature, **dict.fromkeys(constants, "constexpr")}
    source = ASTSource(noise_kernel, names, constants)
    kernel = triton.compile(source, target=GPUTarget("cuda", capability, 32))
    assert "mul.hi.u32" in kernel.asm["ptx"] and "st.global" in kernel.asm["ptx"]


@pytest.mark.parametrize(
    ("capability", "width", "rows"), [(80, 8, 1000), (90, 32, 1000), (80, 32, 1), (90, 8, 1)]
)
def test_the_kernel_compiles_for_gpus_that_are_not_here(capability, width, rows):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from ddray.method.flow_triton import tile, transport_kernel

    pointers = dict.fromkeys(("noise", "logits", "keys", "lambdas", "weights"), "*fp32")
    sizes = dict.fromkeys(("rows", "vocab_size", "width", "steps", "logits_stride"), "i32")
    constants = {**tile(width, rows), "K": 4}
    options = {"num_warps": constants.pop("num_warps")}
    signature = {"tokens": "*i64", **pointers, **sizes, **dict.fromkeys(constants, "constexpr")}
    source = ASTSource(
        transport_kernel, {name: signature[name] for name in transport_kernel.arg_names}, constants
    )
    kernel = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    # Tensor cores would round to TF32.
    assert "fma.rn.f32" in kernel.asm["ptx"] and "mma" not in kernel.asm["ptx"]
