"""The LlamaGen transformer: a pre-norm decoder over a class token and image tokens.

Positions are 2-D rotary embeddings. Sun et al., "Autoregressive model beats diffusion: Llama for
scalable image generation" (arXiv 2406.06525). Parameter names are those of the official
checkpoints. Imports ddray.errors and ddray.guidance.

Shapes: B batch, L image tokens, S = condition + image tokens, l tokens of this step, V codebook
size, C model width, H heads, h head width, D = h / 2 rotation pairs.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddray.errors import ConfigError
from ddray.guidance import classifier_free_guidance


@dataclass(frozen=True, kw_only=True)
class LlamaGenConfig:
    """Sizes of a class-conditional LlamaGen, under the upstream field names.

    Attributes:
        dim: model width C.
        n_layer: number of blocks.
        n_head: number of attention heads; dim / n_head must be a multiple of 4.
        vocab_size: codebook size V.
        num_classes: number of classes; class id num_classes is the null class of guidance.
        block_size: image tokens L, a square number.
        cls_token_num: condition tokens in front; 1 for class conditioning.
        multiple_of: the feed-forward width is rounded up to a multiple of this.
        norm_eps: epsilon of RMSNorm.
        rope_base: base of the rotary frequencies.

    Raises:
        ConfigError: if the sizes do not fit together.
    """

    dim: int
    n_layer: int
    n_head: int
    vocab_size: int = 16384
    num_classes: int = 1000
    block_size: int = 256
    cls_token_num: int = 1
    multiple_of: int = 256
    norm_eps: float = 1e-5
    rope_base: float = 10000.0

    def __post_init__(self) -> None:
        for field in ("dim", "n_layer", "n_head", "vocab_size", "num_classes", "block_size"):
            value = getattr(self, field)
            if not isinstance(value, int) or value < 1:
                raise ConfigError(f"{field}={value!r} must be a positive integer")
        if self.multiple_of < 1:
            raise ConfigError(f"multiple_of={self.multiple_of!r} must be a positive integer")
        if self.dim % self.n_head or self.dim // self.n_head % 4:
            raise ConfigError(
                f"dim={self.dim} with n_head={self.n_head}: the head width dim / n_head must be a "
                "multiple of 4 (two rotary axes of channel pairs)"
            )
        if self.grid**2 != self.block_size:
            raise ConfigError(f"block_size={self.block_size} is not a square number of tokens")
        if self.cls_token_num != 1:
            raise ConfigError(f"cls_token_num={self.cls_token_num}: class conditioning has 1")

    @property
    def grid(self) -> int:
        """Tokens along one side of the image."""
        return int(self.block_size**0.5 + 0.5)

    @property
    def head_dim(self) -> int:
        """Width h of one attention head."""
        return self.dim // self.n_head

    @property
    def ffn_dim(self) -> int:
        """Width of the feed-forward layer: 2/3 of 4C, rounded up."""
        return -(-int(8 * self.dim / 3) // self.multiple_of) * self.multiple_of


def rope_table(config: LlamaGenConfig, device: torch.device) -> Tensor:
    """Rotations of the 2-D rotary embedding, as complex numbers.

    The first half of the channel pairs turns with the row of a token, the second half with its
    column. Condition tokens have the number 0, not 1: their rotated queries and keys vanish, and
    the official weights were trained so.

    Returns:
        complex64 [cls_token_num + L, D].
    """
    axis_pairs = config.head_dim // 4
    exponent = torch.arange(axis_pairs, device=device).float() / axis_pairs
    frequency = config.rope_base**-exponent
    along = torch.outer(torch.arange(config.grid, device=device).float(), frequency)
    rows = along[:, None].expand(-1, config.grid, -1)
    columns = along[None].expand(config.grid, -1, -1)
    angle = torch.cat((rows, columns), -1).flatten(0, 1)
    rotation = torch.polar(torch.ones_like(angle), angle)
    condition = rotation.new_zeros(config.cls_token_num, rotation.shape[1])
    return torch.cat((condition, rotation))


def rotate(x_BSHh: Tensor, rotation_SD: Tensor) -> Tensor:
    """Turn interleaved channel pairs (2p, 2p + 1) in float32, and give the input's dtype back."""
    pairs = torch.view_as_complex(x_BSHh.float().unflatten(-1, (-1, 2)))
    turned = torch.view_as_real(pairs * rotation_SD[None, :, None]).flatten(-2)
    return turned.to(x_BSHh.dtype)


