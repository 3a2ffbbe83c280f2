"""What a teacher and its student share: a network, its tokenizer, its config, and input checks.

Shapes: B batch, L all tokens, V codebook size, E code width.
"""

from collections.abc import Callable, Hashable, Sequence
from functools import cached_property
from itertools import accumulate
from typing import Any, Literal

import torch
from torch import Tensor

from ddray.errors import ConfigError
from ddray.method.conditioning import Condition, class_ids, left_padded
from ddray.method.graphs import Graphs, Pass
from ddray.method.seeding import index_tensor
from ddray.storage.checkpoint import fingerprint

Encode = Callable[[Sequence[str]], tuple[Tensor, Tensor]]
"""A text encoder: captions to features [B, T, D], padded on the right, and mask [B, T]."""


class Tokenizer:
    """A tokenizer module and what both sides of a distillation ask of it.

    Args:
        module: a family's tokenizer, or None for a model that was loaded without one.
        optional: names of statistics in its state dict that mean nothing at inference.
        decode_dtype: of the decoder above its lowest resolution; codes, tokens and images are
            float32 in any case.
    """

    def __init__(
        self,
        module: Any,
        optional: frozenset[str] = frozenset(),
        decode_dtype: torch.dtype = torch.float32,
    ):
        self._module = module
        self._optional = optional
        self.decode_dtype = decode_dtype

    @property
    def module(self) -> Any:
        """The module.

        Raises:
            ConfigError: if the model was loaded without a tokenizer.
        """
        if self._module is None:
            raise ConfigError(
                'this model was loaded with "tokenizer": None, so it has no codebook and no '
                "images; give tokenizer= to the loader"
            )
        return self._module

    @cached_property
    def codebook(self) -> Tensor:
        """Codes as the models use them, float32 [V, E]."""
        # First asked for inside somebody's inference mode, it must also serve a later training.
        with torch.inference_mode(False), torch.no_grad():
            return self.module.codebook.detach().float()

    @cached_property
    def _decoder(self) -> Any:
        """The module's decoder, in `decode_dtype`."""
        return self.module.decoder.lowered(self.decode_dtype)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of the weights, or "" without a tokenizer."""
        return "" if self._module is None else fingerprint(self._module, self._optional)

    def state_dict(self) -> dict[str, Tensor]:
        """Weights, without the statistics that mean nothing at inference."""
        state = self.module.state_dict()
        return {name: tensor for name, tensor in state.items() if name not in self._optional}

    @torch.no_grad()
    def decode(self, tokens_or_codes: Tensor) -> Tensor:
        """Images in [0, 1], float32 [B, channels, H, W], of tokens [B, L] or codes [B, L, E]."""
        codes = tokens_or_codes
        if not codes.is_floating_point():
            codes = self.codebook[codes]
        module = self.module
        latent = module.post_quant_conv(module.decoder_input(codes.to(module.codebook.dtype)))
        images: Tensor = self._decoder(latent).float()
        return images.add_(1).div_(2).clamp_(0, 1).contiguous()

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Tokens int64 [B, L] of images float [B, channels, H, W] in [0, 1]."""
        tokens: Tensor = self.module.encode(images.to(self.module.codebook.dtype) * 2 - 1)
        return tokens


