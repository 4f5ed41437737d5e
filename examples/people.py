"""Drawn people for the demo: who, where, in which pose; and a sheet that shows what was asked for beside what came."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw

from realisid_trt import Engine, Person
from realisid_trt.conditions import pose_image
from realisid_trt.drawing import COLORS
from realisid_trt.picture import to_pil
from training.world import Picture, Scene, World, draw, id_crop

PHOTO_PX = 256  # side of the photos that the engine is given
BIG, SMALL, GAP = 384, 118, 12  # px of the sheet: pictures, photos, and what lies between
INK, PAPER = (40, 40, 44), (250, 249, 246)


@dataclass(frozen=True, eq=False)
class Asked:
    """One picture to make: its scene (whom the world itself would draw there), and a photo of everybody in it."""

    scene: Scene
    photos: tuple[Picture, ...]
    seed: int

    def truth(self, size_px: int) -> Picture:
        return draw(self.scene, size_px)

    def persons(self, engine: Engine, size_px: int) -> list[Person]:
        """As a user gives them: a photo of drawn people needs its box, its landmarks and its crop, see `embed`."""
        truth, found = self.truth(size_px), []
        for photo, box, landmarks in zip(self.photos, truth.boxes, truth.landmarks, strict=True):
            crop = id_crop(photo, 0, engine.model.image_size, engine.config.face_margin)
            identity = engine.embed(photo.rgb, box=photo.boxes[0], landmarks=photo.landmarks[0], crop=crop)
            found.append(Person(identity, box=tuple(box), landmarks=landmarks))
        return found


def ask(world: World, number: int, caption: str, face: tuple[float, float]) -> Asked:
    """Scene `number` of people that no training saw."""
    scene = world.scene(number, "unseen", caption=caption, face=face)
    photos = tuple(draw(world.reference(actor.identity, number), PHOTO_PX) for actor in scene.actors)
    return Asked(scene, photos, number)


def sheet(asked: Sequence[Asked], made: Sequence[Image.Image], style: str) -> Image.Image:
    """A row per picture: the photos, what was asked for (boxes, poses, caption), the picture, the world's own."""
    width = SMALL + 3 * BIG + 5 * GAP
    height = len(made) * (BIG + 34) + GAP
    page = Image.new("RGB", (width, height), PAPER)
    for row, (one, picture) in enumerate(zip(asked, made, strict=True)):
        top = GAP + row * (BIG + 34)
        truth = one.truth(BIG)
        for person, photo in enumerate(one.photos):
            framed = Image.fromarray(photo.rgb).resize((SMALL, SMALL), Image.Resampling.LANCZOS)
            ImageDraw.Draw(framed).rectangle((0, 0, SMALL - 1, SMALL - 1), outline=COLORS[person], width=4)
            page.paste(framed, (GAP, top + person * (SMALL + GAP)))
        columns = (
            layout(truth, style),
            picture.resize((BIG, BIG), Image.Resampling.BICUBIC),
            Image.fromarray(truth.rgb),
        )
        titles = (f"“{one.scene.caption}”", "the engine's picture", "as the world itself draws it")
        for column, (shown, title) in enumerate(zip(columns, titles, strict=True)):
            left = 2 * GAP + SMALL + column * (BIG + GAP)
            page.paste(shown, (left, top))
            ImageDraw.Draw(page).text((left, top + BIG + 5), title, fill=INK, font_size=11 if column == 0 else 14)
    return page


def layout(truth: Picture, style: str) -> Image.Image:
    """Where everybody shall be and how: every pose drawing in its box, as the networks see both."""
    page = Image.new("RGB", truth.rgb.shape[1::-1], (24, 24, 28))
    for person, (box, landmarks) in enumerate(zip(truth.boxes, truth.landmarks, strict=True)):
        x0, y0, x1, y1 = (round(float(value)) for value in box)
        drawing = to_pil(pose_image(landmarks, 256, style).transpose(1, 2, 0))
        page.paste(drawing.resize((x1 - x0, y1 - y0), Image.Resampling.LANCZOS), (x0, y0))
        ImageDraw.Draw(page).rectangle((x0, y0, x1 - 1, y1 - 1), outline=COLORS[person], width=2)
    return page
