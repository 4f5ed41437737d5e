"""The command that makes examples: impossible numbers are refused before any example is made."""

from __future__ import annotations

from pathlib import Path

import pytest

from training.prepare import main
from training.store import Store

SCENES, FACES = ["scenes", "--pictures", "2"], ["faces", "--pairs", "2"]
PICTURES = ["pictures", "--folder", "PHOTOS", "--face-models", "FACES"]
WRONG = [
    (["scenes", "--pictures", "0"], "pictures is 0, expected at least 1."),
    (["scenes", "--pictures", "-3"], "pictures is -3"),
    ([*SCENES, "--grid-px", "0"], "grid_px is 0, expected at least 1."),
    ([*SCENES, "--size-px", "0"], "grid is 0, expected a whole number of cells from 16 to 256."),
    ([*SCENES, "--size-px", "8192", "--grid-px", "64"], "size_px is 8192"),
    ([*SCENES, "--first", "-1"], "first is -1"),
    ([*SCENES, "--seed", "-1"], "seed is -1"),
    ([*SCENES, "--persons", "4"], "persons is 4, expected a whole number from 1 to 3"),
    ([*SCENES, "--persons", "1", "0"], "persons is 0, expected a whole number from 1 to 3"),
    ([*SCENES, "--crop-px", "-1"], "crop_px is -1"),
    ([*SCENES, "--margin", "nan"], "margin is nan, expected at least 0.5."),
    ([*SCENES, "--face", "1/2", "1/8"], "between 1/16 and 2/3"),
    ([*SCENES, "--face", "nan", "1/2"], "between 1/16 and 2/3"),
    (["faces", "--pairs", "0"], "pairs is 0"),
    ([*FACES, "--views", "0"], "views is 0"),
    ([*FACES, "--grid-px", "0"], "grid_px is 0"),
    ([*FACES, "--photo-px", "-1"], "photo_px is -1"),
    ([*FACES, "--scene-margin", "inf"], "scene_margin is inf"),
    ([*PICTURES, "--size-px", "0"], "size_px is 0"),
    ([*PICTURES, "--crop-px", "0"], "crop_px is 0"),
    ([*PICTURES, "--least-px", "-1"], "least_px is -1"),
    ([*PICTURES, "--least-face", "nan"], "least_face is nan"),
]


@pytest.mark.parametrize(("flags", "message"), WRONG, ids=[" ".join(flags) for flags, _ in WRONG])
def test_wrong_numbers_are_refused_in_words(
    flags: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*flags, "--out", str(tmp_path / "store")]) == 2
    assert message in capsys.readouterr().err
    assert not [file for file in tmp_path.iterdir() if file.suffix != ".lock"]


@pytest.mark.parametrize("face", ["1/0", "1/x", "half"])
def test_a_fraction_that_is_none_is_bad_usage(face: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*SCENES, "--face", face, "1/2", "--out", "nowhere"])
    assert ended.value.code == 2
    assert f"argument --face: {face!r} is neither a number nor a fraction such as 1/8" in capsys.readouterr().err


def test_the_numbers_of_persons_come_in_turn(tmp_path: Path) -> None:
    assert main(["scenes", "--pictures", "5", "--persons", "1", "3", "2", "--out", str(tmp_path / "store")]) == 0
    store = Store(tmp_path / "store")
    assert store["num_persons"].tolist() == [1, 3, 2, 1, 3] and store["boxes"].shape == (5, 3, 4)
    sides = store["boxes"][..., 2] - store["boxes"][..., 0]
    assert ((sides > 0).sum(1) == store["num_persons"]).all()
