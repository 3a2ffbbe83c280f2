"""A network under DeepSpeed: the same few operations under every ZeRO stage and precision.

Weights stay float32; `precision` is that of the forward pass (autocast), with a loss scale for
float16.
"""

import json
import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from ddray.config.base import reserved_device
from ddray.config.distillation import DistillConfig
from ddray.distillation.optimization import (
    MovingAverage,
    compile_blocks,
    is_compiled,
    parameter_groups,
    recompute_activations,
    set_learning_rate,
)
from ddray.errors import CheckpointError
from ddray.models.linear import Linear
from ddray.models.var_dd import VARStudent

_TAG = "deepspeed"
_MATRIX_PRODUCTS = ["torch.nn.Linear", f"{Linear.__module__}.{Linear.__name__}"]
# Numbers of a bucket of gradients.
_LEAST_BUCKET, _MOST_BUCKET = 2**22, 2**28
# What a checkpoint of `Engine.save` must hold: the size of every file, of all ranks.
_PARTS_FILE = "parts.json"


def import_deepspeed(use_gpu: bool) -> Any:
    """DeepSpeed, told what it reads while it is imported, and quiet."""
    os.environ["DS_ACCELERATOR"] = "cuda" if use_gpu else "cpu"
    warnings.filterwarnings("ignore", category=FutureWarning)
    import deepspeed
    import deepspeed.ops

    deepspeed.utils.logger.setLevel(logging.ERROR)
    if not use_gpu:
        # An op that DeepSpeed would compile with g++ for a minute, to save what gloo does as well.
        # To look at the table tries every op with a compiler: a GPU's start would wait for it.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def deepspeed_config(config: DistillConfig, world: int, weights: int) -> dict[str, Any]:
    """What DeepSpeed is told.

    Args:
        config: the job.
        world: number of workers.
        weights: numbers in all parameters of the student.
    """
    zero: dict[str, Any] = {"stage": config.zero}
    if config.use_gpu and config.zero:
        # Gradients travel while others are still computed.
        zero |= {"overlap_comm": True, "reduce_bucket_size": bucket_size(weights)}
    if config.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu"}
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": config.batch_size // world // config.accumulation,
        "gradient_accumulation_steps": config.accumulation,
        # Without ZeRO the engine clips: DeepSpeed would ask for every gradient's norm by itself.
        "gradient_clipping": config.grad_clip if config.zero else 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        # Its own CPU Adam would have to be compiled; torch's fused one is as fast (measured).
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
        # It waits for a GPU twice a step.
        "timers": {"throughput": {"enabled": False}},
    }
    if config.precision != "float32":
        settings["torch_autocast"] = {
            "enabled": True,
            "dtype": config.precision,
            # Whose gradients travel in that precision; DeepSpeed looks for the very class.
            "lower_precision_safe_modules": _MATRIX_PRODUCTS,
        }
    return settings


