"""`inspect PHOTO`: the numbers of the faces are those of face=, and a sheet is drawn wherever there is a face."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from realisid_trt.commands.command_line import Outcome
from realisid_trt.commands.drawing import COLORS, with_persons
from realisid_trt.commands.inspect_engine import _face_encoder_line
from realisid_trt.commands.inspect_photo import found_in, inspect_photo
from realisid_trt.errors import PhotoError
from realisid_trt.persons.faces import FaceFinder
from realisid_trt.persons.faces.alignment import Alignment
from realisid_trt.persons.person import PlacedPerson
from realisid_trt.persons.photo import LoadedPhoto, load_photo
from tests.realisid_trt.faces.photographs import beside, enlarged, on_grey


def look(photo: LoadedPhoto, finder: FaceFinder, face: int | None = None) -> tuple[Outcome, Image.Image]:
    outcome, sheet = found_in(photo, "group.jpg", finder, face, 1.0, "realisid-v1")
    json.dumps(outcome.values)
    assert sheet.height == 512
    return outcome, sheet


def numbered(sheet: Image.Image, photo: LoadedPhoto, boxes: Any) -> bool:
    """Whether the left edge of every box is drawn in the colour of its number, where the sheet's scale puts it."""
    pixels = np.asarray(sheet).astype(int)
    scale = 512 / photo.size[0]
    for number, (x0, y0, _, y1) in enumerate(boxes):
        row, column = round((y0 + y1) / 2 * scale), round(x0 * scale)
        near = pixels[row, max(column - 1, 0) : column + 4]
        if np.abs(near - COLORS[number]).sum(axis=1).min() > 120:
            return False
    return True


def test_one_face(hopper: LoadedPhoto, finder: FaceFinder) -> None:
    outcome, sheet = look(hopper, finder)
    found = finder.find(hopper)
    assert outcome.status == 0 and outcome.values["faces"] == [list(found.box)]
    expected = {"box": found.box, "square": found.square, "keypoints": found.keypoints.tolist()}
    assert outcome.values["chosen"] == {**expected, "turns": 0, "score": found.score}
    assert outcome.values["mask_source"] == "hull+person" and sheet.width > 3 * 400  # photo, crop, drawing
    assert "group.jpg: 1 face; taken: the one at" in outcome.lines[0]
    assert [line for line in outcome.lines if line.startswith("note: background removed by mesh hull and person")]
    assert numbered(sheet, hopper, outcome.values["faces"])


def test_one_face_for_a_face_encoder(hopper: LoadedPhoto, finder: FaceFinder) -> None:
    """The aligned face stands where the crop would, background and all, and the five points are marked."""
    alignment = Alignment("arcface-112", 112, whole=True)
    outcome, sheet = found_in(hopper, "hopper.jpg", finder, None, 1.0, "realisid-v1", alignment)
    face = finder.find(hopper)
    assert outcome.values["mask_source"] == "aligned" and "notes" in outcome.values
    assert "aligned by its eyes, nose and mouth" in outcome.lines[0]
    np.testing.assert_allclose(outcome.values["chosen"]["keypoints"], face.keypoints)
    aligned = Image.fromarray(alignment(hopper, face)).resize((512, 512), Image.Resampling.LANCZOS)
    left = sheet.width - 2 * 512 - 8
    assert np.array_equal(np.asarray(sheet.crop((left, 0, left + 512, 512))), np.asarray(aligned))
    assert np.asarray(aligned)[:40, :40].mean() > 10  # no black background


@pytest.mark.parametrize("turned", [0, 1])
def test_group_gets_its_numbers_also_when_it_lies_on_its_side(
    turned: int, hopper: LoadedPhoto, astronaut: LoadedPhoto, finder: FaceFinder
) -> None:
    group = beside(hopper, astronaut, hopper)
    outcome, sheet = look(group.turned(turned), finder)
    assert outcome.status == 0 and outcome.values["chosen"] is None and "face=0…2" in outcome.values["why"]
    assert outcome.values["turns"] == -turned % 4
    boxes = [finder.find(group, face=index).box for index in range(3)]
    np.testing.assert_allclose(outcome.values["faces"], boxes)
    assert sheet.width == round(512 * 1536 / 600) and numbered(sheet, group, boxes)
    chosen, _ = look(group.turned(turned), finder, face=1)
    np.testing.assert_allclose(chosen.values["chosen"]["box"], boxes[1])


