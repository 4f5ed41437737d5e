"""Scenes of people, and their pictures. `draw` is the path of the data.

scene ─► backdrop, then persons from far to near ─► labels, 4 × 4 per pixel ─► colours ─► picture, parts, landmarks
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from realisid_trt.checks import is_whole
from realisid_trt.errors import BoxError, RequestError, ShapeError
from realisid_trt.persons.conditions import pose_image

from .backdrops import MOST_LABELS, NUM_VARIATIONS, paint_backdrop
from .canvas import Canvas
from .figures import Figure
from .heads import Heads
from .inks import HEAD_PARTS, INKS, PARTS, colors
from .people import Floats, Identity, Pose
from .words import HATS, MOST_PERSONS, SHIRTS, Description

SUPERSAMPLING = 4  # samples per pixel and axis
LEAST_SIZE_PX, MOST_SIZE_PX = 16, 2048
_PART_OF_LABEL = np.zeros(256, np.uint8)
_OWNER_OF_LABEL = np.zeros(256, np.uint8)
for _person in range(MOST_PERSONS):
    for _number, _part in enumerate(INKS.values()):
        _label = MOST_LABELS + 1 + _person * len(INKS) + _number
        _PART_OF_LABEL[_label], _OWNER_OF_LABEL[_label] = PARTS.index(_part), _person + 1


@dataclass(frozen=True)
class Actor:
    """A person in a scene.

    square:   x0, y0 and side of the face square, in cells of the scene's grid.
    shirt, hat: names of words.SHIRTS and words.HATS; None for no hat.
    trousers: [0, 1], from dark to light.
    gesture:  [0, 1], how the arms hang.
    """

    identity: Identity
    pose: Pose
    square: tuple[int, int, int]
    shirt: str
    hat: str | None
    trousers: float
    gesture: float

    def landmarks(self) -> Floats:
        """(478, 2) in [0, 1] of the face square."""
        return np.asarray(Heads(self.identity.factors[None], self.pose.values[None]).landmarks()[0])


@dataclass(frozen=True)
class Light:
    """The light of a scene: a colour that multiplies all others, and the side it comes from.

    warmth: -1 blue … 1 orange; brightness: about 1; side: -1 left … 1 right.
    """

    warmth: float = 0.0
    brightness: float = 1.0
    side: float = -1.0

    def on(self, rgb: Floats) -> Floats:
        """Colours (…, 3) in 0..1 as seen in this light."""
        return np.asarray(np.clip(rgb * (1 + 0.10 * self.warmth * np.array([1.0, 0.0, -1.2])) * self.brightness, 0, 1))


@dataclass(frozen=True)
class Scene:
    """Everything a picture shows; `draw` makes the picture.

    grid:    cells across the picture; face squares lie on them exactly.
    actors:  1 to 3, from left to right.
    place:   a key of words.PLACES; variations: 12 numbers in [0, 1], which park or beach it is.

    Raises BoxError for a square that leaves the picture, RequestError for other words or numbers than these.
    """

    grid: int
    actors: tuple[Actor, ...]
    place: str
    variations: tuple[float, ...]
    light: Light

    def __post_init__(self) -> None:
        _ = self.description
        for actor in self.actors:
            x, y, side = actor.square
            if side < 1 or min(x, y) < 0 or max(x, y) + side > self.grid:
                raise BoxError(
                    f"square {actor.square} (x0, y0, side) leaves the grid of {self.grid} × {self.grid} cells."
                )
        if len(self.variations) != NUM_VARIATIONS:
            raise RequestError(f"variations are {len(self.variations)} numbers, expected {NUM_VARIATIONS}.")

    @property
    def description(self) -> Description:
        return Description(tuple(a.shirt for a in self.actors), tuple(a.hat for a in self.actors), self.place)

    @property
    def caption(self) -> str:
        return self.description.caption

    def boxes(self, size_px: int) -> Floats:
        """(n, 4) x0, y0, x1, y1 of the face squares in px of a picture of that size; whole if the grid divides it."""
        x, y, side = np.array([actor.square for actor in self.actors], np.float64).T * (size_px / self.grid)
        return np.stack([x, y, x + side, y + side], -1)


@dataclass(frozen=True, eq=False)
class Picture:
    """A drawn scene of n persons.

    rgb:       (S, S, 3) uint8.
    parts:     (S, S) uint8, what each pixel's centre shows: index into PARTS, 0 the background.
    owners:    (S, S) uint8, its owner: 0 for none, k + 1 for actor k.
    boxes:     (n, 4) float64, the face squares: x0, y0, x1, y1 in px, half-open.
    landmarks: (n, 478, 2) float64 in [0, 1] of the face squares, as `pose_image` takes them.
    colors:    (n, inks, 3) uint8, the exact colour of every ink (in the order of inks.INKS) of every person.
    """

    rgb: NDArray[np.uint8]
    parts: NDArray[np.uint8]
    owners: NDArray[np.uint8]
    boxes: Floats
    landmarks: Floats
    colors: NDArray[np.uint8]

    def shows(self, part: str, person: int | None = None) -> NDArray[np.bool_]:
        """(S, S), where this part is seen, of everybody or of one actor. Raises RequestError for an unknown part."""
        if part not in PARTS:
            raise RequestError(f"part is {part!r}, expected one of {', '.join(PARTS)}.")
        mask = self.parts == PARTS.index(part)
        return np.asarray(mask if person is None else mask & (self.owners == person + 1))

    def color(self, part: str, person: int) -> NDArray[np.uint8]:
        """(3,) the main colour of a part of an actor, such as the neck or the shirt."""
        return np.asarray(self.colors[person, list(INKS.values()).index(part)])

    def head(self, person: int) -> NDArray[np.bool_]:
        """(S, S), where an actor's head is seen, hair and hat included: the part that face parsing would keep."""
        inside = np.isin(self.parts, [PARTS.index(part) for part in HEAD_PARTS])
        return np.asarray(inside & (self.owners == person + 1))

    def pose_image(self, person: int, size_px: int, style: str = "realisid-v1") -> NDArray[np.float32]:
        """(3, size_px, size_px) in [0, 1]: the runtime's own drawing of an actor's landmarks."""
        return pose_image(self.landmarks[person], size_px, style)