def bucket_size(weights: int) -> int:
    """Numbers of a bucket of gradients: some eight make a student's."""
    return max(_LEAST_BUCKET, min(_MOST_BUCKET, weights // 8))


def in_parallel(network: nn.Module, config: DistillConfig) -> DistributedDataParallel:
    """A network whose gradients are averaged over the workers while others are still computed.

    What DeepSpeed does without ZeRO comes behind the whole backward pass: all gradients copied
    together, summed in float32, and copied back.

    Args:
        network: on the device of the training.
        config: the job.
    """
    numbers = bucket_size(sum(parameter.numel() for parameter in network.parameters()))
    parallel = DistributedDataParallel(
        network,
        forward_sync_buffers=False,
        bucket_cap_mb=4 * numbers / 2**20,
        gradient_as_bucket_view=True,
    )
    if config.use_gpu and config.precision == "bfloat16":
        parallel.register_comm_hook(None, bf16_compress_hook)
    return parallel


class Engine:
    """A network in training: weights, optimizer and moving average, over all workers.

    The average is kept beside the optimizer's own float32 weights, in the same partition: it works
    element by element, so the average of a partition is the partition of the average.

    Args:
        network: the same on every worker.
        codebook_VE: float [V, E].
        config: the job.
        world: number of workers.
    """

    def __init__(self, network: nn.Module, codebook_VE: Tensor, config: DistillConfig, world: int):
        deepspeed = import_deepspeed(config.use_gpu)
        self.network, self._config, self._world = network, config, world
        groups = parameter_groups(network, codebook_VE, config.weight_decay)
        optimizer = torch.optim.AdamW(groups, config.lr, betas=(0.9, 0.95), fused=True)
        compiled = is_compiled(config, codebook_VE.device)
        if compiled:
            compile_blocks(network)
        if config.activation_checkpointing:
            recompute_activations(
                network
            )  # what is compiled: the compiler looks into no checkpoint
        self._engine, *_ = deepspeed.initialize(
            model=network,
            optimizer=optimizer,
            config=deepspeed_config(config, world, sum(p.numel() for p in network.parameters())),
            dist_init_required=False,
        )
        self._parallel: DistributedDataParallel | None = None
        if config.zero == 0:
            self._engine.enable_backward_allreduce = False
            self._parallel = in_parallel(network, config) if world > 1 else None
        self._optimizer = self._engine.optimizer
        if compiled and config.use_gpu and isinstance(network, VARStudent):
            # After the move to the device, before the first block is compiled.
            network.skip_masked_tiles(getattr(torch, config.precision))
        self._average = MovingAverage(self._masters(), config.ema_decay)

    def __call__(self, *inputs: Any) -> Any:
        """The forward pass."""
        if self._parallel is None:
            return self._engine(*inputs)
        last = self._engine.is_gradient_accumulation_boundary()
        with self._autocast(), nullcontext() if last else self._parallel.no_sync():
            return self._parallel(*inputs)

    def _autocast(self) -> AbstractContextManager[object]:
        if self._config.precision == "float32":
            return nullcontext()
        device = reserved_device(self._config.use_gpu)
        return torch.autocast(device, getattr(torch, self._config.precision))

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of one micro batch."""
        self._engine.backward(loss)

    def step(self, rate: float, step: int) -> None:
        """After every micro batch: after the last one of a step, move weights and average.

        Args:
            rate: learning rate.
            step: steps done before, for the average.
        """
        set_learning_rate(self._optimizer, rate)
        last = self._engine.is_gradient_accumulation_boundary()
        if last and self._config.zero == 0:
            self._clip()
        self._engine.step()
        if last:
            self._average.update(self._masters(), step)

    def _clip(self) -> None:
        """What DeepSpeed does under ZeRO; on a GPU a few kernels for all gradients together."""
        scaler = self._engine.torch_autocast_z0_gradscaler
        if scaler is not None:
            scaler.unscale_(self._optimizer)
        nn.utils.clip_grad_norm_(self.network.parameters(), self._config.grad_clip)

    def discard(self) -> None:
        """Forget the gradients of the micro batches since the last step."""
        self._engine.zero_grad()
        self._optimizer.zero_grad()
        # Where ZeRO keeps the sums of a partition's gradients.
        getattr(self._optimizer, "averaged_gradients", {}).clear()
        self._engine.micro_steps -= self._engine.micro_steps % self._config.accumulation

    def averaged(self) -> dict[str, Tensor]:
        """The moving average under the network's names, whole, on the CPU; every rank must call."""
        with self._masters_replaced(self._average.average):
            weights = {name: self._whole(p) for name, p in self.network.named_parameters()}
        return weights | self._stored()

    def save(self, folder: str) -> None:
        """Write this rank's part of a checkpoint, and on rank 0 what all parts must hold.

        Every rank must call; the folders of all ranks make the checkpoint together.
        """
        self._engine.save_checkpoint(folder, tag=_TAG)
        mine = {str(f.relative_to(folder)): f.stat().st_size for f in _files(folder)}
        parts: list[dict[str, int]] = [mine] * self._world
        if self._world > 1:
            torch.distributed.all_gather_object(parts, mine)
        if torch.distributed.get_rank() == 0:
            merged = {name: size for part in parts for name, size in part.items()}
            (Path(folder) / _PARTS_FILE).write_text(json.dumps(merged, indent=2))

    def load(self, folder: str, averaged: Mapping[str, Tensor]) -> None:
        """Take up a checkpoint of as many workers.

        Args:
            folder: of the whole checkpoint.
            averaged: what `averaged` gave when it was saved.
        """
        self._engine.load_checkpoint(folder, tag=_TAG)
        self.set_average(averaged)

    def set_average(self, averaged: Mapping[str, Tensor]) -> None:
        """Take over a moving average, whole tensors under the network's names."""
        from deepspeed.utils import safe_set_full_fp32_param

        with self._masters_replaced(self._average.average):
            for name, parameter in self.network.named_parameters():
                value = averaged[name].to(parameter.device, torch.float32)
                if self._config.zero:
                    safe_set_full_fp32_param(parameter, value)
                else:
                    parameter.data.copy_(value)
            self._average.average = [tensor.detach().clone() for tensor in self._masters()]

    def _masters(self) -> list[Tensor]:
        """This rank's part of the float32 weights that the optimizer moves."""
        if self._config.zero == 0:
            tensors = list(self.network.parameters())
        elif self._config.zero < 3:
            tensors = self._optimizer.single_partition_of_fp32_groups
        else:
            tensors = self._optimizer.fp32_partitioned_groups_flat
        return [tensor.detach() for tensor in tensors]

    @contextmanager
    def _masters_replaced(self, values: list[Tensor]) -> Iterator[None]:
        """Within, the optimizer's weights hold `values`; behind, what they held before."""
        masters = self._masters()
        before = [tensor.clone() for tensor in masters]
        torch._foreach_copy_(masters, values)
        try:
            yield
        finally:
            torch._foreach_copy_(masters, before)

    def _whole(self, parameter: nn.Parameter) -> Tensor:
        from deepspeed.utils import safe_get_full_fp32_param

        whole = safe_get_full_fp32_param(parameter) if self._config.zero else parameter
        return whole.detach().float().cpu().clone()

    def _stored(self) -> dict[str, Tensor]:
        """What the network's file holds beside weights: not trained, not implied by its sizes."""
        implied: dict[str, Tensor] = getattr(self.network, "constants", dict)()
        weights = {name for name, _ in self.network.named_parameters()}
        return {
            name: value.cpu()
            for name, value in self.network.state_dict().items()
            if name not in weights and name not in implied
        }


def whole_weights(folder: str, zero: int) -> dict[str, Tensor]:
    """The float32 weights of a checkpoint of `Engine.save`, of any number of workers."""
    if zero == 0:
        (file,) = (Path(folder) / _TAG).glob("*model_states.pt")
        module: dict[str, Tensor] = torch.load(file, map_location="cpu", weights_only=False)[
            "module"
        ]
        return module
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    return dict(get_fp32_state_dict_from_zero_checkpoint(folder, tag=_TAG))


def check_parts(folder: str, uri: str) -> None:
    """Refuse a checkpoint of which a part of some rank is absent or cut.

    Args:
        folder: where it lies on this machine.
        uri: where it lies for people.

    Raises:
        CheckpointError: with the first such file.
    """
    try:
        parts = json.loads((Path(folder) / _PARTS_FILE).read_bytes()).items()
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"the checkpoint {uri} has no {_PARTS_FILE}, or a damaged one: it is not whole"
        ) from error
    for name, size in parts:
        file = Path(folder) / name
        if not file.is_file() or file.stat().st_size != size:
            what = f"has {file.stat().st_size} of {size} bytes of" if file.is_file() else "lacks"
            raise CheckpointError(f"the checkpoint {uri} {what} {name}")


def _files(folder: str) -> list[Path]:
    return sorted(path for path in Path(folder).rglob("*") if path.is_file())
