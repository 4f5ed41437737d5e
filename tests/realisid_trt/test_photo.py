"""load_photo: whatever a camera or a web page can produce is read upright, or refused with a sentence that helps."""

from __future__ import annotations

import contextlib
import io
import os
import struct
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image

from realisid_trt.errors import PhotoError, RequestError
from realisid_trt.persons.photo import MAX_PIXELS, WORKING_SIDE_PX, LoadedPhoto, load_crop, load_photo, photo_hash


def refusal(source: Any, code: str) -> str:
    """The text of a refused photo's error; asserts its code, and that the text says what to do."""
    with pytest.raises(PhotoError) as caught:
        load_photo(source)
    assert caught.value.code == code
    text = str(caught.value)
    assert text[-1] in ".)0123456789" and len(text) > 40
    return text


def rgb_of(source: Any) -> Any:
    return load_photo(source).rgb


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
        rgb = rgb_of(source)
        assert rgb.dtype == np.uint8 and rgb.shape == (512, 512, 3)
        np.testing.assert_array_equal(rgb, expected)


@pytest.mark.parametrize("mode", ["L", "LA", "P", "CMYK", "RGBA", "1", "YCbCr"])
def test_every_colour_mode_becomes_rgb(photos: Any, mode: str) -> None:
    rgb = np.array(Image.open(photos.hopper).convert("RGB"))
    converted = Image.fromarray(rgb).convert(mode)
    kind = {"CMYK": "JPEG", "YCbCr": "JPEG"}.get(mode, "PNG")
    loaded = rgb_of(encoded(converted, kind))
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
    loaded = rgb_of(encoded(stored, "PNG", exif=exif))
    np.testing.assert_array_equal(loaded, np.array(upright))


def test_transparent_background_is_laid_on_white() -> None:
    rgba = np.zeros((80, 80, 4), np.uint8)
    rgba[:40] = (10, 20, 30, 255)  # opaque
    rgba[40:] = (200, 0, 0, 0)  # red hides below full transparency
    for source in (rgba, encoded(Image.fromarray(rgba), "PNG")):
        rgb = rgb_of(source)
        assert (rgb[:40] == (10, 20, 30)).all() and (rgb[40:] == 255).all()
    palette = Image.fromarray(rgba).convert("RGBA").quantize(4)
    assert (rgb_of(encoded(palette, "PNG"))[60, 40] > 250).all()


def test_16_bit_grey_is_not_clipped_to_white(photos: Any) -> None:
    grey = np.array(Image.open(photos.hopper).convert("L"))
    wide = grey.astype(np.uint16) * 257
    expected = np.repeat(grey[..., None], 3, axis=2)
    np.testing.assert_array_equal(rgb_of(encoded(Image.fromarray(wide), "PNG")), expected)
    np.testing.assert_array_equal(rgb_of(encoded(Image.fromarray(wide.astype(np.int32)), "TIFF")), expected)
    np.testing.assert_array_equal(rgb_of(wide), expected)
    # Pillow alone clips; if it ever stops, the special case above can go.
    assert np.array(Image.open(io.BytesIO(encoded(Image.fromarray(wide), "PNG"))).convert("RGB")).mean() > 200


def test_16_bit_rgb_png_is_read(photos: Any) -> None:
    rgb = np.array(Image.open(photos.hopper).convert("RGB"))
    done, content = cv2.imencode(".png", rgb[..., ::-1].astype(np.uint16) * 257)
    assert done
    np.testing.assert_array_equal(rgb_of(content.tobytes()), rgb)


def test_wide_container_with_8_bit_values_is_taken_as_8_bit() -> None:
    grey = np.arange(6400, dtype=np.uint16).reshape(80, 80) % 256
    np.testing.assert_array_equal(rgb_of(encoded(Image.fromarray(grey), "PNG"))[..., 0], grey)


