"""The LlamaGen transformer: a pre-norm decoder over condition tokens and image tokens.

Positions are 2-D rotary embeddings. Sun et al., "Autoregressive model beats diffusion: Llama for
scalable image generation" (arXiv 2406.06525). Parameter names are those of the official
checkpoints.

Shapes: B batch, T condition tokens, L image tokens, S = T + L, l tokens of this step, P tokens of a
prefix, V codebook size, C model width, H heads, h head width, D = h / 2 rotation pairs (of
captions: feature width).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddray.errors import ConfigError, positive_integers
from ddray.method.conditioning import Captions, Condition
from ddray.method.guidance import classifier_free_guidance, top_p_filter
from ddray.models.attention import KeyValueCache, attend, grid_angles, rotate
from ddray.models.linear import Linear, packed

# On a CPU a decoder packs its weights at this token: fewer would not make up for it.
_PACKED_FROM = 16


@dataclass(frozen=True, kw_only=True)
class LlamaGenConfig:
    """Sizes of a LlamaGen, for classes or captions, under the upstream field names.

    Attributes:
        dim: model width C.
        n_layer: number of blocks.
        n_head: number of attention heads; dim / n_head must be a multiple of 4.
        vocab_size: codebook size V.
        num_classes: number of classes; class id num_classes is the null class of guidance.
        block_size: image tokens L, a square number.
        cls_token_num: condition tokens in front; 1 for a class, 120 for a caption.
        caption_dim: width D of caption features; with more than one condition token the model is
            conditioned on captions, and num_classes means nothing.
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
    caption_dim: int = 0
    multiple_of: int = 256
    norm_eps: float = 1e-5
    rope_base: float = 10000.0

    def __post_init__(self) -> None:
        fields = ("dim", "n_layer", "n_head", "vocab_size", "num_classes", "block_size")
        positive_integers(self, *fields, "cls_token_num", "multiple_of")
        if self.dim % self.n_head or self.dim // self.n_head % 4:
            raise ConfigError(
                f"dim={self.dim} with n_head={self.n_head}: the head width dim / n_head must be a "
                "multiple of 4 (two rotary axes of channel pairs)"
            )
        if self.grid**2 != self.block_size:
            raise ConfigError(f"block_size={self.block_size} is not a square number of tokens")
        if self.cls_token_num != 1 and not self.reads_captions:
            raise ConfigError(
                f"cls_token_num={self.cls_token_num}: a class is 1 token; a model of captions also "
                "gives caption_dim"
            )

    @property
    def reads_captions(self) -> bool:
        """Whether the condition is a caption, not a class."""
        return self.cls_token_num > 1 and self.caption_dim > 0

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
    """Rotations of the 2-D rotary embedding: cosine and sine.

    The first half of the channel pairs turns with the row of a token, the second half with its
    column. Condition tokens have the number 0, not 1: their rotated queries and keys vanish, and
    the official weights were trained so.

    Returns:
        float32 [cls_token_num + L, D, 2].
    """
    angle = grid_angles(
        torch.arange(config.grid, device=device).float(), config.head_dim, config.rope_base
    )
    rotation = torch.view_as_real(torch.polar(torch.ones_like(angle), angle))
    condition = rotation.new_zeros(config.cls_token_num, *rotation.shape[1:])
    return torch.cat((condition, rotation))


class RMSNorm(nn.Module):
    """Root-mean-square norm in float32, whatever the dtype of the input."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension."""
        if x.dtype == self.weight.dtype:
            return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)  # one kernel on a GPU
        return F.rms_norm(x.float(), x.shape[-1:], eps=self.eps).to(x.dtype) * self.weight


def _attend(q_BHlh: Tensor, k_BHSh: Tensor, v_BHSh: Tensor, mask: Tensor | None) -> Tensor:
    # A single new position may see everything in the cache: no mask.
    # Several come only when the cache is empty.
    causal = mask is None and q_BHlh.shape[2] > 1
    mixed = attend(q_BHlh, k_BHSh, v_BHSh, mask, is_causal=causal)
    return mixed.transpose(1, 2).flatten(2)


