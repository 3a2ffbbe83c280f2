"""Captions to what a text-conditioned model reads: the hidden states of a T5 encoder.

LlamaGen's text models were trained on the last hidden state of flan-t5-xl over at most 120
positions (its README and language/t5.py). Needs the extra `text`.

Shapes: B captions, T positions, D feature width.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ddray.errors import CheckpointError, ConfigError, one_line
from ddray.locations import hub_location
from ddray.text.encoder import cleaned_captions

FLAN_T5_XL = "google/flan-t5-xl"


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
    with _loading(source):
        from transformers import AutoConfig

        return int(AutoConfig.from_pretrained(hub_location(source)).d_model)


class T5TextEncoder:
    """The encoder half of a T5, from a folder or by its name on the Hugging Face Hub.

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
        batch = self._tokenizer(
            cleaned_captions(captions),
            max_length=self.length,
            padding="max_length",
            truncation=True,
            return_attention_mask=True,
            return_tensors="pt",
        ).to(self.device)
        mask = batch["attention_mask"]
        features = self._model(input_ids=batch["input_ids"], attention_mask=mask).last_hidden_state
        return features * mask[..., None].to(features.dtype), mask
