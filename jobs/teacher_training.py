"""What the trainings of all bundled teachers share: tokenizers, steps, float16 files."""

import hashlib
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddray.errors import ConfigError
from ddray.models.llamagen_vq import LlamaGenVQ

STATE_EVERY = 200
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Quantised(NamedTuple):
    """One pass through a tokenizer in training.

    Attributes:
        images: reconstructions; gradients pass the codes straight through.
        tokens: int64 [B, L].
        loss: pulls codes to what they stand for, and (a quarter as strongly) the other way.
        targets: what codes were searched for, [N, E]: where dead codes restart.
    """

    images: Tensor
    tokens: Tensor
    loss: Tensor
    targets: Tensor


def mutual_distance(codes: Tensor, latents: Tensor) -> Tensor:
    """Squared error that moves the codes, and a quarter of it that moves the latents."""
    return F.mse_loss(codes, latents.detach()) + 0.25 * F.mse_loss(latents, codes.detach())


def quantise_llamagen(vq: LlamaGenVQ, images: Tensor) -> Quantised:
    """Every latent by its nearest code."""
    latents = vq.latents(images)
    tokens = vq.nearest(latents.detach())
    codes = vq.codebook[tokens]
    decoded = vq.decode(latents + (codes - latents).detach())
    # Latents lie on the unit sphere, so their elements are small.
    loss = latents.shape[-1] * mutual_distance(codes, latents)
    return Quantised(decoded, tokens, loss, latents.detach().flatten(0, 1))


def restart_dead_codes(codes_VE: Tensor, used_V: Tensor, targets: Tensor) -> None:
    """Move codes that nothing chose onto targets that exist."""
    dead = (used_V == 0).nonzero().squeeze(1)
    pick = torch.randint(len(targets), (len(dead),), device=targets.device)
    codes_VE.data[dead] = targets[pick]


Schedule = torch.optim.lr_scheduler.LambdaLR


def optimise(model: nn.Module, lr: float, steps: int) -> tuple[torch.optim.Optimizer, Schedule]:
    """AdamW with warm-up over 5 % of the steps and cosine decay to zero."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr, betas=(0.9, 0.95), weight_decay=0.01, fused=True
    )

    def factor(step: int) -> float:
        warm = max(1, steps // 20)
        return min((step + 1) / warm, 0.5 + 0.5 * math.cos(math.pi * step / steps))

    return optimizer, Schedule(optimizer, factor)


def descend(
    loss: Tensor, model: nn.Module, optimizer: torch.optim.Optimizer, schedule: Schedule
) -> None:
    """One optimizer step with clipped gradients."""
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    schedule.step()


class States:
    """What a stage was when it was last written down.

    Args:
        file: where.
        run: what the training depends on; the states of another one are refused.
        parts: what has `state_dict` and `load_state_dict`.
        draw: of the rows; has `state_dict` and `load_state_dict` too.
    """

    def __init__(self, file: Path, run: Mapping[str, Any], draw: Any, **parts: Any):
        self._file, self._run, self._parts, self._draw = file, dict(run), parts, draw

    def begin(self) -> int:
        """The step to go on with, everything being as it was; 0 where nothing is written.

        Raises:
            ConfigError: if what is written is of another run.
        """
        if not self._file.exists():
            return 0
        state = torch.load(self._file, weights_only=True, map_location="cpu")
        if state["run"] != self._run:
            raise ConfigError(f"{self._file} is of {state['run']}, not of {self._run}: delete it")
        for name, part in self._parts.items():
            part.load_state_dict(state[name])
        self._draw.load_state_dict(state["draw"])
        torch.set_rng_state(state["random"])
        if torch.cuda.is_available() and state["random_cuda"]:
            torch.cuda.set_rng_state_all(state["random_cuda"])
        return int(state["step"])

    def write(self, step: int) -> None:
        """Write all down, whole or not at all."""
        parts = {name: part.state_dict() for name, part in self._parts.items()}
        self._file.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self._file.with_suffix(".new")
        drawn = self._draw.state_dict()
        state = {
            "run": self._run,
            "step": step,
            "draw": drawn,
            "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
            **parts,
        }
        torch.save(state, unfinished)
        unfinished.replace(self._file)

    def steps(self, stop: int) -> Iterator[int]:
        """The steps that are left; the state is written now and then."""
        for step in range(self.begin(), stop):
            yield step
            if step % STATE_EVERY == STATE_EVERY - 1 or step == stop - 1:
                self.write(step + 1)


def forget(file: Path) -> None:
    """Delete the states of a stage whose outcome is saved."""
    file.unlink(missing_ok=True)


def digest(tensor: Tensor) -> str:
    """What a tensor is known by."""
    return hashlib.sha256(tensor.cpu().contiguous().numpy().tobytes()).hexdigest()


def report(stage: str, step: int, steps: int, **values: Tensor) -> None:
    """A line now and then."""
    if step % 50 == 0 or step == steps - 1:
        shown = "  ".join(f"{name} {float(value.detach()):.4f}" for name, value in values.items())
        print(f"{stage}  {step + 1}/{steps}  {time.process_time():.0f} CPU-s  {shown}", flush=True)


def half(module: nn.Module, statistics: frozenset[str] = frozenset()) -> dict[str, Tensor]:
    """Weights as float16, which is how they travel; what follows from the sizes left out."""
    constants: dict[str, Tensor] = getattr(module, "constants", dict)()
    return {
        name: tensor.half()
        for name, tensor in module.state_dict().items()
        if name not in statistics | constants.keys()
    }