class RMSNorm(nn.Module):
    """Root-mean-square norm in float32; the weight multiplies in the dtype of the input."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension."""
        return F.rms_norm(x.float(), x.shape[-1:], eps=self.eps).to(x.dtype) * self.weight


class KeyValueCache:
    """Keys and values of one layer, [B, H, S, h], written in place.

    Args:
        shape: (B, H, S, h).
        like: a tensor that has the cache's dtype and device.
    """

    def __init__(self, shape: tuple[int, int, int, int], like: Tensor):
        self.keys = like.new_empty(shape)
        self.values = like.new_empty(shape)
        self.length = 0

    def append(self, keys_BHlh: Tensor, values_BHlh: Tensor) -> tuple[Tensor, Tensor]:
        """Write the next l positions; views of everything written so far."""
        end = self.length + keys_BHlh.shape[2]
        self.keys[:, :, self.length : end] = keys_BHlh
        self.values[:, :, self.length : end] = values_BHlh
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]


class Attention(nn.Module):
    """Causal multi-head attention with rotary positions."""

    def __init__(self, config: LlamaGenConfig):
        super().__init__()
        self.head_dim = config.head_dim
        self.wqkv = nn.Linear(config.dim, 3 * config.dim, bias=False)
        self.wo = nn.Linear(config.dim, config.dim, bias=False)

    def forward(self, x_BSC: Tensor, rotation_SD: Tensor, cache: KeyValueCache | None) -> Tensor:
        """Attend causally; with a cache, x holds the next positions only."""
        heads = self.wqkv(x_BSC).unflatten(-1, (-1, self.head_dim))
        # Queries and keys turn together: one pass over both is half the cost of two.
        q_and_k, v = heads.split((heads.shape[2] * 2 // 3, heads.shape[2] // 3), dim=2)
        q, k = rotate(q_and_k, rotation_SD).transpose(1, 2).chunk(2, dim=1)
        v = v.transpose(1, 2)
        # A single new position may see everything in the cache: no mask.
        # Several come only when the cache is empty.
        causal = q.shape[2] > 1
        if cache is not None:
            k, v = cache.append(k, v)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        out: Tensor = self.wo(mixed.transpose(1, 2).flatten(2))
        return out


class FeedForward(nn.Module):
    """SwiGLU: W2 (SiLU(W1 x) * W3 x)."""

    def __init__(self, config: LlamaGenConfig):
        super().__init__()
        self.w1 = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.w3 = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.w2 = nn.Linear(config.ffn_dim, config.dim, bias=False)

    def forward(self, x_BSC: Tensor) -> Tensor:
        """Apply the gated layer to every position."""
        out: Tensor = self.w2(F.silu(self.w1(x_BSC)) * self.w3(x_BSC))
        return out


class Block(nn.Module):
    """Pre-norm attention and feed-forward, each added to its input."""

    def __init__(self, config: LlamaGenConfig):
        super().__init__()
        self.attention = Attention(config)
        self.feed_forward = FeedForward(config)
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)

    def forward(
        self, x_BSC: Tensor, rotation_SD: Tensor, cache: KeyValueCache | None = None
    ) -> Tensor:
        """One block over [B, S, C]."""
        x_BSC = x_BSC + self.attention(self.attention_norm(x_BSC), rotation_SD, cache)
        return x_BSC + self.feed_forward(self.ffn_norm(x_BSC))


class ClassEmbedding(nn.Module):
    """Table of num_classes + 1 rows; the last one is the null class of guidance."""

    def __init__(self, num_classes: int, dim: int):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, dim)

    def forward(self, cond_B: Tensor) -> Tensor:
        """Class ids [B] to condition tokens [B, 1, C]."""
        return self.embedding_table(cond_B)[:, None]


