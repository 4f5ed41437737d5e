"""One person, painted: back hair, body, head, face, front hair, hat, from far to near.

Labels are those of INKS, from a first label on, so several persons can stand on one canvas.
"""

from __future__ import annotations

import numpy as np

from .canvas import Canvas, disc, smooth
from .features import eyes, face, mouth, nose, spectacles
from .hair import back_hair, front_hair, hat_on, shoulder_hair, skull
from .heads import OUTLINE_STEPS, Heads
from .inks import INK_NUMBER
from .people import Floats, Identity


class Figure:
    """A person on a canvas. `heads` holds this person only (n = 1)."""

    def __init__(self, canvas: Canvas, first_label: int, identity: Identity, heads: Heads, square: Floats) -> None:
        """square: x0, y0, side of the face square, fractions of the picture."""
        self.canvas, self.identity, self.heads = canvas, identity, heads
        self._first, self._corner, self._side = first_label, square[:2], float(square[2])
        self.head_unit = self._side / float(heads.side[0])  # one head unit in fractions of the picture
        self.half_width = float(heads.half_width[0, 0])
        self._chest = self.head(np.array([[[0.0, 0.34, -0.12]]]))[0]  # the neck hangs here, upright

    def ink(self, name: str) -> int:
        """The label of an ink of this person."""
        return self._first + INK_NUMBER[name]

    def head(self, points: Floats) -> Floats:
        """(1, k, 3) head units → (k, 2) of the picture."""
        return np.asarray(self.heads.project(points)[0] * self._side + self._corner)

    def body(self, points: Floats | list[tuple[float, float]]) -> Floats:
        """(k, 2) head units below the chin → (k, 2) of the picture. The body stays upright."""
        return np.asarray(np.asarray(points) * self.head_unit + self._chest)

    def ball(self, centre: tuple[float, float, float], rx: float | Floats, ry: float | Floats, turns: Floats) -> Floats:
        """(k, 2) of the picture: the outline of a ball in head units, see `Heads.ellipse`."""
        return np.asarray(self.heads.ellipse(centre, (rx, ry), turns)[0] * self._side + self._corner)

    def width(self, head_units: float) -> float:
        """A length in fractions of the picture."""
        return head_units * self.head_unit

    def face_outline(self) -> Floats:
        """(108, 2) of the picture: the outline, whose squared bounding box is the face square."""
        return self.head(self.heads.outline(np.arange(OUTLINE_STEPS) / OUTLINE_STEPS))

    def paint(self, hat: bool, light_side: float, gesture: float) -> None:
        """light_side: -1 light from the left, 1 from the right; gesture: [0, 1], how the arms hang."""
        style = self.identity.traits["hair_style"]
        back_hair(self, style, hat)
        self._body(gesture)
        if style == "long":
            shoulder_hair(self)
        skull(self, style)
        face(self, light_side)
        nose(self)
        mouth(self)
        eyes(self)
        front_hair(self, style)
        spectacles(self)
        if hat:
            hat_on(self, style)

    def _body(self, gesture: float) -> None:
        """Legs, arms, neck and shirt, in head units below the chin."""
        fill, stroke, ink, body = self.canvas.fill, self.canvas.stroke, self.ink, self.body
        for side in (-1, 1):
            shade = "trousers" if side < 0 else "trousers shade"
            leg = [(0.02 * side, 2.0), (0.03 * side, 4.05), (0.36 * side, 4.05), (0.50 * side, 2.0)]
            fill(body(leg), ink(shade))
            shoe = disc(0.24 * side, 4.10, 0.23, 0.11)
            fill(body(np.minimum(shoe, (9, 4.16))), ink("shoes"))
        # arms: shoulder, elbow, hand
        bend = gesture * 0.22
        for side in (-1, 1):
            elbow, hand = (side * (0.80 + bend), 1.45), (side * (0.84 - bend * 1.5), 2.28 - bend)
            stroke(body([(side * 0.62, 0.72), elbow, hand]), self.width(0.17), ink("arms"))
            fill(body(disc(hand[0], hand[1] + 0.05, 0.115, 0.13)), ink("arms"))
            sleeve = [(side * 0.58, 0.70), (side * (0.58 + (0.22 + bend) * 0.8), 0.70 + 0.75 * 0.75)]
            stroke(body(sleeve), self.width(0.29), ink("shirt shade"))
        fill(body([(-0.165, -0.2), (-0.175, 0.5), (0.175, 0.5), (0.165, -0.2)]), ink("neck"))
        torso = [
            (-0.16, 0.34), (-0.40, 0.43), (-0.66, 0.56), (-0.72, 0.80), (-0.60, 1.20), (-0.56, 1.75), (-0.58, 2.20),
            (0.0, 2.26), (0.58, 2.20), (0.56, 1.75), (0.60, 1.20), (0.72, 0.80), (0.66, 0.56), (0.40, 0.43),
            (0.16, 0.34),
        ]  # fmt: skip
        fill(smooth(body(torso), 5), ink("shirt"))
        fill(body(disc(0, 0.36, 0.25, 0.17)), ink("shirt line"))
        fill(body(disc(0, 0.33, 0.21, 0.155)), ink("neck"))
        # the chin's shadow
        chin = self.face_outline()[OUTLINE_STEPS * 5 // 18 : OUTLINE_STEPS * 13 // 18] + (0, self.width(0.11))
        fill(chin, ink("neck shade"), over=[ink("neck")])
