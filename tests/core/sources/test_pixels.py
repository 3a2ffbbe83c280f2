"""Facts about what becomes of an image's colours and size before anything judges it."""

from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from ddray.sources import pixels
from ddray.sources.pixels import PixelRules, PixelsError, center_crop
from tests.core.sources.corpus import PIXELS, deep_png, saved

IMAGE = Image.fromarray(PIXELS[0])
GREY = IMAGE.convert("L")
RNG = np.random.default_rng(2)
DEEP = RNG.integers(0, 65536, (4, 5, 4)).astype(np.uint16)


def decoded(data: bytes, **rules: object) -> np.ndarray:
    return PixelRules(**rules).decode(data)  # type: ignore[arg-type]


def with_alpha(image: Image.Image, alpha: int) -> Image.Image:
    image = image.copy()
    image.putalpha(alpha)
    return image


TAKEN: dict[str, tuple[bytes, Image.Image]] = {
    "colours": (saved(IMAGE), IMAGE),
    "grey": (saved(GREY), GREY.convert("RGB")),
    "black and white": (saved(GREY.convert("1")), GREY.convert("1").convert("RGB")),
    "a palette": (saved(IMAGE.quantize(16)), IMAGE.quantize(16).convert("RGB")),
    "opaque RGBA": (saved(with_alpha(IMAGE, 255)), IMAGE),
    "opaque grey": (saved(with_alpha(GREY, 255)), GREY.convert("RGB")),
    "a palette without transparency": (
        saved(IMAGE.quantize(16), transparency=bytes([255] * 16)),
        IMAGE.quantize(16).convert("RGB"),
    ),
    "lossless WebP": (saved(IMAGE, "WEBP", lossless=True), IMAGE),
    "BMP": (saved(IMAGE, "BMP"), IMAGE),
}


@pytest.mark.parametrize("name", TAKEN)
def test_what_means_one_thing_only_is_taken(name: str) -> None:
    data, expected = TAKEN[name]
    for rules in ({}, {"convert": True}):
        found = decoded(data, **rules)
        assert (found.dtype, found.shape) == (np.uint8, (6, 5, 3))
        np.testing.assert_array_equal(found, np.asarray(expected))


def test_an_orientation_is_not_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    turned, straight = saved(IMAGE, "JPEG", exif=exif), saved(IMAGE, "JPEG")
    assert turned != straight
    np.testing.assert_array_equal(decoded(turned), decoded(straight))


def to_8_bit(values: np.ndarray) -> np.ndarray:
    return np.rint(values.astype(float) * 255 / 65535).astype(np.uint8)


TRANSPARENT = "is transparent in places; --convert takes it as Pillow does, without its alpha"
DEEP_ONES = "has 16 bits a channel; --convert scales them to 8"
REFUSED: dict[str, tuple[bytes, str, Callable[[], np.ndarray]]] = {
    "RGBA": (saved(with_alpha(IMAGE, 254)), TRANSPARENT, lambda: PIXELS[0]),
    "LA": (saved(with_alpha(GREY, 0)), TRANSPARENT, lambda: np.asarray(GREY.convert("RGB"))),
    "a palette": (
        saved(IMAGE.quantize(16), transparency=0),
        TRANSPARENT,
        lambda: np.asarray(IMAGE.quantize(16).convert("RGB")),
    ),
    "a colour": (
        saved(IMAGE, transparency=tuple(PIXELS[0][0, 0].tolist())),
        TRANSPARENT,
        lambda: PIXELS[0],
    ),
    "CMYK": (
        saved(IMAGE.convert("CMYK"), "JPEG"),
        "is CMYK, not RGB or grey; --convert takes it as Pillow does",
        lambda: np.asarray(Image.open(_file(IMAGE)).convert("RGB")),
    ),
    "16 bits of grey": (
        deep_png(DEEP[..., :1], 0),
        DEEP_ONES,
        lambda: np.repeat(to_8_bit(DEEP[..., :1]), 3, -1),
    ),
    "16 bits of RGB": (deep_png(DEEP[..., :3], 2), DEEP_ONES, lambda: to_8_bit(DEEP[..., :3])),
    "16 bits of RGBA": (deep_png(DEEP, 6), DEEP_ONES, lambda: to_8_bit(DEEP[..., :3])),
    "an animation": (
        saved(IMAGE, "WEBP", lossless=True, save_all=True, append_images=[GREY.convert("RGB")]),
        "has 2 frames; --convert takes the first",
        lambda: PIXELS[0],
    ),
}


def _file(image: Image.Image) -> object:
    import io

    return io.BytesIO(saved(image.convert("CMYK"), "JPEG"))


@pytest.mark.parametrize("name", REFUSED)
def test_what_tools_take_in_different_ways_is_refused_unless_told(name: str) -> None:
    data, message, expected = REFUSED[name]
    with pytest.raises(PixelsError) as caught:
        decoded(data)
    assert str(caught.value).startswith(message)
    np.testing.assert_array_equal(decoded(data, convert=True), expected())
    # ADM converts whatever it crops.
    assert decoded(data, size=4).shape == (4, 4, 3)


def test_grey_of_16_bits_with_alpha_is_within_a_level() -> None:
    data = deep_png(DEEP[..., :2], 4)
    with pytest.raises(PixelsError, match="has 16 bits a channel"):
        decoded(data)
    off = decoded(data, convert=True).astype(int) - to_8_bit(DEEP[..., :1])
    assert np.abs(off).max() <= 1


