"""Facts about DINOv2 and CLIP from a folder: the models of transformers, and the CLIP score."""

import json

import pytest
import torch

from ddray.errors import CheckpointError, ConfigError
from ddray.metrics.caption_agreement import caption_scores
from ddray.metrics.network import POOL
from ddray.metrics.vision_transformer import Clip, Dinov2
from tests.core.metrics.stub_network import some_images
from tests.core.tiny import write_clip

IMAGENET_MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
IMAGENET_DEVIATION = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


def test_a_score_is_the_cosine_in_hundreds_and_never_negative():
    images = torch.tensor([[1.0, 0], [1, 1], [1, 0]])
    captions = torch.tensor([[2.0, 0], [3, 0], [-1, 0]])
    assert caption_scores(images, captions).tolist() == pytest.approx([100, 100 / 2**0.5, 0])
    with pytest.raises(ConfigError, match="2 captions of 2 features do not fit 3 images of 2"):
        caption_scores(images, captions[:2])


@pytest.mark.slow
def test_dinov2_gives_the_class_token(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = transformers.Dinov2Model(transformers.Dinov2Config(**SIZES, image_size=224)).eval()
    model.save_pretrained(tmp_path)
    network = Dinov2(tmp_path)
    images = some_images(3)
    found = network(images)
    grey = torch.full((1, 3, 224, 224), 77 / 255)
    with torch.inference_mode():
        token = model((grey - IMAGENET_MEAN) / IMAGENET_DEVIATION).last_hidden_state[:, 0]
    flat = network(torch.full((1, 9, 9, 3), 77, dtype=torch.uint8))[POOL]
    torch.testing.assert_close(flat, token, rtol=1e-4, atol=1e-4)
    assert found[POOL].shape == (3, 16) and network.layers == {POOL: 16}
    assert Dinov2(tmp_path).fingerprint == network.fingerprint
    with pytest.raises(CheckpointError, match="a model of type dinov2, not clip"):
        Clip(tmp_path)
    with pytest.raises(ConfigError, match="is no folder of a model: it has no config.json"):
        Dinov2(tmp_path / "none")
    (tmp_path / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(CheckpointError, match="cannot load dinov2 from"):
        Dinov2(tmp_path)


@pytest.mark.slow
def test_clip_embeds_images_as_transformers_does(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = write_clip(tmp_path, vocab_size=50)
    network = Clip(tmp_path)
    images = torch.randint(0, 256, (2, 28, 28, 3), dtype=torch.uint8)
    processor = transformers.CLIPImageProcessor(do_resize=False, do_center_crop=False)
    pixels = processor(list(images.numpy()), return_tensors="pt")["pixel_values"]
    with torch.inference_mode():
        found = model.get_image_features(pixel_values=pixels)
    expected = found if isinstance(found, torch.Tensor) else found.pooler_output
    torch.testing.assert_close(network(images)[POOL], expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(CheckpointError, match="has no tokenizer .tokenizer.json or vocab.json"):
        network.of_captions(["a red apple"])
    words = {"<|startoftext|>": 0, "<|endoftext|>": 1, "a</w>": 2, "b</w>": 3, "a": 4, "b": 5}
    (tmp_path / "vocab.json").write_text(json.dumps(words))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    captions = network.of_captions(["a b", "b", "a " * 20])
    tokens = torch.tensor([[0, 2, 3, 1], [0, 3, 1, 1]])
    with torch.inference_mode():
        found = model.get_text_features(input_ids=tokens)
    expected = found if isinstance(found, torch.Tensor) else found.pooler_output
    torch.testing.assert_close(captions[:2], expected, rtol=1e-4, atol=1e-4)
    assert captions.shape == (3, 12)
    with pytest.raises(ConfigError, match="there are no captions to embed"):
        network.of_captions([])