@pytest.mark.parametrize("shape", [(90, 70), (90, 70, 1), (90, 70, 3), (90, 70, 4)])
def test_arrays(shape: tuple[int, ...]) -> None:
    array = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    if shape[-1] == 4:
        array[..., 3] = 255
    rgb = rgb_of(array)
    assert rgb.shape == (90, 70, 3)
    np.testing.assert_array_equal(rgb[..., 0], array if array.ndim == 2 else array[..., 0])
    np.testing.assert_array_equal(rgb_of(array[:, ::-1]), rgb[:, ::-1])  # strides other than plain


def test_large_photo_is_reduced_and_a_large_jpeg_never_decoded_in_full() -> None:
    large = Image.effect_noise((6000, 4000), 40).convert("RGB")  # 24 MP
    for photo in (load_photo(encoded(large, "JPEG", quality=50)), load_photo(large)):
        assert photo.rgb.shape == (1365, WORKING_SIDE_PX, 3)
        assert photo.size == (4000, 6000) and photo.scale == 6000 / 2048
    assert large.size == (6000, 4000)  # the caller's picture is as it was


def test_animation_gives_its_first_frame() -> None:
    frames = [Image.new("RGB", (80, 80), color) for color in ("red", "blue")]
    animated = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert (rgb_of(animated)[40, 40] == (255, 0, 0)).all()


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_missing_file_and_folder(tmp_path: Path) -> None:
    assert "no such file" in refusal(tmp_path / "nobody.jpg", "not_found")
    assert "folder" in refusal(tmp_path, "unreadable")


@pytest.fixture
def no_rights() -> Iterator[None]:
    """As a user without root's rights, who may read everything."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    yield
    os.seteuid(0)


def test_file_without_permission_and_in_a_folder_without(photos: Any, tmp_path: Path, no_rights: None) -> None:
    """A folder that may not be searched used to end in a bare PermissionError."""
    rights = os.geteuid()
    os.seteuid(os.getuid())  # the files belong to the user of the tests
    secret = tmp_path / "secret.png"
    secret.write_bytes(photos.astronaut.read_bytes())
    secret.chmod(0)
    closed = tmp_path / "closed"
    closed.mkdir()
    (closed / "photo.png").write_bytes(photos.astronaut.read_bytes())
    closed.chmod(0)
    os.seteuid(rights)
    for path in (secret, closed / "photo.png"):
        assert "permission" in refusal(path, "unreadable")


def test_names_that_no_file_can_have(tmp_path: Path) -> None:
    text = refusal("a" * 5000 + ".jpg", "unreadable")
    assert "File name too long" in text and len(text) < 400
    refusal("zero\0byte.jpg", "unreadable")
    (tmp_path / "file").write_bytes(b"")
    assert "no such file" in refusal(tmp_path / "file" / "below.jpg", "not_found")


@pytest.mark.parametrize("content", [b"", b"Dear Alice, this is a letter.", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"])
def test_what_is_no_picture(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "photo.jpg"
    path.write_bytes(content)
    for source in (path, content):
        assert "JPEG, PNG, WebP" in refusal(source, "unreadable")


def test_what_other_programs_would_draw(photos: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the file is called: Pillow would give EPS to Ghostscript."""
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/drawn\nexit 1")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with Image.open(photos.hopper) as picture:
        for kind in ("EPS", "ICNS", "PDF"):
            refusal(encoded(picture, kind), "unreadable")
    assert not (tmp_path / "drawn").exists()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "PPM", "TGA", "JPEG2000"])
def test_common_formats(kind: str) -> None:
    grey = Image.new("RGB", (80, 70), (120, 120, 120))
    assert np.abs(rgb_of(encoded(grey, kind)).astype(int) - 120).max() <= 2


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
            assert rgb_of(bytes(damaged)).shape[2] == 3
        except PhotoError as error:
            assert error.code in ("corrupt", "unreadable", "too_large", "too_small", "mode")


