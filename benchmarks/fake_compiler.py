"""What torch's compiler asks of a GPU, where there is none.

A function is traced with tensors without numbers, forward and backward; Inductor lowers the graphs
for an H100 whose properties are told here, up to the program that would launch its kernels. That
program is read, not run: a call of a kernel of Inductor's own, or of a library, is one launch.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch._inductor.scheduler
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.device_interface import CudaInterface
from torch._dynamo.exc import BackendCompilerFailed
from torch._functorch.aot_autograd import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.debug import DebugContext
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.fx_passes.joint_graph import joint_graph_passes
from torch._inductor.fx_passes.post_grad import post_grad_passes
from torch._inductor.graph import GraphLowering
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

_H100 = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3",
    major=9,
    minor=0,
    multi_processor_count=132,
    regs_per_multiprocessor=2**16,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    warp_size=32,
    total_memory=80 * 2**30,
    shared_memory_per_block_optin=232448,
    L2_cache_size=50 * 2**20,
)
_OF_INDUCTOR = re.compile(r"\.run\(")
_OF_LIBRARIES = re.compile(r"extern_kernels\.\w+\(|= torch\.ops\.")


def launches(function: Callable[..., Tensor], inputs: Callable[[], list[Any]]) -> dict[str, int]:
    """Launches of a compiled function and its gradient.

    Args:
        function: of the inputs to a tensor.
        inputs: makes them, on the CPU, without numbers.

    Returns:
        Of Inductor's own kernels and of libraries' (products, attention).
    """
    graphs: list[GraphModule] = []

    def partition(joint: GraphModule, *given: Any, **told: Any) -> Any:
        joint_graph_passes(joint)
        graphs.extend(min_cut_rematerialization_partition(joint, *given, **told))
        raise _EnoughError

    backend = aot_autograd(
        fw_compiler=make_boxed_func,  # never called
        partition_fn=partition,
        decompositions=select_decomp_table(),
    )
    torch._dynamo.reset()  # what was compiled before would make sizes unknown
    with FakeTensorMode():
        try:
            torch.compile(function, backend=backend, fullgraph=True, dynamic=False)(*inputs())
        except BackendCompilerFailed as failed:
            if not isinstance(failed.inner_exception, _EnoughError):
                raise
    torch._dynamo.reset()
    forward, backward = map(_program, graphs)
    program = forward + backward
    return {
        "compiled": len(_OF_INDUCTOR.findall(program)),
        "library": len(_OF_LIBRARIES.findall(program)),
    }


class _EnoughError(Exception):
    """Both graphs are there: nothing need be run."""


def _program(graph: GraphModule) -> str:
    """The calls that a graph becomes on the GPU."""
    gpu = torch.device("cuda", 0)
    asked = [node.meta["val"] for node in graph.graph.nodes if node.op == "placeholder"]
    for node in graph.graph.nodes:
        if "device" in node.kwargs:
            node.update_kwarg("device", gpu)
    graph.recompile()
    with _driver(), FakeTensorMode() as mode:
        given = [
            torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=gpu)
            if isinstance(x, Tensor)
            else x
            for x in asked
        ]
        FakeTensorProp(graph, mode).propagate_dont_convert_inputs(*given)
        with V.set_fake_mode(mode):
            post_grad_passes(graph, is_inference=False)
            lowering = GraphLowering(graph, example_inputs=given)
            with V.set_graph_handler(lowering), V.set_debug_handler(DebugContext()):
                lowering.run(*given)
                wrapper, _ = lowering.codegen()
    program: str = wrapper.value
    return program[program.index("def call") :]


@contextmanager
def _driver() -> Iterator[None]:
    """Within, what Inductor asks of the driver is answered."""
    answers: list[tuple[Any, str, Any]] = [
        (torch.cuda, "is_available", True),
        (torch.cuda, "device_count", 1),
        (torch.cuda, "current_device", 0),
        (torch.cuda, "get_device_properties", _H100),
        (torch.cuda, "get_device_capability", (9, 0)),
        (CudaInterface, "get_device_properties", _H100),
        (CudaInterface, "get_compute_capability", 90),
        (CudaInterface.Worker, "get_device_properties", _H100),
        (CudaInterface.Worker, "current_device", 0),
        (torch._inductor.scheduler, "has_triton", True),
        (torch.utils._triton, "triton_hash_with_backend", "none"),
    ]
    with ExitStack() as stack:
        for owner, name, answer in answers:
            stack.enter_context(mock.patch.object(owner, name, _answering(answer)))
        yield


def _answering(answer: Any) -> staticmethod[..., Any]:
    return staticmethod(lambda *_, **__: answer)
