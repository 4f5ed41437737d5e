"""A sheet of labels to paint on: shapes in, coverage out.

Nothing is painted in colour. Every shape writes its label into an oversampled map; a palette then turns labels into
colours, and averaging over the samples gives soft edges. So what each pixel shows is known exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import cv2
import numpy as np
from numpy.typing import ArrayLike, NDArray

Mask = NDArray[np.uint8]
Outline = NDArray[np.float64]  # (k, 2) fractions of the picture's side
Fixed = NDArray[np.int32]  # (k, 2) in OpenCV's fixed point
SUBPIXEL_BITS = 6  # of OpenCV's drawing functions
FAR = 4.0  # points further outside the picture would overflow OpenCV's integers


class Canvas:
    """labels: (S, S) uint8. All lengths are fractions of the picture's side."""

    def __init__(self, side_px: int) -> None:
        self.side_px = side_px
        self.labels = np.zeros((side_px, side_px), np.uint8)

    def fill(self, outlines: Outline | list[Outline], label: int, over: Sequence[int] = ()) -> None:
        """One polygon (k, 2), or a list of several, filled. over: only where one of these labels stands."""
        shapes = [self._fixed(outline) for outline in _listed(outlines)]
        if not over:
            cv2.fillPoly(self.labels, shapes, label, cv2.LINE_8, SUBPIXEL_BITS)
            return
        self._within(shapes, 1, label, over, _filled)

    def stroke(
        self, paths: Outline | list[Outline], width: float, label: int, closed: bool = False,
        over: Sequence[int] = (),
    ) -> None:  # fmt: skip
        """A line along a path (k, 2), or a list of several, round at their ends."""
        shapes = [self._fixed(path) for path in _listed(paths)]
        thickness = max(1, round(width * self.side_px))
        if not over:
            cv2.polylines(self.labels, shapes, closed, label, thickness, cv2.LINE_8, SUBPIXEL_BITS)
            return

        def draw(mask: Mask, moved: list[Fixed]) -> None:
            cv2.polylines(mask, moved, closed, 1, thickness, cv2.LINE_8, SUBPIXEL_BITS)

        self._within(shapes, thickness, label, over, draw)

    def rows(self, top: float, bottom: float, labels: Sequence[int]) -> None:
        """Bands of equal height, one per label, between two heights of the picture."""
        edges = np.round(np.linspace(top, bottom, len(labels) + 1) * self.side_px).astype(int)
        for label, start, stop in zip(labels, edges[:-1], edges[1:], strict=True):
            self.labels[max(start, 0) : max(stop, 0)] = label

    def _fixed(self, points: Outline) -> Fixed:
        """Fractions of the side → OpenCV's fixed point, in which whole numbers are pixel centres."""
        pixels = np.minimum(np.maximum(points, -FAR), FAR + 1) * self.side_px - 0.5
        return np.asarray(np.round(pixels * (1 << SUBPIXEL_BITS)), np.int32)

    def _within(
        self,
        shapes: list[Fixed],
        margin_px: int,
        label: int,
        over: Sequence[int],
        draw: Callable[[Mask, list[Fixed]], None],
    ) -> None:
        """Draws into a mask of the shapes' surroundings and writes the label where mask and `over` agree."""
        points = np.concatenate(shapes) >> SUBPIXEL_BITS
        x0, y0 = np.maximum(points.min(axis=0) - margin_px - 1, 0)
        x1, y1 = np.minimum(points.max(axis=0) + margin_px + 2, self.side_px)
        if x1 <= x0 or y1 <= y0:
            return
        mask = np.zeros((y1 - y0, x1 - x0), np.uint8)
        origin = np.array([x0, y0], np.int32) << SUBPIXEL_BITS
        draw(mask, [np.asarray(shape - origin, np.int32) for shape in shapes])
        there = self.labels[y0:y1, x0:x1]
        there[cv2.LUT(there, _table(tuple(over))) & mask > 0] = label


@cache
def _table(labels: tuple[int, ...]) -> Mask:
    """(256,) 1 for these labels."""
    table = np.zeros(256, np.uint8)
    table[list(labels)] = 1
    return table


def _filled(mask: Mask, shapes: list[Fixed]) -> None:
    cv2.fillPoly(mask, shapes, 1, cv2.LINE_8, SUBPIXEL_BITS)


def _listed(shapes: Outline | list[Outline]) -> list[Outline]:
    return shapes if isinstance(shapes, list) else [shapes]


def disc(x: float, y: float, rx: float, ry: float | None = None, steps: int = 40) -> NDArray[np.float64]:
    """(steps, 2) points of an ellipse."""
    return _circle(steps) * (rx, rx if ry is None else ry) + (x, y)


@cache
def _circle(steps: int) -> NDArray[np.float64]:
    angle = np.linspace(0, 2 * np.pi, steps, endpoint=False)
    circle = np.stack([np.cos(angle), np.sin(angle)], -1)
    circle.setflags(write=False)
    return circle


def block(x0: float, y0: float, x1: float, y1: float) -> NDArray[np.float64]:
    """(4, 2) corners of a rectangle."""
    return np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1]])


def smooth(points: ArrayLike, steps: int = 6, closed: bool = True) -> NDArray[np.float64]:
    """A Catmull–Rom curve through control points (k, 2): (k·steps, 2) if closed, else ((k - 1)·steps + 1, 2)."""
    p = np.asarray(points, np.float64)
    p = np.concatenate([p[-1:], p, p[:2]] if closed else [p[:1], p, p[-1:]])
    t = (np.arange(steps) / steps)[:, None]
    p0, p1, p2, p3 = (p[i : len(p) - 3 + i, None] for i in range(4))
    curve = 0.5 * (2 * p1 + (p2 - p0) * t + (2 * p0 - 5 * p1 + 4 * p2 - p3) * t**2 + (3 * (p1 - p2) + p3 - p0) * t**3)
    curve = curve.reshape(-1, 2)
    return curve if closed else np.concatenate([curve, p[-1:]])