class Attention(nn.Module):
    """Causal multi-head attention with rotary positions."""

    def __init__(self, config: LlamaGenConfig):
        super().__init__()
        self.head_dim = config.head_dim
        self.wqkv = Linear(config.dim, 3 * config.dim, bias=False)
        self.wo = Linear(config.dim, config.dim, bias=False)

    def forward(self, x_BSC: Tensor, rotation_SD2: Tensor, mask: Tensor | None) -> Tensor:
        """Attend causally, or as a mask says."""
        heads = self.wqkv(x_BSC).unflatten(-1, (-1, self.head_dim))
        # Queries and keys turn together: one pass over both is half the cost of two.
        q_and_k, v = heads.split((heads.shape[2] * 2 // 3, heads.shape[2] // 3), dim=2)
        q, k = rotate(q_and_k, rotation_SD2[:, None]).transpose(1, 2).chunk(2, dim=1)
        out: Tensor = self.wo(_attend(q, k, v.transpose(1, 2), mask))
        return out

    def mixed(
        self, x_BlC: Tensor, rotation_l31D2: Tensor, mask: Tensor | None, cache: KeyValueCache
    ) -> Tensor:
        """What the last layer, `wo`, takes of the next positions; keys and values join the cache.

        Values turn too, by nothing: so they go to the cache beside the keys, in one copy.
        """
        heads = self.wqkv(x_BlC).unflatten(-1, (3, -1, self.head_dim))
        turned_3BHlh = rotate(heads, rotation_l31D2).permute(2, 0, 3, 1, 4)
        return _attend(turned_3BHlh[0], *cache.append_both(turned_3BHlh[1:]), mask)


class FeedForward(nn.Module):
    """SwiGLU: W2 (SiLU(W1 x) * W3 x)."""

    def __init__(self, config: LlamaGenConfig):
        super().__init__()
        self.w1 = Linear(config.dim, config.ffn_dim, bias=False)
        self.w3 = Linear(config.dim, config.ffn_dim, bias=False)
        self.w2 = Linear(config.ffn_dim, config.dim, bias=False)

    def forward(self, x_BSC: Tensor) -> Tensor:
        """Apply the gated layer to every position."""
        out: Tensor = self.w2(self.gated(x_BSC))
        return out

    def gated(self, x_BSC: Tensor) -> Tensor:
        """What the last layer, `w2`, takes."""
        out: Tensor = F.silu(self.w1(x_BSC)) * self.w3(x_BSC)
        return out


class Block(nn.Module):
    """Pre-norm attention and feed-forward, each added to its input."""

    def __init__(self, config: LlamaGenConfig):
        super().__init__()
        self.attention = Attention(config)
        self.feed_forward = FeedForward(config)
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)

    def forward(self, x_BSC: Tensor, rotation_SD2: Tensor, mask: Tensor | None = None) -> Tensor:
        """One block over a whole sequence [B, S, C]."""
        x_BSC = x_BSC + self.attention(self.attention_norm(x_BSC), rotation_SD2, mask)
        return x_BSC + self.feed_forward(self.ffn_norm(x_BSC))

    def step(
        self, x_BlC: Tensor, rotation_l31D2: Tensor, mask: Tensor | None, cache: KeyValueCache
    ) -> Tensor:
        """One block over the next positions [B, l, C], which it may overwrite."""
        attention, feed_forward = self.attention, self.feed_forward
        mixed = attention.mixed(self.attention_norm(x_BlC), rotation_l31D2, mask, cache)
        x_BlC = attention.wo.onto(mixed, x_BlC)
        return feed_forward.w2.onto(feed_forward.gated(self.ffn_norm(x_BlC)), x_BlC)


class ClassEmbedding(nn.Module):
    """Table of num_classes + 1 rows; the last one is the null class of guidance."""

    def __init__(self, num_classes: int, dim: int):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, dim)

    def forward(self, cond_B: Tensor) -> Tensor:
        """Class ids [B] to condition tokens [B, 1, C]."""
        return self.embedding_table(cond_B)[:, None]