class LlamaGenTrunk(nn.Module):
    """What the teacher and its student share: class token, blocks, final norm, logits."""

    def __init__(self, config: LlamaGenConfig):
        super().__init__()
        self.cls_embedding = ClassEmbedding(config.num_classes, config.dim)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.output = nn.Linear(config.dim, config.vocab_size, bias=False)
        self._sizes = config
        self._rotation: Tensor | None = None

    def rotation(self, device: torch.device) -> Tensor:
        """The rotary table on a device, made once; no parameter or buffer, as in official files."""
        if self._rotation is None or self._rotation.device != device:
            # A table made while generating must also serve a later training step.
            with torch.inference_mode(False):
                self._rotation = rope_table(self._sizes, device)
        return self._rotation

    def init_weights(self) -> None:
        """Normal weights of deviation 0.02, as LlamaGen starts from; zero biases and logits."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        nn.init.zeros_(self.output.weight)

    def hidden(self, x_BSC: Tensor) -> Tensor:
        """All blocks over a whole sequence, before the final norm."""
        rotation = self.rotation(x_BSC.device)[: x_BSC.shape[1]]
        for layer in self.layers:
            x_BSC = layer(x_BSC, rotation)
        return x_BSC

    def logits(self, x_BSC: Tensor) -> Tensor:
        """Final norm and output matrix; float32 [B, S, V]."""
        out: Tensor = self.output(self.norm(x_BSC))
        return out.float()


class LlamaGen(LlamaGenTrunk):
    """The autoregressive teacher: stage n is the single token n.

    Args:
        config: sizes.
    """

    def __init__(self, config: LlamaGenConfig):
        super().__init__(config)
        self.config = config
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.stages = (1,) * config.block_size

    def forward(self, cond_B: Tensor, tokens_BL: Tensor) -> Tensor:
        """Teacher-forced logits; row n predicts token n and sees tokens before n only.

        Args:
            cond_B: int64 class ids [B], the null class included.
            tokens_BL: int64 [B, L]; the last token is not read.

        Returns:
            float32 [B, L, V].
        """
        known = self.tok_embeddings(tokens_BL[:, :-1])
        return self.logits(self.hidden(torch.cat((self.cls_embedding(cond_B), known), 1)))

    @staticmethod
    def guides(cfg: float | None) -> bool:
        """Whether a guidance number does anything: the published code runs no null half up to 1."""
        return cfg is not None and cfg > 1

    @staticmethod
    def guide(conditional: Tensor, null: Tensor, cfg: float, stage: int | None) -> Tensor:
        """Guided logits; the same scale at every stage."""
        return classifier_free_guidance(conditional, null, cfg)

    def decoder(self, cond_B: Tensor, prefix_BP: Tensor | None = None) -> "LlamaGenDecoder":
        """Begin stage-by-stage decoding of a batch, behind tokens of the first stages if given."""
        return LlamaGenDecoder(self, cond_B, prefix_BP)


class LlamaGenDecoder:
    """One batch on its way through the stages, with a static key-value cache.

    Args:
        model: the transformer.
        cond_B: int64 class ids [B].
        prefix_BP: int64 tokens of the first stages [B, P], or None.
    """

    def __init__(self, model: LlamaGen, cond_B: Tensor, prefix_BP: Tensor | None):
        self._model = model
        self._next_BlC = model.cls_embedding(cond_B)
        if prefix_BP is not None:
            self._next_BlC = torch.cat((self._next_BlC, model.tok_embeddings(prefix_BP)), 1)
        sizes = model.config
        length = sizes.cls_token_num + sizes.block_size
        shape = (len(cond_B), sizes.n_head, length, sizes.head_dim)
        self._caches = [KeyValueCache(shape, self._next_BlC) for _ in model.layers]

    def logits(self) -> Tensor:
        """Logits of the next stage, float32 [B, 1, V]; `append` must come before the next call."""
        x_BlC, position = self._next_BlC, self._caches[0].length
        rotation = self._model.rotation(x_BlC.device)[position : position + x_BlC.shape[1]]
        for layer, cache in zip(self._model.layers, self._caches, strict=True):
            x_BlC = layer(x_BlC, rotation, cache)
        return self._model.logits(x_BlC[:, -1:])

    def append(self, tokens_Bl: Tensor) -> None:
        """Give the tokens of the stage whose logits were read, int64 [B, 1]."""
        self._next_BlC = self._model.tok_embeddings(tokens_Bl)
