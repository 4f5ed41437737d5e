"""`make demo`'s sheet, on the engine of the tests: every requested picture is at its place."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from examples.demo import PHOTO_PX, SCENES, generate
from examples.sheet import GAP_PX, PICTURE_PX, TITLE_PX, Line, layout, sheet
from examples.sheet import PHOTO_PX as SMALL_PX
from realisid_trt import Engine
from realisid_trt.commands.drawing import COLORS
from training.world import Picture, World, draw

ROOT = Path(__file__).resolve().parents[2]
COLUMNS = [2 * GAP_PX + SMALL_PX + column * (PICTURE_PX + GAP_PX) for column in range(3)]


@pytest.fixture(scope="module")
def page(engine_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> NDArray[np.uint8]:
    """The sheet that the program wrote, (H, W, 3)."""
    out = tmp_path_factory.mktemp("demo") / "out"
    command = [sys.executable, "-m", "examples.demo", "--engine", str(engine_dir), "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("30/30") >= len(SCENES)  # progress, to the last step
    with Image.open(out / "demo.png") as picture:
        return np.asarray(picture)


def asked(number: int, caption: str, face: tuple[float, float]) -> tuple[Picture, list[Picture]]:
    scene = World(grid=32).scene(number, "unseen", caption=caption, face=face)
    photos = [draw(World(grid=32).reference(actor.identity), PHOTO_PX) for actor in scene.actors]
    return draw(scene, PICTURE_PX), photos


def test_two_people_and_three(page: NDArray[np.uint8]) -> None:
    assert [len(asked(*one)[1]) for one in SCENES] == [2, 3]
    assert page.shape[0] == len(SCENES) * (PICTURE_PX + TITLE_PX + GAP_PX) + GAP_PX


def test_the_worlds_own_pictures_stand_at_the_right(page: NDArray[np.uint8]) -> None:
    for line, one in enumerate(SCENES):
        top = GAP_PX + line * (PICTURE_PX + TITLE_PX + GAP_PX)
        shown = page[top : top + PICTURE_PX, COLUMNS[2] : COLUMNS[2] + PICTURE_PX]
        np.testing.assert_array_equal(shown, asked(*one)[0].rgb)


def test_the_engines_pictures_are_no_single_colour(page: NDArray[np.uint8]) -> None:
    for line in range(len(SCENES)):
        top = GAP_PX + line * (PICTURE_PX + TITLE_PX + GAP_PX)
        assert page[top : top + PICTURE_PX, COLUMNS[1] : COLUMNS[1] + PICTURE_PX].std() > 20


def test_everybody_has_a_colour_of_their_own_on_photo_and_box(page: NDArray[np.uint8]) -> None:
    for line, one in enumerate(SCENES):
        truth, photos = asked(*one)
        top = GAP_PX + line * (PICTURE_PX + TITLE_PX + GAP_PX)
        for person in range(len(photos)):
            assert tuple(page[top + person * (SMALL_PX + GAP_PX), GAP_PX]) == COLORS[person]
            x0, y0, _, _ = np.round(truth.boxes[person]).astype(int)
            assert tuple(page[top + y0, COLUMNS[0] + x0]) == COLORS[person]


def test_a_pose_is_drawn_inside_its_box_and_nowhere_else() -> None:
    truth, _ = asked(*SCENES[0])
    lit = np.asarray(layout(truth, "realisid-v1")).max(axis=2) > 60
    inside = np.zeros_like(lit)
    for x0, y0, x1, y1 in np.round(truth.boxes).astype(int):
        inside[y0:y1, x0:x1] = True
        assert lit[y0 + 3 : y1 - 3, x0 + 3 : x1 - 3].any()
    assert not (lit & ~inside).any()


def test_long_captions_are_made_to_fit() -> None:
    truth, photos = asked(*SCENES[1])
    made = Image.new("RGB", (128, 128), (10, 20, 30))
    long = np.asarray(sheet([Line("a person in a white shirt " * 4, photos, truth, made)], "realisid-v1"))
    gap = long[:, COLUMNS[1] - GAP_PX + 1 : COLUMNS[1] - 1]
    assert (gap == gap[0, 0]).all()  # no letter between two columns


def test_the_engine_is_asked_for_the_boxes_of_the_scene(engine: Engine) -> None:
    scene = World(grid=32).scene(11, "unseen", caption=SCENES[0][1], face=SCENES[0][2])
    photos = [draw(World(grid=32).reference(actor.identity), PHOTO_PX) for actor in scene.actors]
    result = generate(engine, scene, photos, seed=1)
    np.testing.assert_allclose([person.box for person in result.persons], draw(scene, 128).boxes)


@pytest.mark.parametrize("program", ["demo", "photographs"])
def test_a_folder_that_is_a_file(program: str, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    command = [sys.executable, "-m", f"examples.{program}", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "File exists" in done.stderr and "Traceback" not in done.stderr
    assert (tmp_path / "out").read_text() == "mine"