def test_float_pictures(photos: Any, tmp_path: Path) -> None:
    grey = np.array(Image.open(photos.hopper).convert("L"), np.float32) / 255
    assert "floating-point" in refusal(encoded(Image.fromarray(grey), "TIFF"), "mode")
    path = str(tmp_path / "float_rgb.tiff")
    assert cv2.imwrite(path, np.dstack([grey] * 3))
    assert "8 bits per channel" in refusal(path, "unreadable")  # Pillow has no float RGB


def test_modes_without_a_way_to_rgb() -> None:
    wide = np.full((80, 80), 1_000_000, np.int32)
    assert "more than 16 bits" in refusal(encoded(Image.fromarray(wide), "TIFF"), "mode")
    assert (rgb_of(Image.new("La", (80, 80))) == 255).all()  # grey with premultiplied alpha, which is transparent


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


# -- photo px ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", [1, 3, 5, 6, 8])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_size_is_that_of_the_upright_original(kind: str, orientation: int) -> None:
    """Each format applies EXIF orientation at another moment; a JPEG is decoded smaller than it is."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    for width, height in ((4500, 3000), (300, 200)):
        photo = load_photo(encoded(Image.new("RGB", (width, height)), kind, exif=exif))
        assert photo.size == ((height, width) if orientation < 5 else (width, height))
        side = max(photo.rgb.shape)
        assert side == min(2048, width) and photo.scale == width / side
        assert (photo.rgb.shape[0] > photo.rgb.shape[1]) == (orientation >= 5)


def test_turned_photo() -> None:
    photo = LoadedPhoto(np.arange(70 * 90 * 3, dtype=np.uint8).reshape(70, 90, 3), (700, 900))
    left = photo.turned(1)
    np.testing.assert_array_equal(left.rgb, np.rot90(photo.rgb))
    assert left.size == (900, 700) and left.scale == photo.scale == 10
    assert photo.turned(2).size == (700, 900) and photo.turned(0) is photo


# -- crops of the caller's own -----------------------------------------------------------------------------------------


def test_own_crop_is_resized_and_transparency_is_black() -> None:
    crop = np.random.default_rng(0).integers(0, 256, (96, 96, 3)).astype(np.uint8)
    np.testing.assert_array_equal(load_crop(crop, 96, "crop"), crop)
    half = np.zeros((200, 200, 4), np.uint8)
    half[:100] = (200, 100, 50, 255)
    half[100:] = (9, 9, 9, 0)
    small = load_crop(Image.fromarray(half), 50, "crop")
    assert small.shape == (50, 50, 3)
    assert (small[:24] == (200, 100, 50)).all() and not small[26:].any()
    np.testing.assert_array_equal(load_crop(encoded(Image.fromarray(half), "PNG"), 50, "crop"), small)
    assert load_crop(crop[:20, :20], 96, "crop").shape == (96, 96, 3)  # any size


def test_own_crop_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"the crop of photo is 80×90, expected a square"):
        load_crop(np.zeros((90, 80, 3), np.uint8), 64, "the crop of photo")
    for crop, code in ((np.zeros((90, 90, 3)), "dtype"), (tmp_path / "x.png", "not_found"), (7, "type")):
        with pytest.raises(PhotoError) as caught:
            load_crop(crop, 64, "the crop of photo")  # type: ignore[arg-type]
        assert caught.value.code == code and "the crop of photo" in str(caught.value)


# -- the cache key -----------------------------------------------------------------------------------------------------


def test_photo_hash_tells_photos_apart() -> None:
    rgb = np.random.default_rng(0).integers(0, 256, (80, 120, 3)).astype(np.uint8)
    other = rgb.copy()
    other[0, 0, 0] ^= 1
    photos = [LoadedPhoto(array, array.shape[:2]) for array in (rgb, other, rgb.reshape(120, 80, 3), rgb[::-1])]
    photos.append(LoadedPhoto(rgb, (160, 240)))  # a larger photo that was reduced to the same pixels
    assert len({photo_hash(photo) for photo in photos}) == 5
    assert photo_hash(LoadedPhoto(rgb[::-1][::-1], (80, 120))) == photo_hash(photos[0])
    assert len(photo_hash(photos[0])) == 64
