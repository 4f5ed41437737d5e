"""The bytes of a photo → a Pillow image whose pixels are not decoded yet. Accepts files that other viewers show.

Footgun: Pillow's limits (`Image.MAX_IMAGE_PIXELS`, `PngImagePlugin.MAX_TEXT_CHUNK`, `LOAD_TRUNCATED_IMAGES`) belong to
the whole process, which is the caller's. They stay unchanged; this file removes the harmless parts they would refuse.
"""

from __future__ import annotations

import importlib
import io
import os
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from PIL import Image, JpegImagePlugin, UnidentifiedImageError

from ..errors import PhotoError

# A subset of Pillow's: it passes EPS to Ghostscript, and finds pictures in containers whose headers state no size.
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "TIFF", "BMP", "GIF", "AVIF", "JPEG2000", "PPM", "TGA", "HEIF", "JXL")

# Exceptions of Pillow's decoders on damaged files (found by flipping bytes of all common formats).
DECODER_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    EOFError,
    OverflowError,
    AssertionError,
    RuntimeError,  # AVIF's and JPEG XL's
    struct.error,
    zlib.error,
)
READABLE = "JPEG, PNG, WebP, TIFF, BMP and GIF are; save it as one of them (8 bits per channel)."

PNG, JPEG, JPEG_END = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"\xff\xd9"
PNG_TEXT = (b"tEXt", b"zTXt", b"iTXt")
MAX_TEXT_BYTES = 2**18  # of an unpacked text: Pillow refuses a file with a larger one
MAX_CHUNKS = 100_000  # read at most; a picture of 100 megapixels in small pieces has some thousands
MAX_PROFILE_BYTES = 2**24  # of a colour profile; printers' have some MB


@dataclass(frozen=True)
class Plugin:
    """A package that teaches Pillow a format. register: its function that does so; None: its import does."""

    format: str
    module: str
    register: str | None
    package: str


PLUGINS = (
    Plugin("HEIF", "pillow_heif", "register_heif_opener", "pillow-heif"),
    Plugin("AVIF", "pillow_avif", None, "pillow-avif-plugin"),
    Plugin("JXL", "pillow_jxl", None, "pillow-jxl-plugin"),
)


def can_read(format: str) -> bool:
    """Whether photos of a plugin's format are read here."""
    return not _register(format)


def suffixes() -> frozenset[str]:
    """The endings of photos' names, in lower case: for every format that is read here, or would be with its plugin."""
    Image.init()
    known = {suffix for suffix, format in Image.registered_extensions().items() if format in FORMATS}
    return frozenset(known | {".heic", ".heif", ".avif", ".jxl"})


def open_bytes(file: IO[bytes], name: str) -> Image.Image:
    """The picture with its header read. file: seekable; it must stay open. name: for error messages.

    Raises PhotoError(unreadable) and Pillow's DecompressionBombError.
    """
    head = file.read(32)
    file.seek(0)
    format = _plugin_format(head)
    problem = "" if format is None else _register(format)
    profile = None
    if head.startswith(PNG):
        file, profile = _without_large_chunks(file)
    Image.init()
    try:  # some formats come with newer Pillows, or with a package that adds them
        try:
            picture = Image.open(file, formats=[name for name in FORMATS if name in Image.OPEN])
        except (Image.DecompressionBombError, Image.DecompressionBombWarning):
            if not head.startswith(JPEG):
                raise
            file.seek(0)
            picture = JpegImagePlugin.JpegImageFile(file)  # which can be decoded at an eighth of its size
    except UnidentifiedImageError as error:
        advice = problem or f"not a picture that can be read. {READABLE}"
        raise PhotoError("unreadable", f"{name}: {advice}") from error
    except DECODER_ERRORS as error:
        raise PhotoError(
            "unreadable",
            f"{name}: the header of this picture cannot be read ({error}). Copy or export it again from the original.",
        ) from error
    if picture.format == "JPEG2000":
        profile = _jp2_profile(file)
    if profile is not None:
        picture.info["icc_profile"] = profile
    return picture


def open_path(path: str | os.PathLike[str], name: str) -> io.BufferedReader:
    """The file of a photo. Raises PhotoError (not_found, unreadable)."""
    try:
        return open(path, "rb")
    except (FileNotFoundError, NotADirectoryError) as error:
        looked = "" if os.path.isabs(path) else f"; it was looked up in {Path.cwd()}"
        raise PhotoError("not_found", f"{name}: no such file. Check the path{looked}.") from error
    except IsADirectoryError as error:
        raise PhotoError("unreadable", f"{name}: this is a folder. Give the path of one photo.") from error
    except PermissionError as error:
        raise PhotoError("unreadable", f"{name}: no permission to read this file. Change its permissions.") from error
    except (OSError, ValueError) as error:  # a name of 5000 characters, or with a zero byte in it
        reason = getattr(error, "strerror", None) or error
        short = name if len(name) <= 200 else f"{name[:200]}…"
        raise PhotoError("unreadable", f"{short}: this file cannot be opened ({reason}). Check the path.") from error


def endings(content: bytes) -> tuple[bytes, ...]:
    """Two completions of a JPEG that lacks its last bytes: ended at once, and after a row of ones. Empty for other
    files.

    If both decode to the same pixels, no pixel was lost. This does not hold for progressive files, which may lack whole
    scans, nor for files with restart markers, after which a decoder starts again.
    """
    if not content.startswith(JPEG) or content.endswith(JPEG_END) or not _is_one_plain_scan(content):
        return ()
    content = content.removesuffix(JPEG_END[:1])
    return content + JPEG_END, content + 64 * b"\xff\x00" + JPEG_END


