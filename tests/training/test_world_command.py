"""The procedural world: wrong arguments, the command, and its cost."""

from __future__ import annotations

import ast
import dataclasses
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from realisid_trt.errors import BoxError, RequestError, ShapeError
from tests.training.support import FOLDER, WORLD
from training.world import (
    FACTORS,
    POSE_LIMITS,
    Description,
    Identity,
    Pose,
    World,
    draw,
    face_masks,
    id_crop,
    landmarks,
)
from training.world.__main__ import main

# -- wrong arguments --------------------------------------------------------------------------------------------------

SQUARE_OUTSIDE = dataclasses.replace(WORLD.scene(0, persons=1).actors[0], square=(50, 0, 20))
WRONG: list[tuple[Callable[[], object], type[Exception], str]] = [
    (lambda: World(-1), RequestError, "seed is -1, expected a whole number from 0"),
    (lambda: World(2**32), RequestError, "seed"),
    (lambda: World(0, grid=8), RequestError, "grid is 8, expected"),
    (lambda: WORLD.identity(1.0), RequestError, "index is 1.0"),  # type: ignore[arg-type]
    (lambda: WORLD.identity(0, "test"), RequestError, "split is 'test', expected one of train, unseen"),
    (lambda: WORLD.scene(0, persons=4), RequestError, "persons is 4, expected a whole number from 1 to 3"),
    (lambda: WORLD.scene(0, persons=1, poses=[Pose(), Pose()]), RequestError, "persons says 1, poses says 2"),
    (lambda: WORLD.scene(0, identities=[]), RequestError, "identities says 0 persons"),
    (lambda: WORLD.scene(0, face=(0.5, 0.25)), RequestError, "between 1/16 and 2/3"),
    (lambda: WORLD.scene(0, face=0.5), RequestError, "face is 0.5"),  # type: ignore[arg-type]
    (lambda: WORLD.scene(0, persons=3, face=(0.4, 0.5)), RequestError, "3 heads .* do not fit side by side"),
    (lambda: WORLD.scene(0, layout="stacked"), RequestError, "layout is 'stacked', expected one of apart, overlap"),
    (lambda: WORLD.pose(0, 1.5), RequestError, "amount is 1.5"),
    (lambda: Pose(yaw=1.0), RequestError, "yaw of a pose is 1.0, expected a number from -0.55 to 0.55"),
    (lambda: Pose(mouth=float("nan")), RequestError, "mouth"),
    (lambda: Identity(("own",), np.full(len(FACTORS), 1.1)), RequestError, r"expected 27 in \[0, 1\]"),
    (lambda: WORLD.reference("alice"), RequestError, "expected an Identity"),  # type: ignore[arg-type]
    (lambda: landmarks(np.zeros((2, 5)), np.zeros((2, 9))), ShapeError, r"expected \(n, 27\) and \(n, 9\)"),
    (lambda: landmarks(np.zeros((2, 27)), np.zeros((3, 9))), ShapeError, r"poses \(3, 9\)"),
    (lambda: draw(WORLD.scene(0), 8), ShapeError, "size_px is 8, expected a whole number from 16 to 2048"),
    (lambda: face_masks(WORLD.scene(0), 4096), ShapeError, "size_px is 4096"),
    (lambda: draw(WORLD.scene(0), 32).shows("tail"), RequestError, "part is 'tail', expected one of background"),
    (lambda: dataclasses.replace(WORLD.scene(0), place="moon"), RequestError, "place is 'moon'"),
    (lambda: dataclasses.replace(WORLD.scene(0), actors=(SQUARE_OUTSIDE,)), BoxError, "leaves the grid of 64"),
    (lambda: dataclasses.replace(WORLD.scene(0), variations=(0.5,)), RequestError, "1 numbers, expected 12"),
    (lambda: id_crop(draw(WORLD.scene(0), 32), 5, 64), RequestError, "person is 5"),
    (lambda: id_crop(draw(WORLD.scene(0), 32), 0, 64, keep="all"), RequestError, "expected one of head, hull"),
    (lambda: id_crop(draw(WORLD.scene(0), 32), 0, 0), RequestError, "size_px is 0"),
    (lambda: Description.from_labels(9, (0,), (0,)), RequestError, "place is 9, expected class numbers from 0 to 7"),
    (lambda: Description(("red",) * 4, (None,) * 4, "park"), RequestError, "4 shirts"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "message"), WRONG, ids=[message for *_, message in WRONG])
def test_wrong_arguments_are_refused_in_words(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


# -- the command, and its cost ----------------------------------------------------------------------------------------


def test_the_sheet_is_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "new" / "sheet.png"
    assert main(["--sheet", str(path), "--size", "32", "--json"]) == 0
    values = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert values["path"] == str(path) and values["pictures"] > 50
    with Image.open(path) as image:
        assert image.format == "PNG" and min(image.size) > 8 * 32
        assert len(np.unique(np.asarray(image).reshape(-1, 3), axis=0)) > 500
    assert [file.name for file in path.parent.iterdir()] == ["sheet.png"]
    first = path.read_bytes()
    assert main(["--sheet", str(path), "--size", "32"]) == 0 and path.read_bytes() == first


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--sheet", "out.jpg"], "expected the name of a .png file"),
        (["--sheet", "out.png", "--size", "4"], "--size is 4, expected 16 to 512 px"),
        (["--sheet", "out.png", "--seed", "-3"], "seed is -3"),
    ],
)
def test_a_wrong_flag_ends_with_a_sentence(
    flags: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(flags) == 2
    assert message in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_batch_of_landmarks_costs_far_less_than_its_faces_one_by_one() -> None:
    factors = np.random.default_rng(0).random((128, len(FACTORS)))
    poses = np.zeros((128, len(POSE_LIMITS)))

    def seconds(call: Callable[[], object]) -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    together = min(seconds(lambda: landmarks(factors, poses)) for _ in range(3))
    alone = min(
        seconds(lambda: [landmarks(f[None], p[None]) for f, p in zip(factors, poses, strict=True)]) for _ in range(2)
    )
    assert alone / together > 3


def test_the_world_needs_no_torch() -> None:
    allowed = {"numpy", "cv2", "PIL", "realisid_trt", "__future__"} | set(sys.stdlib_module_names)
    for path in FOLDER.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                assert {name.name.partition(".")[0] for name in node.names} <= allowed, path.name
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                assert (node.module or "").partition(".")[0] in allowed, path.name