DAMAGED = {
    "nothing": (b"", "is no image but empty"),
    "a page": (b"<html>", "is no image but an HTML page, such as a login or an error"),
    "a cut PNG": (saved(IMAGE)[:70], "is damaged or truncated ("),
    "a cut JPEG": (saved(IMAGE, "JPEG")[:-40], "is damaged or truncated ("),
    "a cut WebP": (saved(IMAGE, "WEBP", lossless=True)[:50], "is damaged or truncated ("),
    "a flipped bit": (saved(IMAGE)[:50] + b"\xff" + saved(IMAGE)[51:], "is damaged or truncated ("),
    "another format": (
        saved(IMAGE, "TIFF"),
        "is no PNG, JPEG, WebP or BMP, or damaged in its first bytes",
    ),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damage_is_said(name: str) -> None:
    data, message = DAMAGED[name]
    for rules in ({}, {"size": 4}):
        with pytest.raises(PixelsError) as caught:
            decoded(data, **rules)
        assert str(caught.value).startswith(message)


def test_files_that_would_become_gigabytes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    bomb = bytearray(saved(IMAGE, "BMP"))
    bomb[18:26] = (40_000).to_bytes(4, "little") * 2
    with pytest.raises(PixelsError, match="would be far more pixels than the 89478485 that are"):
        decoded(bytes(bomb))
    monkeypatch.setattr(pixels, "_MOST_PIXELS", 29)
    with pytest.raises(PixelsError, match="would be 5 x 6 pixels, more than the 29 that are read"):
        decoded(saved(IMAGE))
    monkeypatch.setattr(pixels, "_MOST_PIXELS", 100)
    narrow = np.zeros((1, 90, 3), np.uint8)
    with pytest.raises(PixelsError, match="is 90 x 1 pixels, too narrow to be cropped"):
        PixelRules(size=2).crop(narrow)


def test_a_machine_without_memory_breaks_no_image(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(PixelRules, "_colours", none)
    with pytest.raises(MemoryError):
        decoded(saved(IMAGE))


def halved(pixels: np.ndarray) -> np.ndarray:
    """Means of two columns, then of two rows, each rounded as Pillow does: halves upwards."""
    across = np.floor((pixels[:, 0::2] + pixels[:, 1::2]) / 2 + 0.5)
    return np.floor((across[0::2] + across[1::2]) / 2 + 0.5)


def cubic_matrix(length: int, size: int) -> np.ndarray:
    """Weights [size, length] of a bicubic resize with antialiasing, a = -1/2."""
    scale = length / size
    support = max(scale, 1.0)
    x = np.abs((np.arange(length)[None] + 0.5 - (np.arange(size)[:, None] + 0.5) * scale) / support)
    near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
    weights = np.where(x < 1, near, np.where(x < 2, far, 0))
    return weights / weights.sum(1, keepdims=True)


@pytest.mark.parametrize(("width", "height", "size"), [(96, 80, 16), (40, 60, 24), (7, 9, 12)])
def test_a_crop_is_that_of_a_written_out_reference(width: int, height: int, size: int) -> None:
    image = RNG.integers(0, 256, (height, width, 3)).astype(np.uint8)
    expected = image.astype(float)
    while min(expected.shape[:2]) >= 2 * size:
        expected = halved(expected)
    rows, columns = expected.shape[:2]
    scale = size / min(rows, columns)
    # Pillow rounds between its passes: the horizontal one comes first.
    across = cubic_matrix(columns, round(columns * scale))
    expected = np.clip(np.rint(np.einsum("wk,hkc->hwc", across, expected)), 0, 255)
    down = cubic_matrix(rows, round(rows * scale))
    expected = np.clip(np.rint(np.einsum("hk,kwc->hwc", down, expected)), 0, 255)
    top, left = (expected.shape[0] - size) // 2, (expected.shape[1] - size) // 2
    expected = expected[top : top + size, left : left + size]
    found = PixelRules(size=size).crop(image)
    assert found.shape == expected.shape == (size, size, 3)
    assert np.abs(found - expected).max() <= 1 and (found == expected).mean() > 0.99
    np.testing.assert_array_equal(decoded(saved(Image.fromarray(image)), size=size), found)


def test_an_image_of_the_size_is_left_as_it_is() -> None:
    image = Image.fromarray(PIXELS[0][:5])
    np.testing.assert_array_equal(np.asarray(center_crop(image, 5)), PIXELS[0][:5])


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP"])
def test_whatever_is_damaged_is_an_image_or_a_reason_that_is_the_same_twice(kind: str) -> None:
    whole, draws = saved(Image.fromarray(PIXELS[1]), kind), np.random.default_rng(3)
    for _ in range(60):
        data = bytearray(whole)
        for place in draws.integers(0, len(data), 3):
            data[place] = draws.integers(0, 256)
        answers = []
        for _ in range(2):
            try:
                found = decoded(bytes(data))
            except PixelsError as error:
                assert "0x" not in str(error)
                answers.append(str(error))
            else:
                assert found.ndim == 3 and found.dtype == np.uint8
                answers.append(found.tobytes().hex())
        assert answers[0] == answers[1]
