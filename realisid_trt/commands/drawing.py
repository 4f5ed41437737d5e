"""Boxes and landmarks drawn onto pictures, for people to look at."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from ..persons.person import PlacedPerson

COLORS = (
    (255, 90, 60), (70, 160, 255), (90, 210, 90), (255, 200, 40), (200, 110, 255), (60, 220, 220), (255, 130, 190),
    (170, 170, 170),
)  # fmt: skip


def with_boxes(image: Image.Image, boxes: Sequence[Sequence[float]], first: int = 1, color: int = 0) -> Image.Image:
    """A copy of the picture with numbered boxes (x0, y0, x1, y1 px, half-open), each in its own colour.

    first: the number of the first box. color: of it, a place in COLORS.
    """
    image = image.convert("RGB")
    draw = ImageDraw.Draw(image)
    width = max(1, round(max(image.size) / 300))
    for index, (x0, y0, x1, y1) in enumerate(boxes):
        outline = COLORS[(color + index) % len(COLORS)]
        draw.rectangle((x0, y0, x1 - 1, y1 - 1), outline=outline, width=width)
        draw.text(
            (x0 + width + 2, y0 + width), str(first + index), fill=outline, font_size=max(10, max(image.size) / 28)
        )
    return image


def with_persons(image: Image.Image, persons: Sequence[PlacedPerson]) -> Image.Image:
    """A copy of the picture with every person's number at its box; at a dot on its anchor where it has no box.

    The numbers count from 1 over all persons; one with neither is left out.
    """
    for number, person in enumerate(persons, start=1):
        if person.box is not None:
            image = with_boxes(image, [person.box], first=number, color=number - 1)
        elif person.anchor is not None:
            color = COLORS[(number - 1) % len(COLORS)]
            image = with_points(image, np.array([person.anchor]), color)
            x, y, gap = *person.anchor, max(image.size) / 100
            ImageDraw.Draw(image).text((x + gap, y), str(number), fill=color, font_size=max(10, max(image.size) / 28))
    return image


def with_points(
    image: Image.Image, points: NDArray[np.float64], color: tuple[int, int, int] = (90, 255, 120)
) -> Image.Image:
    """A copy of the picture with a dot at every point (N, 2) px; few points have larger dots."""
    image = image.convert("RGB")
    draw = ImageDraw.Draw(image)
    radius = max(image.size) / (600 if len(points) > 68 else 150)
    for x, y in points:
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=color)
    return image


def side_by_side(images: Sequence[Image.Image], height: int) -> Image.Image:
    """Pictures in a row, all of one height, a gap between them."""
    gap = max(2, height // 64)
    scaled = [
        image.resize((max(1, round(image.width * height / image.height)), height), Image.Resampling.LANCZOS)
        for image in images
    ]
    sheet = Image.new("RGB", (sum(image.width for image in scaled) + gap * (len(scaled) - 1), height), (32, 32, 32))
    x = 0
    for image in scaled:
        sheet.paste(image, (x, 0))
        x += image.width + gap
    return sheet