def test_large_photo_is_reported_in_its_own_pixels(hopper: LoadedPhoto, finder: FaceFinder) -> None:
    large = load_photo(enlarged(beside(hopper, hopper), 5))
    outcome, sheet = look(large, finder, face=1)
    assert outcome.values["photo_size"] == (3000, 5120) and outcome.values["chosen"]["box"][0] > 2560
    assert numbered(sheet, large, outcome.values["faces"])


@pytest.mark.parametrize(
    ("face", "code_words"), [(4, "face=4 was asked for"), (None, "pixels, at least 64 are needed")]
)
def test_faces_that_cannot_be_taken_are_shown_and_the_command_fails(
    face: int | None, code_words: str, hopper: LoadedPhoto, finder: FaceFinder
) -> None:
    photo = hopper if face else on_grey(hopper, 50 / 238)
    outcome, sheet = look(photo, finder, face)
    assert outcome.status == 1 and code_words in outcome.values["why"] and outcome.lines == [outcome.values["why"]]
    assert len(outcome.values["faces"]) == 1 and numbered(sheet, photo, outcome.values["faces"])


def test_without_faces_there_is_nothing_to_show(finder: FaceFinder) -> None:
    with pytest.raises(PhotoError, match="group.jpg: no face was found"):
        look(load_photo(np.full((300, 400, 3), 128, np.uint8)), finder)


def test_a_mistyped_photo_is_said_before_the_engine(tmp_path: Path) -> None:
    with pytest.raises(PhotoError, match="typo.jpg: no such file"):
        inspect_photo(str(tmp_path / "typo.jpg"), str(tmp_path / "no engine"))


def test_persons_keep_their_numbers_in_a_drawing() -> None:
    """A box, an anchor and neither: the number and the colour are the person's own, whoever has no box."""
    picture = Image.new("RGB", (320, 160))
    boxed, dotted = PlacedPerson((20, 20, 80, 80), None, ()), PlacedPerson(None, None, (), (200.0, 90.0))
    drawn = with_persons(picture, [dotted, PlacedPerson(None, None, ()), boxed])
    assert drawn.getpixel((200, 90)) == COLORS[0] and drawn.getpixel((20, 50)) == COLORS[2]
    assert {color for _, color in drawn.getcolors(100_000) or ()}.isdisjoint([COLORS[1]])
    alone = np.asarray(with_persons(picture, [PlacedPerson(None, None, ()), PlacedPerson(None, None, ()), boxed]))
    assert np.array_equal(np.asarray(drawn)[:, :100], alone[:, :100])  # numbered 3 in both
    first = np.asarray(with_persons(picture, [boxed]))
    assert ((first != 0).any(axis=2) != (alone != 0).any(axis=2)).any()  # another figure than 1
    assert not np.asarray(picture).any()


@pytest.mark.parametrize(
    ("norm", "points", "licence", "said"),
    [
        ("raw", "mtcnn", "MIT", "raw embeddings, aligned by MTCNN's five points, licence: MIT"),
        (
            "unit", "mtcnn-whole", None,
            "embeddings of length 1, aligned by MTCNN's five points, cut to whole px, licence: no licence was found: "
            "ask its publisher",
        ),
    ],
)  # fmt: skip
def test_the_face_encoder_of_an_engine(norm: str, points: str, licence: str | None, said: str) -> None:
    encoder = {"name": "ir_se50", "colour": "bgr", "norm": norm, "points": points, "licence": licence}
    assert _face_encoder_line(encoder) == f"face encoder ir_se50: colours bgr, {said}"
