"""load_photo: whatever a camera or a web page can produce is read upright, or refused with a sentence that helps."""

from __future__ import annotations

import contextlib
import io
import os
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image

from realisid_trt.errors import PhotoError
from realisid_trt.photo import MAX_PIXELS, WORKING_SIDE_PX, load_photo, photo_hash


def refusal(source: Any, code: str) -> str:
    """The text with which a photo is refused; asserts the code and that the text says what to do."""
    with pytest.raises(PhotoError) as caught:
        load_photo(source)
    assert caught.value.code == code
    text = str(caught.value)
    assert text[-1] in ".)0123456789" and len(text) > 40
    return text


def encoded(picture: Image.Image, kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, kind, **options)
    return stream.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds next to nothing."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


# -- what is read ------------------------------------------------------------------------------------------------------


def test_path_bytes_picture_and_array_are_the_same_photo(photos: Any) -> None:
    picture = Image.open(photos.astronaut)
    expected = np.array(picture.convert("RGB"))
    for source in (photos.astronaut, str(photos.astronaut), photos.astronaut.read_bytes(), picture, expected):
        rgb = load_photo(source)
        assert rgb.dtype == np.uint8 and rgb.shape == (512, 512, 3)
        np.testing.assert_array_equal(rgb, expected)


@pytest.mark.parametrize("mode", ["L", "LA", "P", "CMYK", "RGBA", "1", "YCbCr"])
def test_every_colour_mode_becomes_rgb(photos: Any, mode: str) -> None:
    rgb = np.array(Image.open(photos.hopper).convert("RGB"))
    converted = Image.fromarray(rgb).convert(mode)
    kind = {"CMYK": "JPEG", "YCbCr": "JPEG"}.get(mode, "PNG")
    loaded = load_photo(encoded(converted, kind))
    assert loaded.shape == rgb.shape
    if mode not in ("P", "1"):  # these two lose the colours themselves
        grey = rgb.mean(axis=2) if mode in ("L", "LA") else None
        expected = rgb if grey is None else np.repeat(grey[..., None], 3, axis=2)
        assert np.abs(loaded.astype(float) - expected).mean() < 8


def test_exif_orientation_is_applied(photos: Any) -> None:
    upright = Image.open(photos.hopper).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera lay on its side: turn by 90° clockwise to see it upright
    stored = upright.transpose(Image.Transpose.ROTATE_90)
    loaded = load_photo(encoded(stored, "PNG", exif=exif))
    np.testing.assert_array_equal(loaded, np.array(upright))


def test_transparent_background_is_laid_on_white() -> None:
    rgba = np.zeros((80, 80, 4), np.uint8)
    rgba[:40] = (10, 20, 30, 255)  # opaque
    rgba[40:] = (200, 0, 0, 0)  # red hides below full transparency
    for source in (rgba, encoded(Image.fromarray(rgba), "PNG")):
        rgb = load_photo(source)
        assert (rgb[:40] == (10, 20, 30)).all() and (rgb[40:] == 255).all()
    palette = Image.fromarray(rgba).convert("RGBA").quantize(4)
    assert (load_photo(encoded(palette, "PNG"))[60, 40] > 250).all()


def test_16_bit_grey_is_not_clipped_to_white(photos: Any) -> None:
    grey = np.array(Image.open(photos.hopper).convert("L"))
    wide = grey.astype(np.uint16) * 257
    expected = np.repeat(grey[..., None], 3, axis=2)
    np.testing.assert_array_equal(load_photo(encoded(Image.fromarray(wide), "PNG")), expected)
    np.testing.assert_array_equal(load_photo(encoded(Image.fromarray(wide.astype(np.int32)), "TIFF")), expected)
    np.testing.assert_array_equal(load_photo(wide), expected)
    # Pillow alone clips; if it ever stops, the special case above can go.
    assert np.array(Image.open(io.BytesIO(encoded(Image.fromarray(wide), "PNG"))).convert("RGB")).mean() > 200


def test_16_bit_rgb_png_is_read(photos: Any) -> None:
    rgb = np.array(Image.open(photos.hopper).convert("RGB"))
    done, content = cv2.imencode(".png", rgb[..., ::-1].astype(np.uint16) * 257)
    assert done
    np.testing.assert_array_equal(load_photo(content.tobytes()), rgb)


def test_wide_container_with_8_bit_values_is_taken_as_8_bit() -> None:
    grey = np.arange(6400, dtype=np.uint16).reshape(80, 80) % 256
    np.testing.assert_array_equal(load_photo(encoded(Image.fromarray(grey), "PNG"))[..., 0], grey)


@pytest.mark.parametrize("shape", [(90, 70), (90, 70, 1), (90, 70, 3), (90, 70, 4)])
def test_arrays(shape: tuple[int, ...]) -> None:
    array = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    if shape[-1] == 4:
        array[..., 3] = 255
    rgb = load_photo(array)
    assert rgb.shape == (90, 70, 3)
    np.testing.assert_array_equal(rgb[..., 0], array if array.ndim == 2 else array[..., 0])
    np.testing.assert_array_equal(load_photo(array[:, ::-1]), rgb[:, ::-1])  # strides other than plain


def test_large_photo_is_reduced_and_a_large_jpeg_never_decoded_in_full() -> None:
    large = Image.effect_noise((6000, 4000), 40).convert("RGB")  # 24 MP
    rgb = load_photo(encoded(large, "JPEG", quality=50))
    assert rgb.shape == (1365, WORKING_SIDE_PX, 3)
    assert load_photo(large).shape == (1365, WORKING_SIDE_PX, 3)
    assert large.size == (6000, 4000)  # the caller's picture is as it was


