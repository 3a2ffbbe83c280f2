"""CUDA graphs: passes of a model that are recorded once and replayed in one launch.

A token of LlamaGen is some three hundred kernels, each of a few microseconds at small batches: the
host takes longer to launch them than the GPU to run them. A graph launches all tokens of a batch at
once, and each at its own shapes, so that nothing is computed for positions that are not there yet.

A recording is checked before it is trusted, and given up where it fails or differs from what was
recorded: a surprise on new hardware costs speed, and never a number.
"""

import warnings
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from ddray.errors import one_line

Pass = Callable[..., tuple[Tensor, ...]]
"""Tensors to tensors, all on one device, by work that shapes alone decide: it reads no number of
the device on the host, and takes none of the host's that another call would change."""

# Each size of a batch is a graph of its own. Sizes beyond these run as they did before.
_MOST_GRAPHS = 16


class _Graph:
    """One recording, with the tensors that it reads and writes."""

    def __init__(self, work: Pass, given: tuple[Tensor, ...], pool: Any):
        self._given = tuple(tensor.clone() for tensor in given)
        self._graph = torch.cuda.CUDAGraph()
        # Another thread may move or free tensors meanwhile: only this one must not.
        with torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
            self._made = work(*self._given)

    def __call__(self, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        for here, tensor in zip(self._given, given, strict=True):
            here.copy_(tensor)
        self._graph.replay()
        # The next replay, of this or of another graph of the pool, writes to the same memory.
        return tuple(tensor.clone() for tensor in self._made)


class Graphs:
    """The recordings of one model, on its device.

    The first call of a kind runs as it is: kernels are compiled then, and tables made that later
    calls find. The second runs as it is and is recorded, and the replay must give the same bits.
    From the third on it is replayed.

    Args:
        what: the model's name, for the one line of warning.

    Attributes:
        enabled: whether anything is recorded or replayed.
    """

    def __init__(self, what: str):
        self.enabled = True
        self._what = what
        self._seen: set[Hashable] = set()
        self._graphs: dict[Hashable, _Graph] = {}
        self._pool: Any = None

    def __len__(self) -> int:
        return len(self._graphs)

    def run(self, kind: Hashable, work: Pass, *given: Tensor) -> tuple[Tensor, ...]:
        """`work(*given)`, replayed where that is possible.

        Args:
            kind: all that decides the work beside the tensors: equal kinds mean equal work.
            work: see `Pass`.
            *given: its tensors, the first of them on the device of all.
        """
        if not self.enabled or torch.is_grad_enabled():
            return work(*given)
        shapes = tuple((tensor.shape, tensor.dtype) for tensor in given)
        kind = (kind, shapes, given[0].device)
        if kind in self._graphs:
            return self._graphs[kind](given)
        if kind not in self._seen:
            self._seen.add(kind)
            return work(*given)
        expected = work(*given)
        if len(self._graphs) < _MOST_GRAPHS:
            self._record(kind, work, given, expected)
        return expected

    def _record(
        self, kind: Hashable, work: Pass, given: tuple[Tensor, ...], expected: tuple[Tensor, ...]
    ) -> None:
        try:
            with torch.cuda.device_of(given[0]):
                # All graphs share their memory: the largest decides how much it is.
                self._pool = self._pool or torch.cuda.graph_pool_handle()
                graph = _Graph(work, given, self._pool)
                same = all(map(torch.equal, graph(given), expected))
            reason = "" if same else "its numbers are not those of the kernels one by one"
        except Exception as error:  # whatever drivers say, memory that is short among it
            reason = one_line(error)
        if not reason:
            self._graphs[kind] = graph
            return
        self.enabled = False
        self._graphs.clear()
        warnings.warn(
            f"{self._what} runs without CUDA graphs, which is slower at small batches: {reason}",
            stacklevel=2,
        )