class CaptionProjection(nn.Module):
    """Two layers without biases around a GELU (its tanh form)."""

    def __init__(self, caption_dim: int, dim: int):
        super().__init__()
        self.fc1 = Linear(caption_dim, dim, bias=False)
        self.fc2 = Linear(dim, dim, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Apply to every caption position."""
        out: Tensor = self.fc2(F.gelu(self.fc1(x_BTD), approximate="tanh"))
        return out


class CaptionEmbedding(nn.Module):
    """Captions as condition tokens; the null caption of guidance is stored, and not trained."""

    def __init__(self, config: LlamaGenConfig):
        super().__init__()
        self.cap_proj = CaptionProjection(config.caption_dim, config.dim)
        shape = (config.cls_token_num, config.caption_dim)
        self.register_buffer("uncond_embedding", torch.randn(shape) / config.caption_dim**0.5)

    def forward(self, captions: Captions) -> Tensor:
        """Captions to condition tokens [B, T, C]."""
        features = captions.features_BTD.to(self.cap_proj.fc1.weight.dtype)
        out: Tensor = self.cap_proj(features)
        return out


class LlamaGenTrunk(nn.Module):
    """What the teacher and its student share: class token, blocks, final norm, logits."""

    rope_table = staticmethod(rope_table)

    def __init__(self, config: LlamaGenConfig):
        super().__init__()
        self.cls_embedding: nn.Module = (
            CaptionEmbedding(config)
            if config.reads_captions
            else ClassEmbedding(config.num_classes, config.dim)
        )
        self.conditioning = "text" if config.reads_captions else "class"
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.output = Linear(config.dim, config.vocab_size, bias=False)
        self._sizes = config
        self._rotation: Tensor | None = None

    def rotation(self, device: torch.device) -> Tensor:
        """The rotary table on a device, made once; no parameter or buffer, as in official files."""
        if self._rotation is None or self._rotation.device != device:
            # A table made while generating must also serve a later training step.
            with torch.inference_mode(False):
                self._rotation = self.rope_table(self._sizes, device)
        return self._rotation

    def init_weights(self) -> None:
        """Normal weights of deviation 0.02, as LlamaGen starts from; zero biases and logits."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        nn.init.zeros_(self.output.weight)

    def null(self, cond: Condition) -> Condition:
        """The null condition of guidance; a null caption keeps the mask of the caption."""
        if isinstance(cond, Captions):
            stored: Tensor = self.cls_embedding.uncond_embedding  # type: ignore[assignment]
            return Captions(stored.expand(len(cond), -1, -1), cond.mask_BT)
        return torch.full_like(cond, self._sizes.num_classes)

    def attention_mask(self, cond: Condition, length: int) -> Tensor | None:
        """Which positions see which, bool [B, 1, length, length]; None = causal attention.

        Causal, but nothing sees the padded positions of its caption, save themselves.
        """
        if not isinstance(cond, Captions):
            return None
        valid = F.pad(cond.mask_BT, (0, length - cond.mask_BT.shape[1]), value=True)
        causal = torch.ones(length, length, dtype=torch.bool, device=valid.device).tril()
        itself = torch.eye(length, dtype=torch.bool, device=valid.device)
        return (causal & valid[:, None, None]) | itself

    def hidden(self, x_BSC: Tensor, mask: Tensor | None) -> Tensor:
        """All blocks over a whole sequence, before the final norm."""
        rotation = self.rotation(x_BSC.device)[: x_BSC.shape[1]]
        for layer in self.layers:
            x_BSC = layer(x_BSC, rotation, mask=mask)
        return x_BSC

    def logits(self, x_BSC: Tensor) -> Tensor:
        """Final norm and output matrix; [B, S, V] in the network's dtype."""
        out: Tensor = self.output(self.norm(x_BSC))
        return out


class LlamaGen(LlamaGenTrunk):
    """The autoregressive teacher: stage n is the single token n.

    Args:
        config: sizes.
    """

    top_p_filter = staticmethod(top_p_filter)
    no_guidance = 1.0

    def __init__(self, config: LlamaGenConfig):
        super().__init__(config)
        self.config = config
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.stages = (1,) * config.block_size

    def forward(self, cond: Condition, tokens_BL: Tensor) -> Tensor:
        """Teacher-forced logits; row n predicts token n and sees tokens before n only.

        Args:
            cond: int64 class ids [B], the null class included, or captions.
            tokens_BL: int64 [B, L]; the last token is not read.

        Returns:
            float32 [B, L, V].
        """
        known = self.tok_embeddings(tokens_BL[:, :-1])
        x_BSC = torch.cat((self.cls_embedding(cond), known), 1)
        hidden = self.hidden(x_BSC, self.attention_mask(cond, x_BSC.shape[1]))
        return self.logits(hidden[:, -tokens_BL.shape[1] :]).float()

    @staticmethod
    def guides(cfg: float | None) -> bool:
        """Whether a guidance number does anything: the published code runs no null half up to 1."""
        return cfg is not None and cfg > 1

    @staticmethod
    def guide(conditional: Tensor, null: Tensor, cfg: float, stage: int | None) -> Tensor:
        """Guided logits; the same scale at every stage."""
        return classifier_free_guidance(conditional, null, cfg)

    def decoder(
        self, cond: Condition, prefix_BP: Tensor | None = None, *, unmasked_prefix: bool = False
    ) -> "LlamaGenDecoder":
        """Begin stage-by-stage decoding of a batch, behind tokens of the first stages if given."""
        if unmasked_prefix:
            raise ConfigError("unmasked_prefix is a quirk of VAR's published code alone")
        return LlamaGenDecoder(self, cond, prefix_BP)


class LlamaGenDecoder:
    """One batch on its way through the stages, with a static key-value cache.

    Args:
        model: the transformer.
        cond: int64 class ids [B] or captions.
        prefix_BP: int64 tokens of the first stages, or None; fewer rows than conditions repeat, as
            guidance needs it.
    """

    def __init__(self, model: LlamaGen, cond: Condition, prefix_BP: Tensor | None):
        self._model = model
        condition = model.cls_embedding(cond)
        self._next_BlC = condition
        if prefix_BP is not None:
            self.append(prefix_BP)
            self._next_BlC = torch.cat((condition, self._next_BlC), 1)
        sizes = model.config
        length = sizes.cls_token_num + sizes.block_size
        shape = (len(cond), sizes.n_head, length, sizes.head_dim)
        self._caches = [KeyValueCache(shape, condition) for _ in model.layers]
        self._layers, self._output = model.layers, model.output
        self._written = 0
        turned = model.rotation(condition.device)
        unturned = torch.view_as_real(torch.ones_like(torch.view_as_complex(turned)))
        self._rotation_S31D2 = torch.stack((turned, turned, unturned), 1)[:, :, None]  # of q, k, v
        self._mask = model.attention_mask(cond, length)

    def logits(self, stages: int = 1) -> Tensor:
        """Logits of the next stages, float32 [B, l, V]; `append` must come before the next call.

        Of several, all but the first lack the token before: the mean of all codes' embeddings
        stands in for it, the strongest choice that needs no training (docs/method.md).
        """
        x_BlC, start = self._next_BlC, self._caches[0].length
        if stages > 1:
            unknown = self._model.tok_embeddings.weight.mean(0)
            x_BlC = torch.cat((x_BlC, unknown.expand(len(x_BlC), stages - 1, -1)), 1)
        end = start + x_BlC.shape[1]
        rotation = self._rotation_S31D2[start:end]
        mask = None if self._mask is None else self._mask[:, :, start:end, :end]
        if mask is None and start and stages > 1:  # torch's own flag is for an empty cache
            mask = torch.ones(stages, end, dtype=torch.bool, device=x_BlC.device).tril(start)
        if self._written == _PACKED_FROM:
            rows = len(x_BlC)
            self._layers, self._output = packed(self._layers, rows), packed(self._output, rows)
        for layer, cache in zip(self._layers, self._caches, strict=True):
            x_BlC = layer.step(x_BlC, rotation, mask, cache)  # type: ignore[operator]
        self._written += 1
        logits: Tensor = self._output(self._model.norm(x_BlC[:, -stages:]))
        return logits.float()

    def append(self, tokens_Bl: Tensor) -> None:
        """Give the tokens of the stage whose logits were read, int64 [B, 1]."""
        embedded = self._model.tok_embeddings(tokens_Bl)
        self._next_BlC = embedded.repeat(len(self._next_BlC) // len(embedded), 1, 1)
