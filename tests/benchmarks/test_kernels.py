"""The kernel benchmark without a GPU: what must move, and in how many launches."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.kernels import SDXL, Case, cases, crop_bytes, guide_bytes, main, merge_bytes
from realisid_trt.boxes import Grid, snap_box

HALF = 2
ALL_LEVELS = sum(channels * (128 >> level) ** 2 for channels, level in SDXL)  # values of one row at 1024²


def test_the_levels_are_sdxl_s() -> None:
    assert ALL_LEVELS == 26_869_760


def test_bytes_by_hand() -> None:
    one = Case(1024, 1024, faces=1, fraction=2, rows=1)
    # Half the canvas: a bilinear sample of every second cell reads both, so all of the local residual. Skip, local,
    # global, result.
    assert merge_bytes(one) == 4 * ALL_LEVELS * HALF
    three = Case(1024, 1024, faces=2, fraction=2, rows=3)
    # Two encoder rows, four branch rows of each branch, three decoder rows.
    assert merge_bytes(three) == (2 + 4 + 4 + 3) * ALL_LEVELS * HALF
    assert crop_bytes(one) == 4 * (4 * 64 * 64 + HALF * 128 * 128)
    assert guide_bytes(three) == 4 * 128 * 128 * (8 + 3 * HALF)


def test_small_faces_read_less() -> None:
    sizes = [merge_bytes(Case(1024, 1024, 4, fraction, 1)) for fraction in (2, 4, 7)]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 3


def test_boxes_lie_in_the_picture_at_every_level() -> None:
    for case in cases():
        for face in range(case.faces):
            for level in range(3):
                height, width = case.cells(level)
                x0, y0, x1, y1 = case.box(face, level)
                assert 0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height
    grid = Grid(1024, 1024, 8, 3, 8)
    box = Case(1024, 1024, 1, 4, 1).box(0, 0)
    assert snap_box([8 * v for v in box], grid).cells(0) == box


def test_a_dry_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--bandwidth", "1000", "--json", "--out", str(tmp_path / "kernels.json")]) == 0
    shown, said = capsys.readouterr()
    result = json.loads(shown)
    assert result == json.loads((tmp_path / "kernels.json").read_text())
    assert result["device"] is None and "dry run, no GPU: nothing was timed" in said
    merges = [row for row in result["cases"] if row["kernel"] == "relocate_merge"]
    assert len(merges) == 2 * 4 * 3 * 2 and all(row["launches"] == 1 for row in result["cases"])
    for row in result["cases"]:
        assert row["floor_us"] == pytest.approx(row["bytes"] / 1e12 * 1e6) and "us" not in row
        assert row["torch_launches"] > row["launches"]


def test_no_bandwidth(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--bandwidth", "0"]) == 2
    assert "--bandwidth is 0, expected GB/s above 0." in capsys.readouterr().err
