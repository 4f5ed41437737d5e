"""Requested and made pictures, side by side on one sheet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw

from realisid_trt.commands.drawing import COLORS
from realisid_trt.loop.picture import to_pil
from realisid_trt.persons.conditions import pose_image
from training.world import Picture

PICTURE_PX, PHOTO_PX, GAP_PX, TITLE_PX = 384, 118, 12, 24
INK, PAPER, NIGHT = (40, 40, 44), (250, 249, 246), (24, 24, 28)


@dataclass(frozen=True, eq=False)
class Line:
    """A line of the sheet.

    caption: of the picture; photos: of the people, from the left.
    truth:   the world's own picture, from which the requested boxes and poses come.
    made:    the engine's picture.
    """

    caption: str
    photos: Sequence[Picture]
    truth: Picture
    made: Image.Image


def sheet(lines: Sequence[Line], pose_style: str) -> Image.Image:
    """A line per picture: the photos, the requested places and poses, the engine's picture, the world's own."""
    height = PICTURE_PX + TITLE_PX + GAP_PX
    page = Image.new("RGB", (PHOTO_PX + 3 * PICTURE_PX + 5 * GAP_PX, len(lines) * height + GAP_PX), PAPER)
    for number, line in enumerate(lines):
        top = GAP_PX + number * height
        for person, photo in enumerate(line.photos):
            framed = Image.fromarray(photo.rgb).resize((PHOTO_PX, PHOTO_PX), Image.Resampling.LANCZOS)
            ImageDraw.Draw(framed).rectangle((0, 0, PHOTO_PX - 1, PHOTO_PX - 1), outline=COLORS[person], width=4)
            page.paste(framed, (GAP_PX, top + person * (PHOTO_PX + GAP_PX)))
        for column, (shown, title) in enumerate(
            (
                (layout(line.truth, pose_style), f"“{line.caption}”"),
                (line.made, "the engine's picture"),
                (Image.fromarray(line.truth.rgb), "as the world itself draws them"),
            )
        ):
            left = 2 * GAP_PX + PHOTO_PX + column * (PICTURE_PX + GAP_PX)
            page.paste(shown.resize((PICTURE_PX, PICTURE_PX), Image.Resampling.BICUBIC), (left, top))
            _write(page, (left, top + PICTURE_PX + 5), title)
    return page


def layout(truth: Picture, pose_style: str) -> Image.Image:
    """The requested places and poses: every pose drawing in its box, as the networks get both."""
    scale = PICTURE_PX / truth.rgb.shape[0]
    page = Image.new("RGB", (PICTURE_PX, PICTURE_PX), NIGHT)
    for person, (box, landmarks) in enumerate(zip(truth.boxes, truth.landmarks, strict=True)):
        x0, y0, x1, y1 = (round(float(value) * scale) for value in box)
        drawing = to_pil(pose_image(landmarks, 256, pose_style).transpose(1, 2, 0))
        page.paste(drawing.resize((x1 - x0, y1 - y0), Image.Resampling.LANCZOS), (x0, y0))
        ImageDraw.Draw(page).rectangle((x0, y0, x1 - 1, y1 - 1), outline=COLORS[person], width=2)
    return page


def _write(page: Image.Image, where: tuple[int, int], words: str) -> None:
    """Writes a title as large as fits under a picture."""
    pen, size = ImageDraw.Draw(page), 14
    while size > 8 and pen.textlength(words, font_size=size) > PICTURE_PX:
        size -= 1
    pen.text(where, words, fill=INK, font_size=size)
