"""Captions to what a text-conditioned model reads: the hidden states of a T5 encoder.

LlamaGen's text models were trained on the last hidden state of flan-t5-xl over at most 120
positions (its README and language/t5.py). Needs the extra `text`.

Shapes: B captions, N of them different, T positions, t of the longest of some, D feature width.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ddray.errors import CheckpointError, ConfigError, one_line
from ddray.locations import hub_location
from ddray.text.encoder import cleaned_captions

FLAN_T5_XL = "google/flan-t5-xl"
# So that what it costs can be told where neither weights nor network are.
_PUBLISHED: dict[str, Mapping[str, Any]] = {
    FLAN_T5_XL: {
        "d_model": 2048,
        "d_kv": 64,
        "d_ff": 5120,
        "num_layers": 24,
        "num_heads": 32,
        "feed_forward_proj": "gated-gelu",
    }
}
# Captions of a pass: of the usual length they are some five hundred positions, so a GPU is not kept
# waiting for weights; and the fewer there are, the more alike in length.
_ROWS_AT_ONCE = 32


@contextmanager
def _loading(source: str) -> Iterator[None]:
    try:
        import transformers  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "captions as text need the package transformers; install ddray[text], or pass "
            "features and mask"
        ) from error
    try:
        yield
    except Exception as error:  # those of the hub, of the network, of the files
        raise CheckpointError(
            f"cannot load the text encoder {source}: {one_line(error)}; give a folder that holds it"
        ) from error


def encoder_width(source: str) -> int:
    """D of a T5, from its config alone, so that a job that cannot work ends before it starts.

    Raises:
        ConfigError: without the package transformers.
        CheckpointError: for a source that holds no T5, or cannot be reached.
    """
    return int(_loaded_config(source)["d_model"])


def _loaded_config(source: str) -> dict[str, Any]:
    with _loading(source):
        from transformers import AutoConfig

        config: dict[str, Any] = AutoConfig.from_pretrained(hub_location(source)).to_dict()
        return {name: config[name] for name in _PUBLISHED[FLAN_T5_XL]}


def t5_config(source: str) -> Mapping[str, Any]:
    """The sizes of a T5, named as in its config; of a published one without a look at it.

    Raises:
        ConfigError: without the package transformers.
        CheckpointError: for a source that holds no T5, or cannot be reached.
    """
    return _PUBLISHED.get(source) or _loaded_config(source)


def t5_flops(config: Mapping[str, Any], positions: int) -> int:
    """Operations of the encoder's pass over a caption, products of matrices alone.

    Args:
        config: sizes, as of `t5_config`.
        positions: of the caption, padding included.
    """
    width, inner = config["d_model"], config["num_heads"] * config["d_kv"]
    widened = 2 if str(config["feed_forward_proj"]).startswith("gated") else 1
    weights = 4 * width * inner + (widened + 1) * width * config["d_ff"]
    return int(config["num_layers"] * (2 * weights * positions + 4 * inner * positions**2))


def by_length(lengths: Sequence[int]) -> list[list[int]]:
    """Which captions share a pass: neighbours in length, so that little of it is padding.

    Args:
        lengths: positions of each caption.

    Returns:
        Numbers of captions, the shortest first; captions of one length in their order.
    """
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    return [order[k : k + _ROWS_AT_ONCE] for k in range(0, len(order), _ROWS_AT_ONCE)]


class T5TextEncoder:
    """The encoder half of a T5, from a folder or by its name on the Hugging Face Hub.

    Each different caption of a call is encoded once, together with others of its length, and
    padding costs nothing that the longest of them does not have. The same call gives the same bits.
    In another call, with other captions beside it, a caption has the same features but for the last
    bits of `dtype`: which kernel multiplies, and in which order it sums, follows from the number of
    rows and positions.

    Args:
        source: folder or repository name.
        length: T, positions of every caption; longer captions are cut.
        dtype: of the weights and the features (published: bfloat16).
        device: where it runs.

    Raises:
        ConfigError: without the package transformers, or for a length below 1.
        CheckpointError: for a source that holds no T5, or cannot be reached.
    """

    def __init__(
        self,
        source: str = FLAN_T5_XL,
        *,
        length: int = 120,
        dtype: torch.dtype = torch.bfloat16,
        device: str | torch.device = "cpu",
    ):
        if length < 1:
            raise ConfigError(f"length={length} must be at least 1 position")
        self.length = length
        self.device = torch.device(device)
        source = hub_location(source)
        with _loading(source):
            from transformers import AutoTokenizer, T5EncoderModel

            self._tokenizer: Any = AutoTokenizer.from_pretrained(source, padding_side="right")
            model: Any = T5EncoderModel.from_pretrained(source, dtype=dtype)
        self._model = model.to(self.device).eval()

    @property
    def width(self) -> int:
        """D."""
        return int(self._model.config.d_model)

    @torch.no_grad()
    def __call__(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Encode captions.

        Args:
            captions: at least one, none of them empty once cleaned.

        Returns:
            Features [B, T, D] in the model's dtype, padded on the right and zero there, and mask
            int64 [B, T], 1 = valid.

        Raises:
            ConfigError: for a bare string, no caption, an empty one, or one that is no text.
        """
        cleaned = cleaned_captions(captions)
        number = {caption: n for n, caption in enumerate(dict.fromkeys(cleaned))}
        ids = self._tokenizer([*number], max_length=self.length, truncation=True)["input_ids"]
        features_NTD = torch.zeros(
            len(ids), self.length, self.width, dtype=self._model.dtype, device=self.device
        )
        mask_NT = torch.zeros(len(ids), self.length, dtype=torch.int64, device=self.device)
        for some in by_length([*map(len, ids)]):
            features_BtD, mask_Bt = self._encode([ids[n] for n in some])
            longest = mask_Bt.shape[1]
            features_NTD[some, :longest], mask_NT[some, :longest] = features_BtD, mask_Bt
        rows_B = torch.tensor([number[caption] for caption in cleaned], device=self.device)
        return features_NTD[rows_B], mask_NT[rows_B]

    def _encode(self, ids: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Features [B, t, D], zero where there is padding, and mask int64 [B, t] of token ids."""
        rows = [torch.tensor(row) for row in ids]
        mask_Bt = pad_sequence([torch.ones_like(row) for row in rows], True).to(self.device)
        ids_Bt = pad_sequence(rows, True, self._tokenizer.pad_token_id).to(self.device)
        features_BtD = self._model(input_ids=ids_Bt, attention_mask=mask_Bt).last_hidden_state
        return features_BtD * mask_Bt[..., None].to(features_BtD.dtype), mask_Bt