class Model:
    """What teacher and student share: a network, its tokenizer, its config.

    Attributes:
        open_encoder: loads the text encoder that the model was trained with, where it has one.
    """

    def __init__(self, model: Any, tokenizer: Tokenizer, config: dict[str, Any], name: str):
        self.model = model
        self.tokenizer = tokenizer
        self.config = config
        self.name = name
        self.graphs = Graphs(name)
        self.stages: tuple[int, ...] = model.stages
        self.num_tokens = sum(self.stages)
        self.num_classes: int = model.config.num_classes
        self.conditioning: Literal["class", "text"] = model.conditioning
        self.open_encoder: Callable[[], Encode] | None = None

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device

    @property
    def codebook(self) -> Tensor:
        """Codes as the model uses them, float32 [V, E]."""
        return self.tokenizer.codebook

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of the network's weights."""
        return fingerprint(self.model)

    @torch.no_grad()
    def decode(self, tokens_or_codes: Tensor) -> Tensor:
        """Images in [0, 1], float32 [B, channels, H, W], of tokens [B, L] or codes [B, L, E]."""
        content = torch.as_tensor(tokens_or_codes, device=self.device)
        if not content.is_floating_point():
            content = self._tokens(content)
        elif content.dim() != 3 or content.shape[1:] != (self.num_tokens, self.codebook.shape[1]):
            raise ConfigError(
                f"codes are {[*content.shape]}, expected "
                f"{['B', self.num_tokens, self.codebook.shape[1]]}"
            )
        (images,) = self.replayed("decode", self._decode, content)
        return images

    def _decode(self, content: Tensor) -> tuple[Tensor]:
        return (self.tokenizer.decode(content),)

    def encode(self, images: Tensor) -> Tensor:
        """Tokens int64 [B, L] of images float [B, channels, H, W] in [0, 1].

        Raises:
            ConfigError: for images of another shape, or of integers.
        """
        images = torch.as_tensor(images, device=self.device)
        sizes = self.tokenizer.module.config
        side = int(self.stages[-1] ** 0.5) if max(self.stages) > 1 else int(self.num_tokens**0.5)
        side *= sizes.patch
        if not images.is_floating_point() or images.shape[1:] != (sizes.in_channels, side, side):
            raise ConfigError(
                f"images are {images.dtype} {[*images.shape]}, expected floats in [0, 1] of "
                f"{['B', sizes.in_channels, side, side]}"
            )
        return self.tokenizer.encode(images)

    @cached_property
    def encoder(self) -> Encode:
        """The text encoder that the model was trained with, loaded when it is first asked for.

        Raises:
            ConfigError: if the model was built without one, or its package is missing.
            CheckpointError: if it cannot be loaded.
        """
        if self.open_encoder is None:
            raise ConfigError(f"{self.name} has no text encoder here: give features and mask")
        return self.open_encoder()

    def condition(self, cond_B: Any) -> Condition:
        """What the network takes for class ids [B] or, for a text model, captions.

        Args:
            cond_B: ids; or a list of texts, which the model's own encoder reads, or (features,
                mask) of any.

        Raises:
            ConfigError: for an id outside 0..num_classes (num_classes is the null class), or
                captions of another size or without text.
            CheckpointError: if the text encoder cannot be loaded.
        """
        if self.conditioning == "class":
            return class_ids(cond_B, self.num_classes, self.device)
        sizes = self.model.config
        if isinstance(cond_B, list | tuple) and cond_B and isinstance(cond_B[0], str):
            cond_B = self.encoder(cond_B)
        return left_padded(cond_B, sizes.cls_token_num, sizes.caption_dim, self.device)

    def replayed(self, kind: Hashable, work: Pass, *given: Tensor) -> tuple[Tensor, ...]:
        """`work(*given)`, from a CUDA graph where there is one: see `ddray.method.graphs`."""
        if not given[0].is_cuda or not self.graphs.enabled:
            return work(*given)
        # Of weights that have moved, a graph would read what lies there now.
        where = tuple(weight.data_ptr() for weight in self.model.parameters())
        return self.graphs.run((kind, where), work, *given)

    def _index(self, index: Sequence[int] | Tensor | None, count: int) -> Tensor:
        index_B = index_tensor(range(count) if index is None else index, self.device)
        if len(index_B) != count:
            raise ConfigError(f"{len(index_B)} indices for {count} classes; give one index a class")
        return index_B

    def _tokens(self, tokens: Tensor, batch: int | None = None) -> Tensor:
        """Tokens as int64 [B, L] on the device, refused when they are not."""
        given = torch.as_tensor(tokens, device=self.device)
        rows = batch if batch is not None else len(given) if given.dim() else 0
        if given.is_floating_point() or given.shape != (rows, self.num_tokens):
            raise ConfigError(
                f"tokens are {given.dtype} {[*given.shape]}, expected integers "
                f"{[rows if rows else 'B', self.num_tokens]}"
            )
        # Trajectory sets store them as uint16, with which torch does not compare.
        given = given.long()
        vocab_size = self.model.config.vocab_size
        wrong = given[(given < 0) | (given >= vocab_size)]
        if len(wrong):
            raise ConfigError(f"token {int(wrong[0])} is out of range: 0 to {vocab_size - 1}")
        return given

    def stage_starts(self) -> list[int]:
        """First token of every stage, and L at the end."""
        return [0, *accumulate(self.stages)]
