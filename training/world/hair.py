"""Hair, skull, ears and hat of a figure, in the order they are painted."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .canvas import disc, smooth
from .heads import LEFT, RIGHT
from .people import Floats

if TYPE_CHECKING:
    from .figures import Figure


SKULL = (0.0, -0.13, -0.15)  # its centre, in head units


def _volume(figure: Figure, style: str) -> float:
    """How far the hair stands off the skull, in head units."""
    base = {"shaved": 0.0, "ring": 0.03, "short": 0.035, "parted": 0.06, "curly": 0.12, "bun": 0.035}
    return base.get(style, 0.06) + 0.05 * figure.identity["volume"] * (style not in ("shaved", "ring"))


def _crown(figure: Figure, extra: float | Floats, turns: Floats) -> Floats:
    """The skull's outline, `extra` head units larger."""
    return figure.ball(SKULL, figure.half_width * 1.05 + extra, 0.49 + extra, turns)


def _curls(figure: Figure, extra: float | Floats, turns: Floats) -> Floats:
    """`_crown` with fourteen bumps."""
    extra = extra + 0.045 * np.abs(np.sin(2 * np.pi * turns * 7 + 0.4))
    return _crown(figure, extra, turns)


def back_hair(figure: Figure, style: str, hat: bool) -> None:
    """The hair behind head and neck."""
    turns = np.arange(48) / 48
    extra = _volume(figure, style)
    if style == "bun" and not hat:
        figure.canvas.fill(figure.ball((0.0, -0.70, -0.22), 0.17, 0.16, turns), figure.ink("hair back"))
    if style in ("bob", "long"):
        length, wide = (0.50 if style == "bob" else 0.98), figure.half_width * 1.05 + extra
        panel = np.array([
            (-wide * 0.9, -0.32), (-wide, -0.1), (-wide * 1.05, 0.25), (-wide * 1.08, length - 0.14),
            (-wide * 0.85, length), (0, length - 0.03), (wide * 0.85, length), (wide * 1.08, length - 0.14),
            (wide * 1.05, 0.25), (wide, -0.1), (wide * 0.9, -0.32),
        ])  # fmt: skip
        points = np.column_stack([panel, np.full(len(panel), -0.16)])[None]
        figure.canvas.fill(smooth(figure.head(points)), figure.ink("hair back"))
    if style == "curly":
        figure.canvas.fill(_curls(figure, extra, np.arange(96) / 96), figure.ink("hair back"))


def shoulder_hair(figure: Figure) -> None:
    """Two strands of long hair before the shoulders."""
    wide = figure.half_width * 1.08 + _volume(figure, "long")
    for side in (-1, 1):
        strand = np.array([(0.62, -0.1), (0.7, 0.45), (0.52, 0.95), (0.85, 1.08), (1.06, 0.8), (1.03, 0.3), (1, 0)])
        points = np.column_stack([side * wide * strand[:, 0], strand[:, 1], np.full(len(strand), -0.10)])[None]
        figure.canvas.fill(smooth(figure.head(points)), figure.ink("hair back"))


def skull(figure: Figure, style: str) -> None:
    """Skull and ears; the hair behind the ears."""
    turns = np.arange(48) / 48
    ink = {"shaved": "scalp", "ring": "scalp"}.get(style, "hair back")
    figure.canvas.fill(_crown(figure, 0.0 if ink == "scalp" else 0.01, turns), figure.ink(ink))
    if style == "ring":
        for side in (RIGHT, LEFT):
            tuft = np.array([[side * figure.half_width * 0.92, -0.06, -0.12]])[None]
            x, y = figure.head(tuft)[0]
            figure.canvas.fill(disc(x, y, figure.width(0.17), figure.width(0.24)), figure.ink("hair"))
    ear = 0.065 + 0.035 * figure.identity["ears"]
    for side in (RIGHT, LEFT):
        for ink, size in (("ear", 1.0), ("ear shade", 0.55)):
            outline = disc(0, 0, ear * 0.72 * size, ear * size, 24)
            points = np.column_stack([side * (figure.half_width * 0.99 + 0.02) + outline[:, 0], outline[:, 1] - 0.01])
            points = np.column_stack([points, np.full(24, 0.0)])[None]
            figure.canvas.fill(figure.head(points), figure.ink(ink))


