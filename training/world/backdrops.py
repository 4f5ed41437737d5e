"""The places of scenes: eight flat landscapes, painted in a few colours, each varied by numbers.

A backdrop is a function of a canvas and twelve numbers in [0, 1]; it paints labels from 1 on and returns their colours.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike

from .canvas import Canvas, block, disc, smooth
from .people import Floats

SKY_BANDS = 14  # a gradient is a few flat bands
NUM_VARIATIONS = 12
MOST_LABELS = 95


class Paper:
    """A canvas that gives every new colour the next label."""

    def __init__(self, canvas: Canvas) -> None:
        self.canvas = canvas
        self.colors: list[Floats] = [np.zeros(3)]  # label 0 is never seen

    def ink(self, *rgb: float) -> int:
        self.colors.append(np.array(rgb))
        assert len(self.colors) <= MOST_LABELS + 1
        return len(self.colors) - 1

    def bands(self, top: float, bottom: float, first: ArrayLike, last: ArrayLike, number: int = SKY_BANDS) -> None:
        mixed = np.linspace(0, 1, number)[:, None] * (np.asarray(last) - np.asarray(first)) + np.asarray(first)
        self.canvas.rows(top, bottom, [self.ink(*color) for color in mixed])


def _sun(paper: Paper, v: Floats, color: tuple[float, float, float], radius: float) -> None:
    x, y = 0.1 + 0.8 * v[1], 0.08 + 0.14 * v[2]
    paper.canvas.fill(disc(x, y, radius), paper.ink(*color))


def _clouds(paper: Paper, v: Floats, color: tuple[float, float, float]) -> None:
    ink = paper.ink(*color)
    for number in range(3):
        x, y = (v[3] + 0.37 * number + 0.1 * v[4]) % 1.1 - 0.05, 0.10 + 0.13 * ((v[5] + 0.41 * number) % 1)
        size = 0.045 + 0.02 * number
        puffs = [
            disc(x, y, size),
            disc(x + size, y + 0.3 * size, size * 0.8),
            disc(x - size, y + 0.35 * size, size * 0.7),
        ]
        for puff in [*puffs, block(x - 1.6 * size, y + 0.3 * size, x + 1.7 * size, y + size)]:
            paper.canvas.fill(puff, ink)


def _hills(paper: Paper, base: float, height: float, phase: float, color: tuple[float, float, float]) -> None:
    x = np.linspace(-0.02, 1.02, 40)
    y = base - height * (0.55 + 0.45 * np.sin(x * 5.5 + phase * 6.28)) * (0.8 + 0.2 * np.sin(x * 13 + phase * 9))
    edge = np.column_stack([x, y])
    paper.canvas.fill(np.concatenate([edge, [(1.02, 1.02), (-0.02, 1.02)]]), paper.ink(*color))


def _park(paper: Paper, v: Floats) -> None:
    ground = 0.56 + 0.1 * v[0]
    paper.bands(0, ground + 0.06, (0.45, 0.74, 0.95), (0.85, 0.94, 0.98))
    _sun(paper, v, (1.0, 0.93, 0.55), 0.06)
    _clouds(paper, v, (0.98, 0.99, 1.0))
    _hills(paper, ground, 0.10, v[6], (0.56, 0.76, 0.50))
    _hills(paper, ground + 0.04, 0.07, v[7], (0.44, 0.68, 0.38))
    trunk, leaf, light = paper.ink(0.45, 0.31, 0.20), paper.ink(0.25, 0.53, 0.27), paper.ink(0.34, 0.63, 0.32)
    for number in range(4):
        x, size = (v[8] + 0.29 * number) % 1.0, 0.075 + 0.04 * ((v[9] + 0.37 * number) % 1)
        foot = ground + 0.05
        paper.canvas.fill(block(x - 0.012, foot - 0.1, x + 0.012, foot + 0.02), trunk)
        paper.canvas.fill(disc(x, foot - 0.10 - size * 0.7, size, size * 1.15), leaf)
        paper.canvas.fill(disc(x - size * 0.25, foot - 0.13 - size * 0.8, size * 0.55, size * 0.6), light)
    _hills(paper, ground + 0.06, 0.015, v[9], (0.53, 0.78, 0.38))
    paper.bands(ground + 0.06, 1.0, (0.53, 0.78, 0.38), (0.36, 0.62, 0.28), 6)
    middle = 0.3 + 0.4 * v[10]
    path = [(middle - 0.02, ground + 0.04), (middle + 0.02, ground + 0.04), (middle + 0.26, 1.01), (middle - 0.2, 1.01)]
    paper.canvas.fill(np.array(path), paper.ink(0.87, 0.80, 0.62))


def _beach(paper: Paper, v: Floats) -> None:
    horizon, sand = 0.42 + 0.06 * v[0], 0.60 + 0.08 * v[6]
    paper.bands(0, horizon, (0.33, 0.74, 0.95), (0.82, 0.95, 0.98))
    _sun(paper, v, (1.0, 0.88, 0.45), 0.07)
    _clouds(paper, v, (1.0, 1.0, 1.0))
    paper.bands(horizon, sand, (0.10, 0.45, 0.72), (0.32, 0.74, 0.83), 7)
    x = 0.08 + 0.84 * v[7]
    paper.canvas.fill(np.array([(x, horizon - 0.10), (x, horizon - 0.01), (x + 0.055, horizon - 0.01)]),
                      paper.ink(0.98, 0.97, 0.93))  # fmt: skip
    paper.canvas.fill(smooth([(x - 0.04, horizon), (x + 0.07, horizon), (x + 0.045, horizon + 0.022),
                              (x - 0.02, horizon + 0.022)]), paper.ink(0.80, 0.25, 0.22))  # fmt: skip
    along = np.linspace(-0.02, 1.02, 40)
    shore = np.column_stack([along, sand + 0.012 * np.sin(along * 11 + v[8] * 6)])
    paper.canvas.fill(np.concatenate([shore - (0, 0.018), [(1.02, 1.02), (-0.02, 1.02)]]), paper.ink(0.95, 0.98, 0.98))
    paper.canvas.fill(np.concatenate([shore, [(1.02, 1.02), (-0.02, 1.02)]]), paper.ink(0.96, 0.87, 0.64))
    paper.bands(sand + 0.12, 1.0, (0.94, 0.84, 0.60), (0.87, 0.74, 0.49), 5)


def _houses(paper: Paper, v: Floats, ground: float, walls: list[int], lit: int, share: float) -> None:
    edges = 0.0 - 0.06 * v[3]
    number = 0
    windows: list[Floats] = []
    while edges < 1.0:
        wide = 0.11 + 0.07 * ((v[4] + 0.618 * number) % 1)
        top = ground - 0.18 - 0.32 * ((v[5] + 0.755 * number) % 1)
        paper.canvas.fill(block(edges, top, edges + wide - 0.004, ground + 0.01), walls[number % len(walls)])
        columns = max(2, int(wide / 0.045))
        for row, y in enumerate(np.arange(top + 0.03, ground - 0.05, 0.055)):
            for column in range(columns):
                if (v[6] * 7 + 0.618 * (row * 5 + column * 3 + number * 11)) % 1 < share:
                    x = edges + wide * (column + 0.5) / columns
                    windows.append(block(x - 0.011, y, x + 0.011, y + 0.028))
        edges += wide
        number += 1
    if windows:
        paper.canvas.fill(windows, lit)


def _city(paper: Paper, v: Floats) -> None:
    ground = 0.68 + 0.06 * v[0]
    paper.bands(0, ground, (0.60, 0.80, 0.95), (0.95, 0.93, 0.88))
    _clouds(paper, v, (1.0, 1.0, 1.0))
    walls = [paper.ink(*c) for c in ((0.78, 0.62, 0.55), (0.62, 0.67, 0.74), (0.86, 0.78, 0.64), (0.66, 0.55, 0.58))]
    _houses(paper, v, ground, walls, paper.ink(0.40, 0.52, 0.64), 0.95)
    paper.canvas.fill(block(0, ground, 1, ground + 0.06), paper.ink(0.76, 0.75, 0.74))
    paper.bands(ground + 0.06, 1.0, (0.46, 0.46, 0.49), (0.38, 0.38, 0.41), 4)
    white = paper.ink(0.93, 0.92, 0.88)
    for number in range(5):
        x = (v[7] + number) * 0.24 - 0.2
        paper.canvas.fill(block(x, ground + 0.16, x + 0.12, ground + 0.175), white)


def _night(paper: Paper, v: Floats) -> None:
    ground = 0.72 + 0.06 * v[0]
    paper.bands(0, ground, (0.05, 0.07, 0.22), (0.24, 0.20, 0.44))
    stars = paper.ink(0.95, 0.95, 0.85)
    for number in range(26):
        x, y = (v[8] + 0.618 * number) % 1, 0.45 * ((v[9] + 0.755 * number) % 1)
        paper.canvas.fill(disc(x, y, 0.0035 + 0.002 * (number % 3 == 0), steps=8), stars)
    _sun(paper, v, (0.97, 0.95, 0.82), 0.055)
    walls = [paper.ink(*c) for c in ((0.13, 0.13, 0.24), (0.17, 0.15, 0.28), (0.10, 0.11, 0.20))]
    _houses(paper, v, ground, walls, paper.ink(1.0, 0.82, 0.42), 0.45)
    paper.bands(ground, 1.0, (0.20, 0.20, 0.27), (0.13, 0.13, 0.19), 4)


def _room(paper: Paper, v: Floats) -> None:
    floor = 0.74 + 0.06 * v[0]
    walls = ((0.93, 0.82, 0.68), (0.76, 0.84, 0.80), (0.90, 0.76, 0.74))[int(v[1] * 3) % 3]
    paper.canvas.fill(block(0, 0, 1, 1), paper.ink(*walls))
    stripe = paper.ink(*(0.95 * c for c in walls))
    for x in np.arange(-0.1 + 0.1 * v[2], 1.05, 0.1):
        paper.canvas.fill(block(x, 0, x + 0.05, floor), stripe)
    frame, glass, bar = paper.ink(0.98, 0.96, 0.92), paper.ink(0.62, 0.83, 0.94), paper.ink(0.98, 0.96, 0.92)
    x = 0.06 + 0.55 * v[3]
    paper.canvas.fill(block(x, 0.10, x + 0.28, 0.46), frame)
    paper.canvas.fill(block(x + 0.02, 0.12, x + 0.26, 0.44), glass)
    paper.canvas.fill([block(x + 0.132, 0.12, x + 0.148, 0.44), block(x + 0.02, 0.272, x + 0.26, 0.288)], bar)
    y = (x + 0.42 + 0.2 * v[4]) % 0.85
    paper.canvas.fill(block(y, 0.16, y + 0.15, 0.30), paper.ink(0.45, 0.30, 0.20))
    paper.canvas.fill(block(y + 0.015, 0.175, y + 0.135, 0.285), paper.ink(0.45 + 0.4 * v[5], 0.60, 0.80 - 0.4 * v[5]))
    sofa = 0.1 + 0.5 * v[6]
    shade = (0.36, 0.52, 0.56) if v[7] > 0.5 else (0.70, 0.42, 0.36)
    paper.canvas.fill(smooth([(sofa, floor - 0.16), (sofa + 0.36, floor - 0.16), (sofa + 0.38, floor + 0.04),
                              (sofa - 0.02, floor + 0.04)]), paper.ink(*shade))  # fmt: skip
    paper.canvas.fill(block(0, floor, 1, 1), paper.ink(0.62, 0.43, 0.28))
    paper.canvas.fill(block(0, floor - 0.02, 1, floor), paper.ink(0.97, 0.94, 0.88))
    line = paper.ink(0.55, 0.37, 0.24)
    paper.canvas.fill([block(0, y, 1, y + 0.006) for y in np.arange(floor + 0.05, 1, 0.055)], line)
    paper.canvas.fill(block(sofa, floor - 0.03, sofa + 0.36, floor + 0.05), paper.ink(*(0.85 * c for c in shade)))


def _snow(paper: Paper, v: Floats) -> None:
    ground = 0.60 + 0.08 * v[0]
    paper.bands(0, ground + 0.06, (0.66, 0.78, 0.90), (0.90, 0.94, 0.98))
    rock, cap = paper.ink(0.60, 0.68, 0.78), paper.ink(0.97, 0.98, 1.0)
    for number in range(3):
        x, high = (v[3] + 0.38 * number) % 1.1 - 0.05, 0.26 + 0.14 * ((v[4] + 0.6 * number) % 1)
        peak, wide = ground - high, high * 0.8
        paper.canvas.fill(np.array([(x - wide, ground + 0.02), (x, peak), (x + wide, ground + 0.02)]), rock)
        tip = [
            (x - wide * 0.34, peak + high * 0.34),
            (x, peak),
            (x + wide * 0.34, peak + high * 0.34),
            (x + wide * 0.16, peak + high * 0.27),
            (x, peak + high * 0.4),
            (x - wide * 0.16, peak + high * 0.27),
        ]
        paper.canvas.fill(np.array(tip), cap)
    pine = paper.ink(0.22, 0.42, 0.38)
    for number in range(6):
        x, size = (v[5] + 0.193 * number) % 1.0, 0.05 + 0.025 * ((v[6] + 0.4 * number) % 1)
        for level in range(3):
            y, w = ground + 0.05 - size * (0.7 * level), size * (0.62 - 0.14 * level)
            paper.canvas.fill(np.array([(x - w, y), (x, y - size * 1.1), (x + w, y)]), pine)
    _hills(paper, ground + 0.05, 0.04, v[7], (0.93, 0.96, 0.99))
    paper.bands(ground + 0.07, 1.0, (0.95, 0.97, 1.0), (0.82, 0.88, 0.96), 5)
    flake = paper.ink(1.0, 1.0, 1.0)
    for number in range(34):
        x, y = (v[8] + 0.618 * number) % 1, (v[9] + 0.755 * number) % 1
        paper.canvas.fill(disc(x, y * ground, 0.005 + 0.003 * (number % 2), steps=10), flake)


def _studio(paper: Paper, v: Floats) -> None:
    tone = ((0.80, 0.72, 0.82), (0.70, 0.78, 0.84), (0.84, 0.78, 0.68), (0.76, 0.77, 0.79))[int(v[1] * 4) % 4]
    floor = 0.82 + 0.06 * v[0]
    paper.canvas.fill(block(0, 0, 1, 1), paper.ink(*(0.86 * c for c in tone)))
    x, y = 0.3 + 0.4 * v[2], 0.35 + 0.15 * v[3]
    for number, radius in enumerate(np.linspace(0.62, 0.22, 9)):
        paper.canvas.fill(disc(x, y, radius, steps=64), paper.ink(*((0.875 + 0.018 * number) * c for c in tone)))
    paper.bands(floor, 1.0, [0.80 * c for c in tone], [0.70 * c for c in tone], 5)


def _forest(paper: Paper, v: Floats) -> None:
    ground = 0.66 + 0.06 * v[0]
    paper.bands(0, ground + 0.06, (0.47, 0.66, 0.52), (0.74, 0.84, 0.66), 8)
    for layer, (bark, wide) in enumerate(
        (((0.43, 0.55, 0.43), 0.03), ((0.33, 0.38, 0.29), 0.045), ((0.28, 0.24, 0.19), 0.06))
    ):
        ink, number = paper.ink(*bark), 6 - layer
        for tree in range(number):
            x = (v[2 + layer] + tree / number + 0.06 * ((v[5 + layer] + 0.6 * tree) % 1)) % 1.05 - 0.02
            foot = ground + 0.03 + 0.03 * layer
            outline = [
                (x - wide * 0.40, -0.01),
                (x + wide * 0.40, -0.01),
                (x + wide * 0.5, foot - 0.05),
                (x + wide * 0.85, foot),
                (x - wide * 0.85, foot),
                (x - wide * 0.5, foot - 0.05),
            ]
            paper.canvas.fill(np.array(outline), ink)
        leaf = paper.ink(*((0.36, 0.58, 0.38), (0.27, 0.49, 0.30), (0.19, 0.40, 0.24))[layer])
        for tree in range(number + 2):
            x = (v[8 + layer] + tree / (number + 2)) % 1.1 - 0.05
            paper.canvas.fill(
                disc(x, -0.04 + 0.02 * layer, 0.14, 0.13 + 0.06 * ((v[11] + 0.6 * tree) % 1) - 0.03 * layer), leaf
            )
        _hills(paper, ground + 0.05 + 0.03 * layer, 0.03, v[3 + layer],
               ((0.50, 0.62, 0.38), (0.42, 0.54, 0.31), (0.36, 0.46, 0.26))[layer])  # fmt: skip


PAINTERS: dict[str, Callable[[Paper, Floats], None]] = {
    "park": _park, "beach": _beach, "city": _city, "room": _room, "snow": _snow, "studio": _studio,
    "forest": _forest, "night": _night,
}  # fmt: skip


def paint_backdrop(canvas: Canvas, name: str, variations: Floats) -> Floats:
    """Paints a landscape over the whole canvas.

    name: a key of PAINTERS; variations: (12,) in [0, 1].

    Returns (labels, 3): the colours, 0..1, of the labels 1 … used; row 0 is black and nowhere seen.
    """
    paper = Paper(canvas)
    PAINTERS[name](paper, variations)
    return np.array(paper.colors)
