"""The face of a figure: skin, beard, nose, mouth, eyes, brows, glasses."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .canvas import disc
from .heads import BROW_STEPS, EYE_STEPS, LEFT, LIP_STEPS, OUTLINE_STEPS, RIGHT
from .inks import FACE_INKS

if TYPE_CHECKING:
    from .figures import Figure

EYE_TURNS, LIP_TURNS = np.arange(EYE_STEPS) / EYE_STEPS, np.arange(LIP_STEPS) / LIP_STEPS


def face(figure: Figure, light_side: float) -> None:
    """Skin with its shade, cheeks and freckles, and the beard. light_side: -1 light from the left, 1 from the right."""
    fill, ink, heads = figure.canvas.fill, figure.ink, figure.heads
    outline = figure.face_outline()
    # a crescent of shade on the side away from the light
    fill(outline, ink("face shade"))
    fill(outline + (np.sign(light_side) * figure.width(0.115), -figure.width(0.04)), ink("face"), [ink("face shade")])
    skin_inks = [ink("face"), ink("face shade")]
    for side in (-1, 1):
        angle = 2 * np.pi * np.arange(24) / 24
        fill(figure.head(heads.on_face(0.60 * side + 0.20 * np.cos(angle), 0.13 + 0.06 * np.sin(angle))),
             ink("cheeks"), over=skin_inks)  # fmt: skip
    skin_inks.append(ink("cheeks"))
    if figure.identity["freckles"] > 0.65:
        for x, y in ((0.42, 0.05), (0.55, 0.10), (0.36, 0.12), (0.66, 0.05), (0.5, 0.16)):
            for side in (-1, 1):
                spot = figure.head(heads.on_face(side * x, y))[0]
                fill(disc(spot[0], spot[1], figure.width(0.013), steps=8), ink("freckles"), over=skin_inks)
    if figure.identity["mole"] > 0.6:
        place = (figure.identity["mole"] - 0.6) / 0.4
        spot = figure.head(heads.on_face(-0.55 if place < 0.5 else 0.55, 0.18 + 0.2 * (place % 0.5)))[0]
        fill(disc(spot[0], spot[1], figure.width(0.020), steps=10), ink("freckles"), over=skin_inks)
    _beard(figure)


def _beard(figure: Figure) -> None:
    kind = figure.identity.traits["beard"]
    if kind == "none":
        return
    heads = figure.heads
    skin_inks = [figure.ink(name) for name in FACE_INKS]
    lips = figure.head(heads.lips(LIP_TURNS, outer=True))
    upper = lips[LIP_STEPS // 2 :]
    lift = np.sin(np.linspace(0, np.pi, len(upper)))[:, None] ** 0.5 * (0, -figure.width(0.055))
    shapes = [np.concatenate([upper + (0, figure.width(0.02)), (upper + lift)[::-1]])]  # the moustache
    outline = figure.face_outline()
    if kind == "goatee":
        chin = outline[OUTLINE_STEPS * 16 // 36 : OUTLINE_STEPS * 20 // 36 + 1]
        under_lip = lips[8 : LIP_STEPS // 2 - 7] + (0, figure.width(0.02))
        shapes.append(np.concatenate([chin, under_lip]))
    elif kind == "full":
        jaw = outline[OUTLINE_STEPS * 10 // 36 : OUTLINE_STEPS * 26 // 36 + 1]
        x = np.linspace(-0.86, 0.86, 40)
        y = 0.20 - 0.02 * np.cos(x * 9) - 0.20 * np.clip(np.abs(x) - 0.55, 0, 1) / 0.31
        shapes.append(np.concatenate([jaw, figure.head(heads.on_face(x, y))]))
    for shape in shapes:
        figure.canvas.fill(shape, figure.ink("beard"), over=skin_inks)


def nose(figure: Figure) -> None:
    """Ridge, bulb, and the line under it."""
    stroke, ink, heads = figure.canvas.stroke, figure.ink, figure.heads
    ridge = figure.head(heads.nose_ridge(np.linspace(0.35, 0.8, 5)))
    stroke(ridge, figure.width(0.022), ink("nose"))
    figure.canvas.fill(figure.head(heads.nose(np.arange(30) / 30)), ink("nose"))
    stroke(figure.head(heads.nose_base(np.linspace(-0.75, 0.75, 9))), figure.width(0.016), ink("nose line"))


def mouth(figure: Figure) -> None:
    """Lips, and the teeth and tongue of an open mouth."""
    fill, stroke, ink, heads = figure.canvas.fill, figure.canvas.stroke, figure.ink, figure.heads
    fill(figure.head(heads.lips(LIP_TURNS, outer=True)), ink("lips"))
    inside = figure.head(heads.lips(LIP_TURNS, outer=False))
    stroke(inside, figure.width(0.012), ink("mouth"), closed=True)
    opening = float(heads.does["mouth"][0, 0])
    if opening > 0.02:
        fill(inside, ink("mouth"))
        over = [ink("mouth")]
        top = inside[LIP_STEPS // 2 :]
        teeth = figure.width(min(0.035, 0.10 * opening))
        fill(np.concatenate([top, (top + (0, teeth))[::-1]]), ink("teeth"), over=over)
        if opening > 0.35:
            low = inside[LIP_STEPS // 4]
            fill(disc(low[0], low[1], figure.width(0.085), figure.width(0.055)), ink("tongue"), over=over)


def eyes(figure: Figure) -> None:
    """Eyes, lids and brows."""
    fill, stroke, ink, heads = figure.canvas.fill, figure.canvas.stroke, figure.ink, figure.heads
    # the part of a far eye that lies outside the face is not painted
    on_head = [ink(name) for name in (*FACE_INKS, "beard", "nose", "eye white", "iris", "pupil", "glint")]
    lid_width = figure.width(0.014 + 0.014 * figure.identity["lashes"])
    for side in (RIGHT, LEFT):
        eye = figure.head(heads.eye(side, EYE_TURNS))
        fill(eye, ink("eye white"))
        white = [ink("eye white")]
        turns = np.arange(24) / 24
        fill(figure.head(heads.iris(side, turns)), ink("iris"), over=white)
        fill(figure.head(heads.iris(side, turns, 0.52)), ink("pupil"), over=[ink("iris")])
        centre = figure.head(heads.iris(side, np.array([0.62]), 0.5))[0]
        fill(disc(centre[0], centre[1], figure.width(0.012), steps=12), ink("glint"), over=[ink("iris"), ink("pupil")])
        upper = np.concatenate([eye[EYE_STEPS // 2 :], eye[:1]])
        if figure.identity["lashes"] > 0.5:
            wing = upper[-1] + figure.width(0.035) * np.array([side, -0.7])
            upper = np.concatenate([upper, wing[None]])
        stroke(upper, lid_width, ink("lid"), over=on_head)
        along = np.linspace(-1, 1, BROW_STEPS)
        brow = [figure.head(heads.brow(side, along, edge)) for edge in (-1, 1)]
        fill(np.concatenate([brow[0], brow[1][::-1]]), ink("brows"), over=[*on_head, ink("lid")])


def spectacles(figure: Figure) -> None:
    """Two rims, a bridge, and the arms as far as the face goes."""
    kind = figure.identity.traits["glasses"]
    if kind == "none":
        return
    heads, ink = figure.heads, figure.ink
    angle = 2 * np.pi * np.arange(40) / 40
    power = 1.0 if kind == "round" else 0.45
    wide, high = (0.130, 0.122) if kind == "round" else (0.140, 0.100)
    eye_x = float(heads.eye_x()[0, 0])
    for side in (RIGHT, LEFT):
        x = side * eye_x + wide * np.sign(np.cos(angle)) * np.abs(np.cos(angle)) ** power
        y = -0.085 + high * np.sign(np.sin(angle)) * np.abs(np.sin(angle)) ** power
        rim = figure.head(heads.on_face(x / figure.half_width, y, 0.04))
        figure.canvas.stroke(rim, figure.width(0.024), ink("glasses"), closed=True)
        arm = figure.head(heads.on_face(np.array([(eye_x + wide) / figure.half_width, 0.99]) * side, -0.10, 0.02))
        figure.canvas.stroke(arm, figure.width(0.02), ink("glasses"), over=[ink(name) for name in FACE_INKS])
    bridge = np.array([-1, 0, 1]) * max(eye_x - wide, 0.012) / figure.half_width
    figure.canvas.stroke(
        figure.head(heads.on_face(bridge, np.array([-0.095, -0.11, -0.095]), 0.06)), figure.width(0.022), ink("glasses")
    )
