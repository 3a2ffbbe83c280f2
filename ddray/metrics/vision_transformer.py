"""DINOv2 and CLIP through transformers, from a folder on disk: FD-DINOv2, and captions.

Stein et al., arXiv 2306.04675, found that distances between features of DINOv2 agree better with
people than those of Inception. Nothing is downloaded, and only safetensors are read. Needs the
extra `text`.

Shapes: N images or captions, D features.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddray.errors import CheckpointError, ConfigError, one_line
from ddray.locations import local_file
from ddray.method.flow import full_float32
from ddray.metrics.network import POOL, FeatureNetwork
from ddray.metrics.pixels import RESIZES
from ddray.storage.checkpoint import fingerprint

_DINO_SIDE = 224
_TOKENIZER_FILES = ("tokenizer.json", "vocab.json")
# Of ImageNet's training images, and of CLIP's.
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


@contextmanager
def _loading(kind: str, folder: Path) -> Iterator[None]:
    try:
        import transformers  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"{kind} needs the package transformers; install ddray[text], or leave its metrics out"
        ) from error
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{kind}={folder} is no folder of a model: it has no config.json")
    try:
        yield
    except Exception as error:  # those of transformers, of safetensors, of the files
        raise CheckpointError(f"cannot load {kind} from {folder}: {one_line(error)}") from error


def _load(kind: str, folder: Path, model: str, model_type: str) -> Any:
    """A model of transformers in float32.

    Raises:
        CheckpointError: if the folder holds another model, or not all of its weights.
    """
    with _loading(kind, folder):
        import transformers

        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        if config.model_type != model_type:
            raise ValueError(f"it holds a model of type {config.model_type}, not {model_type}")
        network, report = getattr(transformers, model).from_pretrained(
            folder,
            local_files_only=True,
            use_safetensors=True,
            dtype=torch.float32,
            output_loading_info=True,
        )
        if report["missing_keys"]:
            raise ValueError(f"it lacks weights, such as {sorted(report['missing_keys'])[0]}")
        return network


def _normalised(pixels: Tensor, size: int, moments: tuple[tuple[float, ...], ...]) -> Tensor:
    mean, deviation = (pixels.new_tensor(values).view(1, 3, 1, 1) for values in moments)
    return (RESIZES["bicubic"](pixels, size) / 255 - mean) / deviation


class Dinov2(FeatureNetwork):
    """The class token of a DINOv2, of images resized to 224 pixels; published: ViT-L/14.

    Args:
        folder: as `save_pretrained` of transformers writes it.
        device: where it runs.

    Raises:
        ConfigError: without the package transformers, or for no such folder.
        CheckpointError: if the folder holds another model, or is damaged.
    """

    name = "dinov2"

    def __init__(self, folder: str | Path, *, device: str | torch.device = "cpu"):
        network = _load("dinov2", Path(local_file(folder)), "Dinov2Model", "dinov2")
        self.layers = {POOL: int(network.config.hidden_size)}
        super().__init__(network, fingerprint(network), device)

    def _features(self, pixels: Tensor) -> dict[str, Tensor]:
        out = self.module(pixel_values=_normalised(pixels, _DINO_SIDE, _IMAGENET))
        return {POOL: out.pooler_output.float()}


class Clip(FeatureNetwork):
    """A CLIP: embeddings of images, and how well captions fit them.

    Args:
        folder: as `save_pretrained` of transformers writes it, with its tokenizer.
        device: where it runs.

    Raises:
        ConfigError: without the package transformers, or for no such folder.
        CheckpointError: if the folder holds another model, or is damaged.
    """

    name = "clip"

    def __init__(self, folder: str | Path, *, device: str | torch.device = "cpu"):
        self._folder = Path(local_file(folder))
        network = _load("clip", self._folder, "CLIPModel", "clip")
        self.layers = {POOL: int(network.config.projection_dim)}
        self._side = int(network.config.vision_config.image_size)
        self._tokenizer: Any = None
        super().__init__(network, fingerprint(network), device)

    def _features(self, pixels: Tensor) -> dict[str, Tensor]:
        vision: Any = self.module
        out = vision.vision_model(pixel_values=_normalised(pixels, self._side, _CLIP))
        return {POOL: vision.visual_projection(out.pooler_output).float()}

    def of_captions(self, captions: Sequence[str]) -> Tensor:
        """Embeddings of captions, float32 [N, D]; longer ones are cut to CLIP's 77 positions.

        Raises:
            ConfigError: for no captions.
            CheckpointError: if the folder holds no tokenizer.
        """
        if not captions:
            raise ConfigError("there are no captions to embed")
        self._tokenizer = self._tokenizer or self._load_tokenizer()
        text: Any = self.module
        tokens = self._tokenizer(
            list(captions),
            padding=True,
            truncation=True,
            max_length=text.config.text_config.max_position_embeddings,
            return_tensors="pt",
        ).to(self.device)
        with torch.no_grad(), full_float32(self.device):
            out = text.text_model(
                input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]
            )
            return text.text_projection(out.pooler_output).float()

    def _load_tokenizer(self) -> Any:
        # Without its files transformers makes up a vocabulary of nothing, and says nothing.
        if not any((self._folder / name).is_file() for name in _TOKENIZER_FILES):
            raise CheckpointError(
                f"clip={self._folder} has no tokenizer ({' or '.join(_TOKENIZER_FILES)})"
            )
        with _loading("clip", self._folder):
            from transformers import AutoTokenizer

            return AutoTokenizer.from_pretrained(self._folder, local_files_only=True)
