"""The program of the two photographs, on the engine of the tests."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def made(engine_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder that it wrote, and its output."""
    out = tmp_path_factory.mktemp("demo") / "out"
    command = [sys.executable, "-m", "examples.photographs", "--engine", str(engine_dir), "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "30/30" in done.stderr  # progress, to the last step
    return out, done.stdout


def test_both_faces_are_found(made: tuple[Path, str]) -> None:
    found = [line for line in made[1].splitlines() if "face found at" in line]
    assert [line.split(":")[0] for line in found] == ["astronaut.png", "hopper.jpg"]


def test_the_pictures(made: tuple[Path, str]) -> None:
    out, _ = made
    with Image.open(out / "photographs.png") as picture, Image.open(out / "photographs-boxes.png") as boxes:
        assert picture.size == boxes.size == (128, 128)
        low, high = zip(*picture.getextrema(), strict=True)
        assert max(high) - min(low) > 100  # not one colour
        changed = {(x, y) for x in range(128) for y in range(128) if picture.getpixel((x, y)) != boxes.getpixel((x, y))}
    left, right = ({point for point in changed if side(point[0])} for side in (lambda x: x < 64, lambda x: x >= 65))
    for drawn in (left, right):  # a rectangle in each half
        xs, ys = ({point[axis] for point in drawn} for axis in (0, 1))
        assert max(xs) - min(xs) > 40 and max(ys) - min(ys) > 40
    with Image.open(out / "photographs-conditions.png") as conditions:
        assert conditions.size[0] > 4 * conditions.size[1]


def test_the_timing_table(made: tuple[Path, str]) -> None:
    out, said = made
    table = (out / "photographs.txt").read_text(encoding="utf-8")
    assert table in said
    rows = {line.split()[0]: line.split()[-1] for line in table.splitlines() if len(line.split()) == 3}
    # 30 steps for two persons, the first 10 without the ID: DESIGN's table of rows.
    assert rows["unet_encoder"] == "60" and rows["unet_decoder"] == str(10 * 2 + 20 * 3)
    assert rows["local_branch"] == rows["global_branch"] == str(10 * 2 + 20 * 4)
    assert {"persons", "text", "time", "conditions", "denoise", "vae"} <= {
        line.split()[0] for line in table.splitlines() if line
    }


def test_an_engine_that_is_not_there(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "examples.photographs",
        "--engine",
        str(tmp_path / "none"),
        "--out",
        str(tmp_path / "o"),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert "no such engine directory" in done.stderr and "Traceback" not in done.stderr
