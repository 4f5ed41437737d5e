"""A box → squared, snapped, and its cells at every level. DESIGN.md, "Boxes"."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..errors import BoxError

Cells = tuple[int, int, int, int]  # x0, y0, x1, y1 in cells of one level, half-open


@dataclass(frozen=True)
class Grid:
    """The picture's grid, into which a box must fit.

    height, width:    of the picture, px; multiples of `multiple`.
    vae_scale_factor: f, px per latent cell.
    levels:           L, number of resolutions inside the UNet.
    box_snap:         px grid of the snapped square, a multiple of f.
    """

    height: int
    width: int
    vae_scale_factor: int
    levels: int
    box_snap: int

    @property
    def multiple(self) -> int:
        """f·2^(L-1): the side in px of one cell at the coarsest level."""
        return self.vae_scale_factor << (self.levels - 1)

    def size(self, level: int) -> tuple[int, int]:
        """(H, W) in cells of `level`."""
        cell = self.vae_scale_factor * 2**level
        return self.height // cell, self.width // cell


@dataclass(frozen=True)
class FaceBox:
    """A square of latent cells inside the picture, made by `snap_box`."""

    x: int
    y: int
    side: int
    grid: Grid

    @property
    def px(self) -> Cells:
        """x0, y0, x1, y1 of the snapped square in output pixels, half-open."""
        f = self.grid.vae_scale_factor
        return self.x * f, self.y * f, (self.x + self.side) * f, (self.y + self.side) * f

    def inside(self, points: NDArray[np.float64]) -> NDArray[np.float64]:
        """Points (n, 2) in units of the square → px of the output."""
        x0, y0, x1, y1 = self.px
        return points * (x1 - x0, y1 - y0) + (x0, y0)

    def cells(self, level: int) -> Cells:
        """The square's cells at `level`, at least one; its centre stays where it was.

        side_k = max(1, ⌊side/2^k + ½⌋),  x_k = ⌊(x + side/2)/2^k - side_k/2 + ½⌋, shifted in.
        """
        # Computed in halves of a cell, which are whole numbers, so that no rounding of floats can move a box.
        scale = 2**level
        side = max(1, (2 * self.side + scale) // (2 * scale))
        height, width = self.grid.size(level)
        x = (2 * self.x + self.side - side * scale + scale) // (2 * scale)
        y = (2 * self.y + self.side - side * scale + scale) // (2 * scale)
        x, y = min(max(x, 0), width - side), min(max(y, 0), height - side)
        return x, y, x + side, y + side


def snap_box(box: Sequence[float], grid: Grid) -> FaceBox:
    """The square of latent cells that stands for `box`.

    box:  x0, y0, x1, y1 in output pixels; any rectangle with an area, it may reach outside the picture.
    grid: the picture's.

    Squared on the longer edge about its centre; larger than the picture → shrunk to fit; outside → shifted in; then
    x0, y0 and the side are rounded to the grid of `box_snap` px, and shifted in again.
    Raises BoxError for a box without area and for one whose face would vanish at the coarsest level.
    """
    try:
        x0, y0, x1, y1 = (float(value) for value in box)
    except (TypeError, ValueError, OverflowError):
        raise BoxError(
            f"box {box!r} is not four numbers. Give x0, y0, x1, y1 in pixels of the output picture."
        ) from None
    if not all(map(math.isfinite, (x0, y0, x1, y1))):
        raise BoxError(f"box {_show(box)} is not finite. Give x0, y0, x1, y1 in pixels of the output picture.")
    if x1 <= x0 or y1 <= y0:
        raise BoxError(
            f"box {_show(box)} has no area: x1 must be right of x0 and y1 below y0. Give x0, y0, x1, y1 in pixels "
            "(not x, y, width, height)."
        )
    side = max(x1 - x0, y1 - y0)
    if side < grid.multiple:
        raise BoxError(
            f"box {_show(box)} is {side:g} px wide; at the coarsest level one cell is {grid.multiple} px, so the face "
            f"would vanish. Use a box of at least {grid.multiple} px."
        )
    centre_x, centre_y = (x0 + x1) / 2, (y0 + y1) / 2
    side = min(side, grid.height, grid.width)
    left = min(max(centre_x - side / 2, 0.0), grid.width - side)
    top = min(max(centre_y - side / 2, 0.0), grid.height - side)

    def snap(value: float) -> int:
        return math.floor(value / grid.box_snap + 0.5) * grid.box_snap // grid.vae_scale_factor

    height, width = grid.size(0)
    cells = min(max(snap(side), grid.box_snap // grid.vae_scale_factor), height, width)
    x, y = min(max(snap(left), 0), width - cells), min(max(snap(top), 0), height - cells)
    return FaceBox(x, y, cells, grid)


def check_inside(box: Sequence[float], grid: Grid) -> None:
    """Raises BoxError for a box entirely outside the picture: it was meant for another size. box: as `snap_box` takes
    it."""
    x0, y0, x1, y1 = (float(value) for value in box)
    if x1 <= 0 or y1 <= 0 or x0 >= grid.width or y0 >= grid.height:
        raise BoxError(
            f"box {_show(box)} lies outside the picture, which is {grid.width}×{grid.height} px. Give x0, y0, x1, y1 "
            "in its pixels, or ask for a larger picture: height=, width=."
        )


def what_changed(box: Sequence[float], placed: FaceBox) -> tuple[str, ...]:
    """Notes on how `snap_box` moved or shrank a box, beyond squaring and snapping it."""
    x0, y0, x1, y1 = (float(value) for value in box)
    grid, (left, top, right, bottom) = placed.grid, placed.px
    picture = f"the picture is {grid.width}×{grid.height} px"
    side, kept = max(x1 - x0, y1 - y0), right - left
    if side - kept > grid.box_snap:
        return (f"{picture} and the box {side:g} px wide: it was shrunk to ({left}, {top}, {right}, {bottom}).",)
    moved = max(abs((left + right) - (x0 + x1)), abs((top + bottom) - (y0 + y1))) / 2
    if moved > grid.box_snap:
        return (f"{picture} and the box reached out of it: it was moved to ({left}, {top}, {right}, {bottom}).",)
    return ()


def overlap(a: FaceBox, b: FaceBox) -> float:
    """Intersection over union."""
    width = min(a.x + a.side, b.x + b.side) - max(a.x, b.x)
    height = min(a.y + a.side, b.y + b.side) - max(a.y, b.y)
    common = max(0, width) * max(0, height)
    return common / (a.side**2 + b.side**2 - common)


def cover_box(square: Sequence[float], photo_size: tuple[int, int], grid: Grid) -> tuple[float, float, float, float]:
    """Where a face of a photo lands when the photo is scaled to cover the picture, centred.

    square:     x0, y0, x1, y1 in pixels of the photo.
    photo_size: (height, width) of the photo, px.

    Returns x0, y0, x1, y1 in output pixels, not yet snapped.
    """
    height, width = photo_size
    scale = max(grid.height / height, grid.width / width)
    dx, dy = (grid.width - width * scale) / 2, (grid.height - height * scale) / 2
    x0, y0, x1, y1 = square
    return x0 * scale + dx, y0 * scale + dy, x1 * scale + dx, y1 * scale + dy


def _show(box: Sequence[float]) -> str:
    return "(" + ", ".join(f"{float(value):g}" for value in box) + ")"
