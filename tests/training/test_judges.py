"""The judges, with their weights: on true renders of people and scenes that no training saw, they are right."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

import training.judges
from training.evaluation.cases import FIRST_SCENE, Case, Casting
from training.evaluation.measures import Judgement, Judges, face_crop
from training.world import draw

CASTING = Casting()
WEIGHTS = Path(training.judges.__file__).parent / "weights"


@pytest.fixture(scope="module")
def judges() -> Judges:
    return Judges(WEIGHTS, CASTING)


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    """Regular and small faces, one to three people, apart and overlapping."""
    found = [CASTING.case(7_000_000 + number, (number,), None, (1 / 4, 1 / 2)) for number in range(20)]
    found += [CASTING.case(7_000_100 + number, (number,), None, (1 / 7, 1 / 6)) for number in range(20)]
    for persons, layout in ((2, "apart"), (3, "apart"), (2, "overlap")):
        found += CASTING.groups(persons, 8, (1 / 6, 1 / 5), layout, 40)
    return found


def pictures(cases: list[Case]) -> NDArray[np.uint8]:
    return np.stack([case.picture.rgb for case in cases])


@pytest.fixture(scope="module")
def told(judges: Judges, cases: list[Case]) -> Judgement:
    return judges.judge(cases, pictures(cases))


def mean(told: Judgement, measure: str, persons: int = 40) -> float:
    """The mean over the cases with one person, which come first."""
    return float(np.nanmean(told.values[measure][:persons]))


def test_the_recogniser_knows_everybody(told: Judgement) -> None:
    assert mean(told, "rank1") >= 0.97 and float(told.values["rank1"].mean()) >= 0.9
    assert mean(told, "similarity") > 0.85


def test_the_recogniser_tells_siblings_apart(judges: Judges) -> None:
    """Same skin, hair and beard: the person is nearer to their own gallery than their sibling is."""
    right = []
    for number in range(24):
        person = CASTING.world.identity(number, "unseen")
        own = judges._gallery(number)
        likeness = []
        for who in (person, CASTING.world.sibling(person, 0)):
            scene = CASTING.world.scene(
                FIRST_SCENE + 20_000_000 + number, face=(1 / 3, 1 / 2), identities=[who],
                caption="a person in a white shirt in a studio",
            )  # fmt: skip
            picture = draw(scene, CASTING.size_px)
            likeness.append(float(own @ judges._embed(face_crop(picture.rgb, picture.boxes[0])[None])[0]))
        right.append(likeness[0] > likeness[1])
    assert np.mean(right) >= 0.9


def test_the_detector_finds_faces_to_a_pixel(told: Judgement) -> None:
    assert float(told.values["iou"].mean()) >= 0.9


def test_a_face_that_is_not_there_is_not_found(judges: Judges, cases: list[Case]) -> None:
    """A face is painted over with its surroundings: few such pictures show a face at its place."""
    from training.judges.nets import overlap

    hits = []
    for case in cases[:20]:
        rgb = case.picture.rgb.copy()
        x0, y0, x1, y1 = (int(value) for value in case.picture.boxes[0])
        rgb[max(0, y0 - (y1 - y0)) : y1, max(0, x0 - 6) : x1 + 6] = rgb[4, 4]
        found = judges.detector.boxes(judges._tensor(rgb[None]))[0]
        hits.append(max((overlap((x0, y0, x1, y1), box[1:]) for box in found), default=0.0) > 0.5)
    assert np.mean(hits) <= 0.2


def test_landmarks_mouths_and_brows_are_read(told: Judgement) -> None:
    """Errors are divided by the face's side; a mouth opens by up to a fifth of it."""
    assert mean(told, "landmarks") < 0.035
    assert mean(told, "mouth") < 0.03 and mean(told, "brow") < 0.03


def test_the_classifier_reads_what_captions_say(told: Judgement) -> None:
    assert mean(told, "place") >= 0.95 and mean(told, "text") >= 0.85


def test_somebody_elses_face_is_not_taken_for_ones_own(judges: Judges, cases: list[Case]) -> None:
    """Each case gets the next case's picture: no person is the right one at the right place."""
    wrong = judges.judge(cases[:20], np.roll(pictures(cases[:20]), 1, axis=0))
    assert float(wrong.values["rank1"].mean()) < 0.35 and float(wrong.values["iou"].mean()) < 0.7