def _is_one_plain_scan(jpeg: bytes) -> bool:
    """Whether a JPEG is sequential, of one scan and without restart markers, by its segments up to that scan."""
    at, components = 2, 0
    while at + 4 <= len(jpeg) and jpeg[at] == 0xFF:
        kind, length = jpeg[at + 1], int.from_bytes(jpeg[at + 2 : at + 4])
        segment = jpeg[at + 4 : at + 2 + length]
        if kind in (0xC0, 0xC1):
            components = segment[5] if len(segment) > 5 else 0
        elif 0xC2 <= kind <= 0xCF and kind not in (0xC4, 0xC8, 0xCC):
            return False  # progressive, lossless or arithmetic
        elif kind == 0xDD and any(segment):
            return False  # restart markers
        elif kind == 0xDA:
            return bool(segment) and components == segment[0]
        at += 2 + length
    return False


def _plugin_format(head: bytes) -> str | None:
    """The format of a file that Pillow may need a plugin for."""
    if head.startswith((b"\xff\x0a", b"\x00\x00\x00\x0cJXL \r\n\x87\n")):
        return "JXL"
    if head[4:8] != b"ftyp":
        return None
    brands = head[8:12]
    if brands in (b"avif", b"avis"):
        return "AVIF"
    return "HEIF" if brands in (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1") else None


def _register(format: str) -> str:
    """Registers the format with Pillow, through its plugin if installed. Returns "" or the reason why it failed."""
    Image.init()
    if format in Image.OPEN:
        return ""
    [plugin] = (plugin for plugin in PLUGINS if plugin.format == format)
    shown = {"HEIF": "HEIC (HEIF)", "JXL": "JPEG XL"}.get(format, format)
    try:
        module = importlib.import_module(plugin.module)
        if plugin.register is not None:
            getattr(module, plugin.register)()
    except (ImportError, AttributeError, OSError) as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == plugin.module
        reason = "is not installed" if missing else f"cannot be imported ({error})"
        return (
            f"this is {shown}, and {plugin.package}, which reads it, {reason}. pip install {plugin.package}, or save "
            "the photo as JPEG."
        )
    return "" if format in Image.OPEN else f"{plugin.package} does not read {shown} here. Save the photo as JPEG."


def _without_large_chunks(file: IO[bytes]) -> tuple[IO[bytes], bytes | None]:
    """A PNG without its large texts, which are not needed, and its colour profile if that is compressed.

    Small texts stay: XMP and "Raw profile type exif" may state the picture's orientation.
    """
    end = file.seek(0, io.SEEK_END)
    chunks: list[tuple[int, int]] = []  # offset and bytes of the kept chunks
    profile, dropped, offset = None, False, len(PNG)
    while offset + 12 <= end and len(chunks) < MAX_CHUNKS:
        file.seek(offset)
        length, kind = struct.unpack(">I4s", file.read(8))
        whole = min(length + 12, end - offset)
        if kind == b"iCCP":
            profile = _unpacked_profile(file.read(whole - 12))
            dropped = True
        elif kind in PNG_TEXT and _is_large(kind, length, file):
            dropped = True
        else:
            chunks.append((offset, whole))
        offset += whole
        if kind == b"IEND":
            break
    file.seek(0)
    if not dropped or len(chunks) == MAX_CHUNKS:
        return file, None
    kept = io.BytesIO()
    kept.write(PNG)
    for offset, length in chunks:
        file.seek(offset)
        kept.write(file.read(length))
    kept.seek(0)
    return kept, profile


def _is_large(kind: bytes, length: int, file: IO[bytes]) -> bool:
    """Whether Pillow might refuse a text for its unpacked size. file: at its content."""
    if kind == b"tEXt" or length > MAX_TEXT_BYTES:
        return length > MAX_TEXT_BYTES
    content = file.read(length)
    packed = content.partition(b"\0")[2][1:]
    if kind == b"iTXt":
        compressed, *_ = content.partition(b"\0")[2][:1] or b"\0"
        if not compressed:
            return False
        packed = content.partition(b"\0")[2][2:].partition(b"\0")[2].partition(b"\0")[2]
    try:
        unpacker = zlib.decompressobj()
        unpacker.decompress(packed, MAX_TEXT_BYTES)
        return bool(unpacker.unconsumed_tail)
    except zlib.error:
        return False


def _jp2_profile(file: IO[bytes]) -> bytes | None:
    """The ICC profile of a JPEG 2000 file, which Pillow does not read: the box `colr` in `jp2h`, method 2 or 3.
    ISO 15444-1, Annex I."""
    at = file.tell()
    try:
        file.seek(0)
        header = _box(file.read(MAX_PROFILE_BYTES), b"jp2h")
        colour = None if header is None else _box(header, b"colr")
        return colour[3:] if colour and colour[0] in (2, 3) else None
    finally:
        file.seek(at)


def _box(content: bytes, wanted: bytes) -> bytes | None:
    """The content of the first box of a kind: 4 bytes of length, 4 of its kind, then 8 of length if the first are 1."""
    at = 0
    while at + 8 <= len(content):
        length, kind = struct.unpack_from(">I4s", content, at)
        head = 8
        if length == 1 and at + 16 <= len(content):
            length, head = struct.unpack_from(">Q", content, at + 8)[0], 16
        end = at + length if length else len(content)
        if kind == wanted:
            return content[at + head : end]
        if end < at + head:
            return None
        at = end
    return None


def _unpacked_profile(chunk: bytes) -> bytes | None:
    """The profile of an iCCP chunk: name, a zero, the method 0, zlib. None for a broken or a huge one."""
    _, _, packed = chunk.partition(b"\0")
    try:
        unpacker = zlib.decompressobj()
        profile = unpacker.decompress(packed[1:], MAX_PROFILE_BYTES)
    except zlib.error:
        return None
    return profile if unpacker.eof else None