def test_animation_gives_its_first_frame() -> None:
    frames = [Image.new("RGB", (80, 80), color) for color in ("red", "blue")]
    animated = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert (load_photo(animated)[40, 40] == (255, 0, 0)).all()


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_missing_file_and_folder(tmp_path: Path) -> None:
    assert "no such file" in refusal(tmp_path / "nobody.jpg", "not_found")
    assert "folder" in refusal(tmp_path, "unreadable")


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may read everything")
def test_file_without_permission(photos: Any, tmp_path: Path) -> None:
    secret = tmp_path / "secret.png"
    secret.write_bytes(photos.astronaut.read_bytes())
    secret.chmod(0)
    assert "permission" in refusal(secret, "unreadable")


@pytest.mark.parametrize("content", [b"", b"Dear Alice, this is a letter.", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"])
def test_what_is_no_picture(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "photo.jpg"
    path.write_bytes(content)
    for source in (path, content):
        assert "JPEG, PNG, WebP" in refusal(source, "unreadable")


def test_truncated_jpeg_is_not_half_a_photo(photos: Any, tmp_path: Path) -> None:
    path = tmp_path / "cut.jpg"
    path.write_bytes(photos.hopper.read_bytes()[:30000])
    assert "damaged or truncated" in refusal(path, "corrupt")
    assert cv2.imread(str(path)) is not None  # why it must not be cv2.imread


def test_corrupt_png(photos: Any) -> None:
    content = bytearray(photos.astronaut.read_bytes())
    content[20000:20400] = bytes(400)
    assert "damaged or truncated" in refusal(bytes(content), "corrupt")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"])
def test_random_damage_never_escapes_as_another_exception(photos: Any, kind: str) -> None:
    """Flip bytes, cut ends: a photo or a PhotoError, whatever a decoder makes of it."""
    picture = Image.open(photos.astronaut).convert("RGB").resize((96, 96))
    content = encoded(picture, kind, **({"compression": "tiff_lzw"} if kind == "TIFF" else {}))
    chance = np.random.default_rng(3)
    for _ in range(60):
        damaged = bytearray(content)
        for place in chance.integers(0, min(len(damaged), 600), 4):
            damaged[place] = chance.integers(0, 256)
        if chance.random() < 0.5:
            damaged = damaged[: chance.integers(1, len(damaged))]
        try:
            assert load_photo(bytes(damaged)).shape[2] == 3
        except PhotoError as error:
            assert error.code in ("corrupt", "unreadable", "too_large", "too_small", "mode")


def test_float_pictures(photos: Any, tmp_path: Path) -> None:
    grey = np.array(Image.open(photos.hopper).convert("L"), np.float32) / 255
    assert "floating-point" in refusal(encoded(Image.fromarray(grey), "TIFF"), "mode")
    path = str(tmp_path / "float_rgb.tiff")
    assert cv2.imwrite(path, np.dstack([grey] * 3))
    assert "8 bits per channel" in refusal(path, "unreadable")  # Pillow knows no float RGB


def test_modes_without_a_way_to_rgb() -> None:
    wide = np.full((80, 80), 1_000_000, np.int32)
    assert "more than 16 bits" in refusal(encoded(Image.fromarray(wide), "TIFF"), "mode")
    assert "sRGB" in refusal(Image.new("La", (80, 80)), "mode")  # grey with premultiplied alpha


def test_pixel_bombs_are_refused_from_the_header() -> None:
    for width, height in ((20000, 20000), (12000, 10000)):  # Pillow refuses the first itself, and warns of the second
        with pytest.warns() if width == 12000 else contextlib.nullcontext():
            text = refusal(png_header(width, height), "too_large")
        assert f"{MAX_PIXELS // 10**6}" in text and "Reduce it" in text


def test_bomb_under_warnings_as_errors() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        refusal(png_header(12000, 10000), "too_large")


@pytest.mark.parametrize("size", [(1, 1), (63, 500), (500, 63)])
def test_too_small(size: tuple[int, int]) -> None:
    assert f"{size[0]}×{size[1]}" in refusal(encoded(Image.new("RGB", size), "PNG"), "too_small")


def test_arrays_that_are_no_photo() -> None:
    assert "numpy.uint8" in refusal(np.zeros((80, 80, 3), np.float32), "dtype")
    for shape in ((3, 80, 80), (2, 80, 80, 3), (80,), (80, 80, 2), (0, 80, 3)):
        assert str(shape) in refusal(np.zeros(shape, np.uint8), "shape")
    assert "path" in refusal(7, "type")


def test_name_stands_in_the_message(tmp_path: Path) -> None:
    with pytest.raises(PhotoError, match="the pose of Alice: no such file"):
        load_photo(tmp_path / "a.png", "the pose of Alice")


# -- the cache key -----------------------------------------------------------------------------------------------------


def test_photo_hash_tells_photos_apart() -> None:
    rgb = np.random.default_rng(0).integers(0, 256, (80, 120, 3)).astype(np.uint8)
    other = rgb.copy()
    other[0, 0, 0] ^= 1
    keys = {photo_hash(rgb), photo_hash(other), photo_hash(rgb.reshape(120, 80, 3)), photo_hash(rgb[::-1])}
    assert len(keys) == 4
    assert photo_hash(rgb[::-1][::-1]) == photo_hash(rgb) and len(photo_hash(rgb)) == 64