def draw(scene: Scene, size_px: int = 256) -> Picture:
    """The picture of a scene: the same scene, the same bytes, independent of other drawings.

    size_px: side of the picture. Raises ShapeError outside 16 … 2048.
    """
    _check_size(size_px)
    canvas = Canvas(size_px * SUPERSAMPLING)
    palette = np.zeros((256, 3))
    backdrop = paint_backdrop(canvas, scene.place, np.array(scene.variations))
    palette[: len(backdrop)] = backdrop
    landmarks = []
    # a person lower in the picture stands nearer, so no shoulder covers a lower face
    for person in sorted(range(len(scene.actors)), key=lambda k: (sum(scene.actors[k].square[1:]), k)):
        actor, first = scene.actors[person], MOST_LABELS + 1 + person * len(INKS)
        heads = Heads(actor.identity.factors[None], actor.pose.values[None])
        square = np.array(actor.square) / scene.grid
        Figure(canvas, first, actor.identity, heads, square).paint(
            actor.hat is not None, scene.light.side, actor.gesture
        )
        hat = None if actor.hat is None else np.array(HATS[actor.hat])
        trousers = np.array([0.16, 0.19, 0.28]) * (0.7 + 1.2 * actor.trousers)
        palette[first : first + len(INKS)] = colors(actor.identity, np.array(SHIRTS[actor.shirt]), hat, trousers)
        landmarks.append((person, heads.landmarks()[0]))
    table = np.round(scene.light.on(palette) * 255).astype(np.uint8)
    fine = cv2.applyColorMap(canvas.labels, table[:, None])
    rgb = cv2.resize(fine, (size_px, size_px), interpolation=cv2.INTER_AREA)
    seen = canvas.labels[SUPERSAMPLING // 2 :: SUPERSAMPLING, SUPERSAMPLING // 2 :: SUPERSAMPLING]
    inks = table[MOST_LABELS + 1 : MOST_LABELS + 1 + len(scene.actors) * len(INKS)]
    return Picture(
        rgb=np.asarray(rgb, np.uint8),
        parts=_PART_OF_LABEL[seen],
        owners=_OWNER_OF_LABEL[seen],
        boxes=scene.boxes(size_px),
        landmarks=np.stack([points for _, points in sorted(landmarks, key=lambda pair: pair[0])]),
        colors=inks.reshape(len(scene.actors), len(INKS), 3),
    )


def face_masks(scene: Scene, size_px: int = 256) -> NDArray[np.uint8]:
    """(n, S, S) uint8, how much of each pixel every actor's whole face covers, 0 to 255, hair and neighbours ignored.

    The face square is the squared bounding box of this.
    """
    _check_size(size_px)
    masks = []
    for actor in scene.actors:
        canvas = Canvas(size_px * SUPERSAMPLING)
        heads = Heads(actor.identity.factors[None], actor.pose.values[None])
        canvas.fill(Figure(canvas, 0, actor.identity, heads, np.array(actor.square) / scene.grid).face_outline(), 255)
        masks.append(cv2.resize(canvas.labels, (size_px, size_px), interpolation=cv2.INTER_AREA))
    return np.asarray(masks, np.uint8)


def _check_size(size_px: int) -> None:
    if not is_whole(size_px) or not LEAST_SIZE_PX <= size_px <= MOST_SIZE_PX:
        raise ShapeError(f"size_px is {size_px!r}, expected a whole number from {LEAST_SIZE_PX} to {MOST_SIZE_PX}.")
