"""The Distilled Decoding student of LlamaGen: the teacher's trunk over codes, with two heads.

Liu et al., "Distilled Decoding" (arXiv 2412.17153). It reads a sequence X_t whose first t tokens
are data and the rest noise, and gives all tokens at once: as logits over the codebook and as a
regressed code. Parameter names are those of the published students.

Shapes: B batch, L image tokens, V codebook size, E code width, C model width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ddray.method.conditioning import Captions, Condition
from ddray.models.llamagen import LlamaGen, LlamaGenConfig, LlamaGenTrunk
from ddray.models.student_parts import CodeHead, told_apart


@dataclass(frozen=True, kw_only=True)
class LlamaGenStudentConfig(LlamaGenConfig):
    """Sizes of the student: the teacher's, and how codes enter.

    Attributes:
        codebook_dim: code width E.
    """

    codebook_dim: int = 8


class LlamaGenStudent(LlamaGenTrunk):
    """All tokens in one forward pass.

    Args:
        config: sizes.
    """

    def __init__(self, config: LlamaGenStudentConfig):
        super().__init__(config)
        self.config = config
        self.stages = (1,) * config.block_size
        self.tok_embeddings = nn.Linear(config.codebook_dim, config.dim)
        self.n_d_embed = nn.Embedding(2, config.dim)
        self.final_layer_conti = CodeHead(config.dim, config.codebook_dim)

    @property
    def code_layer(self) -> nn.Linear:
        """The layer that reads codes."""
        return self.tok_embeddings

    def forward(self, x_BLE: Tensor, cond: Condition, t_B: Tensor) -> tuple[Tensor, Tensor]:
        """Predict every token of X_t.

        Args:
            x_BLE: float32 [B, L, E], codes of the first t tokens, noise behind them.
            cond: int64 class ids [B] or captions.
            t_B: number of leading tokens that are data, any dtype [B].

        Returns:
            Logits [B, L, V] in the network's dtype and float32 codes [B, L, E], both at the
            position they describe.
        """
        condition = self.cls_embedding(cond)
        codes = self.tok_embeddings(x_BLE.to(condition.dtype))
        x_BSC = torch.cat((condition.to(codes.dtype), codes), 1)
        position = torch.arange(x_BSC.shape[1], device=x_BLE.device)
        is_data_BS1 = (position[None] < condition.shape[1] + t_B[:, None])[..., None]
        mask = self.attention_mask(cond, x_BSC.shape[1])
        hidden = self.hidden(x_BSC + told_apart(is_data_BS1, self.n_d_embed.weight), mask)
        x_BLC = hidden[:, condition.shape[1] :]
        # The code head is modulated by the class, or by the caption's mean.
        pooled = cond.pooled(condition) if isinstance(cond, Captions) else condition
        return self.logits(x_BLC), self.final_layer_conti(x_BLC, pooled)

    @torch.no_grad()
    def init_from_teacher(
        self, teacher: LlamaGen, codebook_VE: Tensor, *, faithful_to_upstream: bool = False
    ) -> None:
        """Start from the teacher: its layers copied, the input layer fitted.

        Copied are class table, blocks, final norm and logits. The teacher embeds token ids, the
        student embeds codes: the linear layer that maps each code to its teacher embedding with the
        least squared error carries over what a linear map can. (The published code leaves this
        layer random.)

        Args:
            teacher: the autoregressive model.
            codebook_VE: float [V, E].
            faithful_to_upstream: leave the input layer as it is, and all that is not copied.
        """
        if not faithful_to_upstream:
            self.init_weights()
        shared = {k: v for k, v in teacher.state_dict().items() if k != "tok_embeddings.weight"}
        self.load_state_dict(shared, strict=False)
        if faithful_to_upstream:
            return
        codes = codebook_VE.double()
        inputs = torch.cat((codes, torch.ones_like(codes[:, :1])), 1)
        fit = torch.linalg.lstsq(inputs, teacher.tok_embeddings.weight.double()).solution
        self.tok_embeddings.weight.copy_(fit[:-1].T)
        self.tok_embeddings.bias.copy_(fit[-1])