def _hairline(figure: Figure, style: str) -> Floats:
    """(1, k, 3) from temple to temple over the forehead."""
    x = np.linspace(-1, 1, 33)
    fringe, part = figure.identity["fringe"], 1.0 if figure.identity["parting"] > 0.5 else -1.0
    y = -0.40 + 0.30 * np.abs(x) ** 3.0
    if style in ("bob", "long") and fringe > 0.5:  # bangs
        y = np.where(np.abs(x) < 0.86, -0.255 + 0.02 * np.abs(x), y + 0.12)
    elif style == "parted":
        y = y + 0.17 * np.exp(-(((x * part - 0.42) / 0.36) ** 2)) - 0.05 * (x * part < -0.25)
    elif style in ("short", "curly", "bun"):
        y = y + (0.03 if style == "bun" else 0.09) * fringe * (1 - x**2)
    elif style in ("bob", "long"):
        y = y + 0.05 - 0.10 * np.exp(-(((x * part - 0.3) / 0.16) ** 2))
    if style == "curly":
        y = y + 0.025 * np.abs(np.sin(x * 9))
    elif style == "short" and fringe > 0.4:
        y = y + 0.03 * (np.abs((x * 4) % 1 - 0.5) * 2)
    elif style == "shaved":
        y = y - 0.02 + 0.05 * (np.abs(x) > 0.8)
    return figure.heads.on_face(x, y, 0.01)


def front_hair(figure: Figure, style: str) -> None:
    """Hair over forehead and temples, and its shine. A hat is painted over it later."""
    if style == "ring":
        return
    ink = "scalp" if style == "shaved" else "hair"
    extra = _volume(figure, style)
    over_top = np.linspace(0.025, -0.525, 49)  # from the right temple over the top to the left one
    top = _curls(figure, extra, over_top) if style == "curly" else _crown(figure, extra, over_top)
    line = figure.head(_hairline(figure, style))
    figure.canvas.fill(np.concatenate([line, top]), figure.ink(ink))
    if style in ("bob", "long"):
        wide, end = figure.half_width * 1.07 + extra, 0.50 if style == "bob" else 0.62
        for side in (-1, 1):
            lock = np.array([
                (0.80, -0.30), (0.79, 0.0), (0.80, 0.25), (0.84, end), (0.95, end + 0.02), (1.04, end - 0.08),
                (1.02, 0.1), (0.99, -0.25), (0.85, -0.42),
            ])  # fmt: skip
            x = side * wide * lock[:, 0]
            points = np.column_stack([x, lock[:, 1], 0.02 - 0.10 * (lock[:, 0] > 0.9)])[None]
            figure.canvas.fill(smooth(figure.head(points)), figure.ink(ink))
    if style not in ("shaved", "curly"):
        turns = np.linspace(-0.22, -0.10, 12) if figure.identity["parting"] > 0.5 else np.linspace(-0.40, -0.28, 12)
        shine = figure.ball((0.0, -0.13, -0.05), figure.half_width * 0.80, 0.40 + extra, turns)
        figure.canvas.stroke(shine, figure.width(0.028), figure.ink("hair light"), over=[figure.ink(ink)])


def hat_on(figure: Figure, style: str) -> None:
    """A knitted cap: dome and band."""
    extra = 0.05 + 0.6 * _volume(figure, style)
    x = np.linspace(-1.07, 1.07, 25)
    lower = figure.head(figure.heads.on_face(x, -0.235 - 0.05 * (1 - x**2), 0.05))
    upper = figure.head(figure.heads.on_face(x, -0.355 - 0.05 * (1 - x**2), 0.06))
    dome = _crown(figure, extra, np.linspace(-0.03, -0.47, 40))
    figure.canvas.fill(np.concatenate([upper, dome]), figure.ink("hat"))
    pompom = figure.ball((0, -0.67 - extra, -0.15), 0.085, 0.085, np.arange(24) / 24)
    figure.canvas.fill(pompom, figure.ink("hat band"))
    figure.canvas.fill(np.concatenate([lower, upper[::-1]]), figure.ink("hat band"))
    figure.canvas.stroke(np.concatenate([lower, upper[::-1]]), figure.width(0.03), figure.ink("hat band"), closed=True)
