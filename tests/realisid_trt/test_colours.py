"""Colour profiles, wide numbers and odd containers: the face front end gets the colours that a file means."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import struct
import tracemalloc
import zlib
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image, ImageCms, PngImagePlugin

from realisid_trt.errors import PhotoError
from realisid_trt.persons import containers
from realisid_trt.persons.photo import WORKING_SIDE_PX, load_crop, load_photo

# Columns are the primaries' XYZ, adapted to D50 by Bradford, as profiles hold them.
# Sources: SMPTE EG 432-1 (P3-D65), Adobe RGB (1998) Color Image Encoding.
DISPLAY_P3 = ((0.51512, 0.24120, -0.00105), (0.29198, 0.69225, 0.04189), (0.15710, 0.06657, 0.78407))
ADOBE_RGB = ((0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457))


def profile(primaries: Any, gamma: float = 2.2) -> bytes:
    """A matrix profile: ICC.1:2010, a header of 128 bytes and nine tags."""

    def fixed(value: float) -> bytes:
        return struct.pack(">i", round(value * 65536))

    def xyz(values: Any) -> bytes:
        return b"XYZ " + bytes(4) + b"".join(map(fixed, values))

    text = b"text" + bytes(4) + b"none\0"
    description = b"desc" + bytes(4) + struct.pack(">I", 5) + b"test\0" + bytes(78)
    curve = b"curv" + bytes(4) + struct.pack(">IH", 1, round(gamma * 256))
    tags = {
        b"desc": description, b"cprt": text, b"wtpt": xyz((0.9642, 1.0, 0.8249)),
        b"rXYZ": xyz(primaries[0]), b"gXYZ": xyz(primaries[1]), b"bXYZ": xyz(primaries[2]),
        b"rTRC": curve, b"gTRC": curve, b"bTRC": curve,
    }  # fmt: skip
    table, body, offset = struct.pack(">I", len(tags)), b"", 128 + 4 + 12 * len(tags)
    for name, content in tags.items():
        content += bytes(-len(content) % 4)
        table += name + struct.pack(">II", offset + len(body), len(content))
        body += content
    size = 128 + len(table) + len(body)
    header = struct.pack(">I4sI4s4s4s", size, bytes(4), 0x02100000, b"mntr", b"RGB ", b"XYZ ") + bytes(12)
    header += b"acsp" + bytes(28) + struct.pack(">iii", 63190, 65536, 54061)
    return header + bytes(128 - len(header)) + table + body


def coded(picture: Image.Image, icc: bytes) -> Image.Image:
    """An sRGB picture in the numbers of another profile."""
    other = ImageCms.ImageCmsProfile(io.BytesIO(icc))
    found = ImageCms.profileToProfile(
        picture, ImageCms.createProfile("sRGB"), other, ImageCms.Intent.RELATIVE_COLORIMETRIC, "RGB"
    )
    assert found is not None
    return found


def encoded(picture: Image.Image, kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, kind, **options)
    return stream.getvalue()


def mean_difference(a: Any, b: Any) -> float:
    return float(np.abs(np.asarray(a, float) - np.asarray(b, float)).mean())


@pytest.fixture(scope="module")
def muted(photos: Any) -> Image.Image:
    """A photo whose colours lie inside every profile here."""
    rgb = np.array(Image.open(photos.hopper).convert("RGB"), float)
    return Image.fromarray((rgb.mean(axis=2, keepdims=True) * 0.4 + rgb * 0.6).round().astype(np.uint8))


@pytest.mark.parametrize("primaries", [DISPLAY_P3, ADOBE_RGB], ids=["P3", "AdobeRGB"])
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP", "JPEG", "AVIF", "JPEG2000"])
def test_the_profile_decides_what_numbers_mean(muted: Image.Image, primaries: Any, kind: str) -> None:
    if kind not in Image.SAVE and not Image.init() and kind not in Image.SAVE:
        pytest.skip(f"this Pillow writes no {kind}")
    icc = profile(primaries)
    options: dict[str, Any] = {"WEBP": {"lossless": True}, "JPEG": {"quality": 97, "subsampling": 0},
                               "AVIF": {"quality": 95, "subsampling": "4:4:4"}}.get(kind, {})  # fmt: skip
    content = encoded(coded(muted, icc), kind, icc_profile=icc, **options)
    if kind == "JPEG2000":  # Pillow writes no profile
        content = with_profile(content, icc)
    bound = 0.5 if kind in ("PNG", "TIFF", "WEBP", "JPEG2000") else 2.0
    rgb = load_photo(content).rgb
    assert mean_difference(rgb, muted) < bound
    assert mean_difference(coded(muted, icc), muted) > 2  # without the profile
    opened = Image.open(io.BytesIO(content))
    if kind != "JPEG2000":
        np.testing.assert_array_equal(load_photo(opened).rgb, rgb)  # a caller's own image has it too
        assert opened.info["icc_profile"] == icc
    square = muted.crop((0, 0, 512, 512))
    crop = load_crop(encoded(coded(square, icc), "PNG", icc_profile=icc), 128, "crop")
    assert mean_difference(crop, square.resize((128, 128), Image.Resampling.BILINEAR)) < 0.5


def with_profile(jp2: bytes, icc: bytes) -> bytes:
    """A JPEG 2000 file whose box of the colour space holds a profile."""
    at = jp2.index(b"colr") - 4
    (length,) = struct.unpack_from(">I", jp2, at)
    box = struct.pack(">I4sBBB", 11 + len(icc), b"colr", 2, 0, 0) + icc
    header = jp2.index(b"jp2h") - 4
    (whole,) = struct.unpack_from(">I", jp2, header)
    whole += len(box) - length
    return jp2[:header] + struct.pack(">I", whole) + jp2[header + 4 : at] + box + jp2[at + length :]


@pytest.mark.parametrize("mode", ["RGBA", "P", "L", "LA"])
def test_of_every_mode(muted: Image.Image, mode: str) -> None:
    icc = profile(DISPLAY_P3)
    numbers = coded(muted, icc).convert(mode)
    plain = numbers.convert("RGB")
    expected = ImageCms.profileToProfile(
        plain, ImageCms.ImageCmsProfile(io.BytesIO(icc)), ImageCms.createProfile("sRGB"),
        ImageCms.Intent.RELATIVE_COLORIMETRIC, "RGB",
    )  # fmt: skip
    assert mean_difference(load_photo(encoded(numbers, "PNG", icc_profile=icc)).rgb, expected) < 0.6


def test_transparency_stays_beside_a_profile(muted: Image.Image) -> None:
    icc, rgba = profile(ADOBE_RGB), muted.convert("RGBA")
    rgba.paste((200, 0, 0, 0), (0, 0, 100, 600))
    rgb = load_photo(encoded(rgba, "PNG", icc_profile=icc)).rgb
    assert (rgb[:, :100] == 255).all() and (rgb[:, 110:] < 255).any()


def test_srgb_changes_no_pixel(photos: Any) -> None:
    """Whichever program wrote the profile."""
    plain = Image.open(photos.hopper).convert("RGB")
    own = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    np.testing.assert_array_equal(load_photo(encoded(plain, "PNG", icc_profile=own)).rgb, np.array(plain))


@pytest.mark.parametrize("broken", [b"", b"\x00" * 200, profile(DISPLAY_P3)[:200], b"not a profile" * 20])
def test_a_broken_profile_is_harmless(muted: Image.Image, broken: bytes) -> None:
    content = encoded(muted, "PNG", icc_profile=broken)
    np.testing.assert_array_equal(load_photo(content).rgb, np.array(muted))
    grey = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()  # of another space than the picture's
    np.testing.assert_array_equal(load_photo(encoded(muted, "PNG", icc_profile=grey)).rgb, np.array(muted))


# -- wide numbers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [10, 12])
def test_as_many_bits_as_the_file_uses(photos: Any, bits: int) -> None:
    rgb = np.array(Image.open(photos.hopper).convert("RGB"))
    wide = rgb.astype(np.uint16) << (bits - 8)
    for kind in (".png", ".tif"):
        done, content = cv2.imencode(kind, wide[..., ::-1])
        assert done
        read = load_photo(content.tobytes())
        np.testing.assert_array_equal(read.rgb, rgb)
        assert read.notes == (f"the photo's 16-bit numbers use at most {bits} bits and were read as such.",)
    grey = load_photo(encoded(Image.fromarray(wide[..., 1]), "PNG"))
    np.testing.assert_array_equal(grey.rgb[..., 0], rgb[..., 1])
    array = load_photo(wide)
    np.testing.assert_array_equal(array.rgb, rgb)
    assert grey.notes and array.notes


def test_sixteen_bits_are_sixteen(photos: Any) -> None:
    rgb = np.array(Image.open(photos.hopper).convert("RGB"))
    read = load_photo(rgb.astype(np.uint16) * 257)
    np.testing.assert_array_equal(read.rgb, rgb)
    assert read.notes == ()
    black = np.zeros((80, 80, 3), np.uint8)
    assert load_photo(encoded(Image.fromarray(black), "PNG")).notes == ()


# -- containers --------------------------------------------------------------------------------------------------------


def test_text_in_a_png_refuses_no_pixel(muted: Image.Image) -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text("workflow", "x" * 2_000_000, zip=True)
    info.add_itxt("prompt", "λ" * 1_500_000, zip=True)
    info.add_text("plain", "y" * 200_000)
    content = encoded(muted, "PNG", pnginfo=info)
    np.testing.assert_array_equal(load_photo(content).rgb, np.array(muted))


def test_a_large_profile_is_honoured(muted: Image.Image) -> None:
    icc = profile(DISPLAY_P3) + bytes(1_300_000)
    icc = struct.pack(">I", len(icc)) + icc[4:]
    content = encoded(coded(muted, icc), "PNG")
    packed = zlib.compress(icc)
    chunk = b"iCCP" + b"P3\0\0" + packed
    at = content.index(b"IDAT") - 4
    content = (
        content[:at] + struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) + content[at:]
    )
    assert mean_difference(load_photo(content).rgb, muted) < 0.5


@pytest.mark.parametrize("missing", [1, 2])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_jpeg_without_its_end_is_read(photos: Any, missing: int, mode: str) -> None:
    content = encoded(Image.open(photos.astronaut).convert(mode), "JPEG", quality=90)
    np.testing.assert_array_equal(load_photo(content[:-missing]).rgb, load_photo(content).rgb)


KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "a restart every row": {"restart_marker_rows": 1},
    "a restart every block": {"restart_marker_blocks": 1},
    "progressive": {"progressive": True},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_jpeg_that_lacks_pixels_is_not(photos: Any, kind: str) -> None:
    """It is cut anywhere, and where a decoder would not notice: before a restart marker, or between two scans."""
    content = encoded(Image.open(photos.astronaut).convert("RGB"), "JPEG", quality=90, **KINDS[kind])
    expected, rng = load_photo(content).rgb, np.random.default_rng(0)
    first = content.index(b"\xff\xda")
    markers = [
        at for at in range(first + 2, len(content) - 4) if content[at] == 0xFF and content[at + 1] not in (0, 0xFF)
    ]
    cuts = [*rng.choice(markers, min(len(markers), 30), replace=False)] if markers else []
    for cut in [*cuts, *rng.integers(first, len(content) - 40, 30), len(content) - 40]:
        try:
            found = load_photo(content[: int(cut)]).rgb
        except PhotoError as error:
            assert "damaged or truncated" in str(error) or "cannot be read" in str(error)
        else:
            np.testing.assert_array_equal(found, expected)
            raise AssertionError(f"cut at {cut} of {len(content)}: read")


@pytest.mark.parametrize("how", ["XMP", "raw profile"])
def test_small_texts_of_a_png_say_how_it_lies(photos: Any, how: str) -> None:
    lying = Image.open(photos.hopper).convert("RGB").transpose(Image.Transpose.ROTATE_90)
    info = PngImagePlugin.PngInfo()
    info.add_text("workflow", "x" * 2_000_000, zip=True)
    if how == "XMP":
        rdf = "http://www.w3.org/1999/02/22-rdf-syntax-ns#"
        said = '<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/>'
        xmp = f'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="{rdf}">{said}</rdf:RDF></x:xmpmeta>'
        info.add_itxt("XML:com.adobe.xmp", xmp)
    else:
        exif = Image.Exif()
        exif[0x0112] = 6
        content = b"Exif\0\0" + exif.tobytes().removeprefix(b"Exif\0\0")
        info.add_text("Raw profile type exif", f"\nexif\n{len(content):8}\n{content.hex()}\n", zip=True)
    assert load_photo(encoded(lying, "PNG", pnginfo=info)).size == (600, 512)


def test_a_png_is_read_to_its_end_and_no_further(muted: Image.Image) -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text("workflow", "x" * 2_000_000, zip=True)
    content = encoded(muted, "PNG", pnginfo=info)
    np.testing.assert_array_equal(load_photo(content + bytes(50_000_000)).rgb, np.array(muted))
    claims = content[:33] + struct.pack(">I4s", 2**32 - 1, b"zTXt") + content[33:]
    with pytest.raises(PhotoError):
        load_photo(claims)


@pytest.mark.parametrize("kind", ["AVIF", "JXL", "HEIF"])
def test_damage_of_modern_formats_is_typed(photos: Any, kind: str) -> None:
    Image.init()
    if kind == "JXL":
        pytest.importorskip("pillow_jxl")
    if kind == "HEIF":
        pytest.importorskip("pillow_heif").register_heif_opener()
    if kind not in Image.SAVE:
        pytest.skip(f"this Pillow writes no {kind}")
    small = Image.open(photos.hopper).convert("RGB").resize((128, 150))
    content, rng = encoded(small, kind), np.random.default_rng(1)
    refused = 0
    for _ in range(60):
        broken = bytearray(content)
        for at in rng.integers(12, len(broken), 3):
            broken[at] ^= int(rng.integers(1, 256))
        try:
            load_photo(bytes(broken))
        except PhotoError:
            refused += 1
    assert refused


def test_transparency_of_another_mode_is_typed() -> None:
    for mode, transparency in (("RGB", b"\0\1"), ("L", b"\0"), ("LA", (1, 2, 3)), ("1", b"\0")):
        picture = Image.new(mode, (80, 80))
        picture.info["transparency"] = transparency
        with contextlib.suppress(PhotoError):
            load_photo(picture)


def test_a_closed_image(photos: Any) -> None:
    with Image.open(photos.hopper) as picture:
        pass
    with pytest.raises(PhotoError, match=r"Pillow cannot read the pixels of this image .* closed") as caught:
        load_photo(picture)
    assert caught.value.code == "corrupt"


@pytest.mark.slow
def test_a_telephone_s_200_megapixels_are_read_reduced() -> None:
    large = Image.new("RGB", (16320, 12240), (120, 90, 60))
    content = encoded(large, "JPEG", quality=60)
    del large
    tracemalloc.start()
    photo = load_photo(content)
    assert photo.size == (12240, 16320) and max(photo.rgb.shape) == WORKING_SIDE_PX
    assert np.abs(photo.rgb.astype(int) - (120, 90, 60)).max() < 3


def test_a_bomb_stays_refused() -> None:
    """A JPEG's header that claims 4 gigapixels."""
    content = bytearray(encoded(Image.new("RGB", (64, 64)), "JPEG"))
    start = content.index(b"\xff\xc0")
    content[start + 5 : start + 9] = struct.pack(">HH", 65500, 65500)
    with pytest.raises(PhotoError, match="megapixels, the limit is 400") as caught:
        load_photo(bytes(content))
    assert caught.value.code == "too_large"


