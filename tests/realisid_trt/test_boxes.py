"""Boxes: squared, snapped, kept inside, and centred at every level."""

import math

import numpy as np
import pytest

from realisid_trt.errors import BoxError
from realisid_trt.persons.boxes import Grid, check_inside, cover_box, overlap, snap_box, what_changed

SDXL = Grid(height=1024, width=1024, vae_scale_factor=8, levels=3, box_snap=8)


def test_a_square_on_the_grid_stays() -> None:
    box = snap_box((160, 176, 416, 432), SDXL)
    assert box.px == (160, 176, 416, 432)
    assert [box.cells(level) for level in range(3)] == [(20, 22, 52, 54), (10, 11, 26, 27), (5, 6, 13, 14)]


def test_squared_on_the_longer_edge_about_its_centre() -> None:
    assert snap_box((200, 100, 300, 356), SDXL).px == (120, 104, 376, 360)  # 122 → 15.25 cells, 100 → 12.5 → 13


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        ((-100, -50, 156, 206), (0, 0, 256, 256)),  # outside → shifted in, not cut
        ((900, 900, 1156, 1156), (768, 768, 1024, 1024)),
        ((-500, -500, 2000, 2000), (0, 0, 1024, 1024)),  # larger than the picture → shrunk to fit
        ((5000, 5000, 5100, 5100), (920, 920, 1024, 1024)),
        ((0, 0, 1024, 1024), (0, 0, 1024, 1024)),
    ],
)
def test_kept_inside_the_picture(box: tuple[int, ...], expected: tuple[int, ...]) -> None:
    assert snap_box(box, SDXL).px == expected


def test_shrunk_to_the_shorter_side_of_an_oblong_picture() -> None:
    grid = Grid(height=832, width=1216, vae_scale_factor=8, levels=3, box_snap=8)
    assert snap_box((0, 0, 1216, 1216), grid).px == (192, 0, 1024, 832)


@pytest.mark.parametrize(
    ("box", "message"),
    [
        ((10, 10, 18, 18), r"box \(10, 10, 18, 18\) is 8 px wide; at the coarsest level one cell is 32 px, so the face "
                           r"would vanish. Use a box of at least 32 px."),
        ((50, 50, 40, 90), "has no area"),
        ((50, 50, 90, 50), "not x, y, width, height"),
        ((0, 0, math.nan, 9), "not finite"),
        ((0, 0, math.inf, 9), "not finite"),
        ((1, 2, 3), "not four numbers"),
        ("everywhere", "not four numbers"),
        (None, "not four numbers"),
    ],
)  # fmt: skip
def test_refused(box: object, message: str) -> None:
    with pytest.raises(BoxError, match=message):
        snap_box(box, SDXL)  # type: ignore[arg-type]


def test_every_box_obeys_the_design() -> None:
    """Against the formulas in floating point, over many grids and boxes."""
    rng = np.random.default_rng(0)
    for _ in range(3000):
        f, levels = int(rng.choice([4, 8])), int(rng.integers(2, 5))
        multiple = f * 2 ** (levels - 1)
        height, width = (int(n) * multiple for n in rng.integers(2, 20, 2))
        snap = f * int(rng.choice([1, 4]))
        grid = Grid(height, width, f, levels, snap)
        corner = rng.uniform(-0.5, 1, 2) * (width, height)
        size = rng.uniform(multiple, 1.2 * max(height, width), 2)
        box = snap_box((*corner, *(corner + size)), grid)
        side = min(max(size), height, width)
        cells = side / f
        assert abs(box.side - cells) <= snap / f / 2 + 1e-9 or box.side == min(height, width) // f
        assert 0 <= box.x <= width // f - box.side and 0 <= box.y <= height // f - box.side
        for level in range(levels):
            x0, y0, x1, y1 = box.cells(level)
            expected = max(1, math.floor(box.side / 2**level + 0.5))
            assert x1 - x0 == y1 - y0 == expected
            assert x0 >= 0 and x1 <= grid.size(level)[1] and y0 >= 0 and y1 <= grid.size(level)[0]
            centre = (box.x + box.side / 2) / 2**level
            inside = x0 > 0 and x1 < grid.size(level)[1]
            if inside:
                assert abs((x0 + x1) / 2 - centre) <= 0.5  # the centre stays where it was
            x_k = math.floor(centre - expected / 2 + 0.5)
            assert x0 == min(max(x_k, 0), grid.size(level)[1] - expected)


def test_a_box_over_the_whole_picture_is_the_whole_of_every_level() -> None:
    box = snap_box((0, 0, 1024, 1024), SDXL)
    assert [box.cells(level) for level in range(3)] == [(0, 0, 128, 128), (0, 0, 64, 64), (0, 0, 32, 32)]


def test_cover_keeps_the_face_where_it_is_in_the_photo() -> None:
    # A 500×1000 photo (h×w) covers a 1024² picture at 2.048; its middle stays the middle.
    x0, y0, x1, y1 = cover_box((450, 200, 550, 300), (500, 1000), SDXL)
    assert ((x0 + x1) / 2, (y0 + y1) / 2) == (512, 512)
    assert x1 - x0 == pytest.approx(204.8)


@pytest.mark.parametrize("box", [(-300, 10, -10, 300), (1024, 0, 1200, 100), (0, -200, 100, 0), (0, 1024, 90, 1100)])
def test_a_box_outside_is_for_another_picture(box: tuple[int, ...]) -> None:
    with pytest.raises(BoxError, match=r"lies outside the picture, which is 1024×1024 px"):
        check_inside(box, SDXL)
    check_inside((-300, 10, 1, 300), SDXL)


@pytest.mark.parametrize(
    ("box", "said"),
    [
        ((160, 176, 416, 432), None),
        ((200, 100, 300, 356), None),  # squared
        ((3, 3, 60, 60), None),  # snapped
        ((-4, 0, 252, 256), None),  # moved by less than a cell
        ((-100, -50, 156, 206), "1024×1024 px and the box reached out of it: it was moved to (0, 0, 256, 256)."),
        ((-500, -500, 2000, 2000), "the box 2500 px wide: it was shrunk to (0, 0, 1024, 1024)."),
    ],
)  # fmt: skip
def test_what_was_done_beyond_snapping_is_told(box: tuple[int, ...], said: str | None) -> None:
    notes = what_changed(box, snap_box(box, SDXL))
    assert notes == () if said is None else len(notes) == 1 and notes[0].endswith(said)


def test_overlap() -> None:
    a, b, c = (snap_box(box, SDXL) for box in ((0, 0, 256, 256), (128, 0, 384, 256), (512, 512, 768, 768)))
    assert overlap(a, a) == 1 and overlap(a, b) == overlap(b, a) == pytest.approx(1 / 3) and overlap(a, c) == 0
