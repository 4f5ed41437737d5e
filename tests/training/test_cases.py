"""The cases of the evaluation, of every size, with their people and captions; and the pictures compared with them."""

from __future__ import annotations

from collections import Counter

import numpy as np

from training.evaluation.cases import SIZES, Casting, one_person_captions
from training.evaluation.experiments import EXPERIMENTS
from training.world import describe

CASTING = Casting()


def test_cases_are_what_is_asked_for() -> None:
    cases = CASTING.table("small", identities=2, count=12)
    assert len(cases) == 12 and [case.identities[0] for case in cases] == [0, 1] * 6
    assert len({case.seed for case in cases}) == 12 and len({case.scene.caption for case in cases}) == 7
    low, high = SIZES["small"]
    for case in cases:
        side = (case.picture.boxes[0, 2] - case.picture.boxes[0, 0]) / 128
        assert low - 1 / 32 <= side <= high + 1 / 32
        assert describe(case.scene.caption).hats == (None,)
        assert case.crops[0].shape == (64, 64, 3) and case.scene.actors[0].identity.name[0] == "unseen"
    assert len(set(one_person_captions(35))) == 35
    again = CASTING.table("small", identities=2, count=8)[7]
    assert np.array_equal(again.picture.rgb, cases[7].picture.rgb) and np.array_equal(again.crops[0], cases[7].crops[0])
    pair = CASTING.groups(2, 3, (1 / 5, 1 / 4), "overlap", 40)[0]
    boxes = pair.picture.boxes
    assert len(set(pair.identities)) == 2 and boxes[1, 0] < boxes[0, 2]


def test_every_person_meets_every_caption_equally_often() -> None:
    """In the full table, which is not drawn here: 40 people with 35 captions, twice each."""
    casting = Casting()
    object.__setattr__(casting, "case", lambda number, who, caption, face: (*who, caption))
    met = Counter(casting.table("regular", 40, 2800))
    assert len(met) == 40 * 35 and set(met.values()) == {2}
    some = Counter(caption for _, caption in casting.table("regular", 40, 400))
    assert len(some) == 35


def test_guidance_is_chosen_on_people_whom_no_table_judges() -> None:
    casting = Casting()
    object.__setattr__(casting, "case", lambda number, who, *more: (number, *who))
    told = [dict.fromkeys(EXPERIMENTS[name].cases(casting, 400)) for name in ("guidance", *EXPERIMENTS)]
    chosen, *tables = [
        ({number for number, *_ in cases}, {who for _, *people in cases for who in people}) for cases in told
    ]
    others = [cases for name, cases in zip(EXPERIMENTS, tables, strict=True) if name != "guidance"]
    assert len(chosen[0]) == 400 and chosen[1] == set(range(100, 140))
    judged = set(range(40)), set(range(200, 240))  # all tables but those of other people; then those
    assert all(not chosen[0] & numbers and any(people <= some for some in judged) for numbers, people in others)
    by_name = dict(zip(EXPERIMENTS, tables, strict=True))
    for persons in (1, 3):
        (numbers, people), (more, others_people) = (by_name[f"persons-{persons}-{of}"] for of in ("apart", "others"))
        assert len(numbers | more) == 800 and people == judged[0] and others_people == judged[1]


def test_the_like_and_the_unlike_of_a_case() -> None:
    case = CASTING.case(5, (3, 7), None, (1 / 5, 1 / 4))
    again, other = CASTING.retake(case), CASTING.somebody_else(case)
    assert len(again.boxes) == 2 and not np.array_equal(again.rgb, case.picture.rgb)
    assert np.array_equal(other.boxes, case.picture.boxes)
    assert np.abs(other.landmarks - case.picture.landmarks).mean() > 0.02
    assert not np.array_equal(other.color("neck", 0), case.picture.color("neck", 0))