@pytest.mark.parametrize(
    "head, shown, package",
    [
        (b"\x00\x00\x00\x18ftypheic", "HEIC", "pillow-heif"),
        (b"\x00\x00\x00\x18ftypmif1", "HEIC", "pillow-heif"),
        (b"\x00\x00\x00\x0cJXL \r\n\x87\n", "JPEG XL", "pillow-jxl-plugin"),
        (b"\xff\x0a\x7f\x00", "JPEG XL", "pillow-jxl-plugin"),
    ],
)
def test_the_package_that_reads_a_format_is_named(
    head: bytes, shown: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.init()
    for name in ("HEIF", "JXL"):
        monkeypatch.delitem(Image.OPEN, name, raising=False)

    def absent(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(containers.importlib, "import_module", absent)
    with pytest.raises(PhotoError, match=rf"this is {shown}.*{package}.* is not installed. pip install {package}"):
        load_photo(head + bytes(200))


@pytest.mark.parametrize("module", ["pillow_heif", "pillow_jxl"])
def test_an_installed_plugin_is_used_by_itself(muted: Image.Image, tmp_path: Path, module: str) -> None:
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is not installed")
    if module == "pillow_heif":
        import pillow_heif

        heif = pillow_heif.from_pillow(muted)
        path = tmp_path / "photo.heic"
        heif.save(path, quality=-1)
    else:
        import pillow_jxl  # noqa: F401

        path = tmp_path / "photo.jxl"
        muted.save(path, lossless=True)
    assert mean_difference(load_photo(path).rgb, muted) < 2
