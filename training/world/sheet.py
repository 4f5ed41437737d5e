"""A sheet of the world, to look at: people, their poses and references, their scenes and captions."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from .crops import id_crop
from .people import Pose
from .sampling import REGULAR, SMALL, World
from .scenes import Picture, Scene, draw

Image8 = NDArray[np.uint8]
COLUMNS, GAP_PX, TITLE_PX, CAPTION_PX = 8, 6, 30, 30
PAPER, INK, PALE = (250, 249, 246), (40, 42, 48), (105, 108, 116)
EXPRESSIONS = (
    ("neutral", Pose()), ("laughing", Pose(mouth=0.9, smile=1.0, brows=0.5)),
    ("turned left", Pose(yaw=-0.55, smile=0.5)), ("turned right", Pose(yaw=0.55, mouth=0.4)),
    ("looking up", Pose(pitch=0.3, gaze_y=-0.6, brows=0.6)), ("looking down", Pose(pitch=-0.3, gaze_y=0.8)),
    ("eyes shut, tilted", Pose(roll=0.28, lids=-1.0, smile=0.8)), ("angry", Pose(brows=-1.0, smile=-1.0, roll=-0.15)),
)  # fmt: skip


def make_sheet(world: World, size_px: int = 256) -> tuple[Image8, int]:
    """The sheet, (H, W, 3) uint8, and the number of pictures drawn for it. size_px: side of a picture on it."""
    rows: list[tuple[str, list[Image8], list[str]]] = []
    numbers = range(COLUMNS)

    def draw_row(title: str, scenes: list[Scene], boxes: bool = False) -> list[Picture]:
        pictures = [draw(scene, size_px) for scene in scenes]
        shown = [_with_boxes(picture) if boxes else picture.rgb for picture in pictures]
        rows.append((title, shown, [scene.caption for scene in scenes]))
        return pictures

    people = [world.identity(number) for number in numbers]
    portraits = draw_row("eight people: a reference of each", [world.reference(person) for person in people])
    draw_row("the same people: another pose, light and place", [world.reference(person, 1) for person in people])
    crops = [id_crop(picture, 0, size_px) for picture in portraits]
    rows.append(("the references, cropped for the ID encoder", crops, []))
    draw_row("siblings of the first: same skin and hair, other features",
             [world.reference(world.sibling(people[0], number)) for number in numbers])  # fmt: skip
    posed = [
        world.scene(1, face=(0.45, 0.45), caption="a person in a blue shirt in a studio", identities=[people[1]],
                    poses=[pose])
        for _, pose in EXPRESSIONS
    ]  # fmt: skip
    pictures = [draw(scene, size_px) for scene in posed]
    names = [name for name, _ in EXPRESSIONS]
    rows.append(("one person, eight poses and expressions", [picture.rgb for picture in pictures], names))
    drawings = [picture.pose_image(0, size_px).transpose(1, 2, 0) for picture in pictures]
    rows.append(
        ("their landmark images, drawn by the runtime", [np.round(d * 255).astype(np.uint8) for d in drawings], [])
    )
    draw_row(
        "one person, face 1/4 to 1/2 of the picture", [world.scene(n, persons=1, face=REGULAR) for n in numbers], True
    )
    draw_row("one person, face 1/7 to 1/6", [world.scene(10 + n, persons=1, face=SMALL) for n in numbers], True)
    draw_row("two people", [world.scene(20 + n, persons=2) for n in numbers])
    draw_row("three people", [world.scene(30 + n, persons=3) for n in numbers])
    draw_row("overlapping", [world.scene(40 + n, persons=2 + n % 2, layout="overlap") for n in numbers], True)
    drawn = sum(len(images) for title, images, _ in rows if "ID encoder" not in title and "landmark" not in title)
    return _laid_out(rows, size_px), drawn


def _with_boxes(picture: Picture) -> Image8:
    image = Image.fromarray(picture.rgb)
    pen = ImageDraw.Draw(image)
    for x0, y0, x1, y1 in picture.boxes:
        pen.rectangle((round(x0), round(y0), round(x1) - 1, round(y1) - 1), outline=(255, 255, 255))
    return np.asarray(image, np.uint8)


def _laid_out(rows: list[tuple[str, list[Image8], list[str]]], size_px: int) -> Image8:
    heights = [TITLE_PX + size_px + (CAPTION_PX if captions else GAP_PX) + GAP_PX for _, _, captions in rows]
    width = GAP_PX + COLUMNS * (size_px + GAP_PX)
    sheet = Image.new("RGB", (width, sum(heights) + GAP_PX), PAPER)
    pen, y = ImageDraw.Draw(sheet), GAP_PX
    title_font, caption_font = ImageFont.load_default(16), ImageFont.load_default(11)
    for (title, images, captions), height in zip(rows, heights, strict=True):
        pen.text((GAP_PX, y + 6), title, INK, title_font)
        for column, image in enumerate(images):
            x = GAP_PX + column * (size_px + GAP_PX)
            sheet.paste(Image.fromarray(image), (x, y + TITLE_PX))
            if captions:
                text = _wrapped(captions[column], caption_font, size_px)
                pen.multiline_text((x, y + TITLE_PX + size_px + 1), text, PALE, caption_font, spacing=1)
        y += height
    return np.asarray(sheet, np.uint8)


def _wrapped(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width_px: int) -> str:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width_px:
            lines[-1] = longer
        else:
            lines.append(word)
    return "\n".join(lines[:2]) + (" …" if len(lines) > 2 else "")
