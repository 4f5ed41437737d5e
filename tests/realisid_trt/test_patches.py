"""Patches are pasted where ID-Patch pastes them, to the pixel, and added."""

from __future__ import annotations

from decimal import ROUND_HALF_EVEN, Decimal
from fractions import Fraction

import numpy as np
import pytest

from realisid_trt.persons.patches import paint_patches

SIDES = (64, 7)  # the published one, and an odd one, whose half is no whole number


def painted_by_pixel(drawing, patches, anchors):  # type: ignore[no-untyped-def]
    """The rule again, for every pixel of every patch, in decimal numbers: those are exact for any float."""
    result = drawing.copy()
    for patch, anchor in zip(patches, anchors, strict=True):
        side = patch.shape[1]
        corner = [int((Decimal(float(v)) - Decimal(side) / 2).to_integral_value(ROUND_HALF_EVEN)) for v in anchor]
        for row in range(side):
            for column in range(side):
                x, y = corner[0] + column, corner[1] + row
                if 0 <= x < drawing.shape[2] and 0 <= y < drawing.shape[1]:
                    result[:, y, x] += patch[:, row, column]
    return result


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("fraction", [0.0, 0.25, 0.5, 0.75, 0.4999999999])
@pytest.mark.parametrize("axis", [0, 1])
def test_every_position(side: int, fraction: float, axis: int) -> None:
    """All of 0…1023 on one axis: the pasted cells are those of the rule in exact fractions."""
    size = 1024
    patch = np.ones((3, side, side), np.float32)
    for whole in range(size):
        anchor = [side / 2, side / 2]
        anchor[axis] = whole + fraction
        first = round(Fraction(anchor[axis]) - Fraction(side, 2))  # halves to even, as Fraction rounds
        shape = (3, side, size) if axis == 0 else (3, size, side)
        found = paint_patches(np.zeros(shape, np.float32), [patch], [anchor])
        line = found[0].max(axis=axis)
        expected = np.zeros(size, np.float32)
        expected[max(first, 0) : max(first + side, 0)] = 1
        assert np.array_equal(line, expected), (whole, fraction)


def test_halves_go_to_even() -> None:
    """x0 = 0.5 → 0, 1.5 → 2, -0.5 → 0, -1.5 → -2."""
    for anchor, first in ((32.5, 0), (33.5, 2), (34.5, 2), (31.5, 0)):
        found = paint_patches(np.zeros((3, 64, 200), np.float32), [np.ones((3, 64, 64), np.float32)], [(anchor, 32)])
        assert np.flatnonzero(found[0, 0])[0] == first
    cut = paint_patches(np.zeros((3, 64, 200), np.float32), [np.ones((3, 64, 64), np.float32)], [(30.5, 32)])
    assert np.flatnonzero(cut[0, 0])[-1] == 61  # from -2


@pytest.mark.parametrize("side", SIDES)
def test_overlaps_cuts_and_values_beyond_the_range(side: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(6):
        height, width = rng.integers(5, 90, 2)
        patches = [4 * rng.standard_normal((3, side, side)).astype(np.float32) for _ in range(3)]
        anchors = [rng.random(2) * (width, height), np.float64((width - 1, 0)), rng.random(2) * (width, height)]
        drawing = rng.random((3, height, width)).astype(np.float32)
        before = drawing.copy()
        found = paint_patches(drawing, patches, anchors)
        assert found.dtype == np.float32 and np.array_equal(drawing, before)
        assert np.array_equal(found, painted_by_pixel(drawing, patches, anchors))
        assert found.max() > 1 and found.min() < 0


def test_the_same_patch_twice_is_added_twice_and_beyond_the_picture_nothing_is() -> None:
    drawing, patch = np.full((3, 40, 50), 0.25, np.float32), np.full((3, 8, 8), 0.5, np.float32)
    found = paint_patches(drawing, [patch, patch], [(20, 20), (20, 20)])
    assert found[0, 16:24, 16:24].min() == found[0, 16:24, 16:24].max() == 1.25
    assert np.count_nonzero(found != 0.25) == 3 * 64
    for outside in ((-200, 20), (20, 900), (-4, 20), (54, 20)):
        assert np.array_equal(paint_patches(drawing, [patch], [outside]), drawing)
    assert np.array_equal(paint_patches(drawing, [], []), drawing)


def test_no_position_is_rounded_to_bfloat16() -> None:
    """At 225 the published code in bfloat16 pastes 60 to 68 px, or raises."""
    found = paint_patches(np.zeros((3, 64, 1024), np.float32), [np.ones((3, 64, 64), np.float32)], [(225, 32)])
    assert np.flatnonzero(found[0, 0]).tolist() == list(range(193, 257))
