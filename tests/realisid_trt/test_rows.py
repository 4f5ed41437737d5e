"""The row rule: the fewest rows, and the right ones."""

import itertools
from typing import Any

import numpy as np
import pytest

from realisid_trt.branches import Branch
from realisid_trt.config import RealisIDConfig
from realisid_trt.loop.rows import (
    FULL,
    NONE,
    TEXT,
    PictureRows,
    RowPlan,
    Tokens,
    guidance_weights,
    in_window,
    plan_rows,
    steps_without_id,
)

ZEROS = RealisIDConfig(branch_pooled_text="zeros").table
PER_ROW = RealisIDConfig(branch_pooled_text="per_row").table
IDPATCH = RealisIDConfig.from_dict({"method": "idpatch"}).table


def branch(name: str = "openpose", **values: Any) -> Branch:
    given = {"name": name, "condition": "image", "tokens": "text", "pooled": "per_row", **values}
    return Branch.from_dict(given, "realisid-v1", "a test")


TABLES = {
    "realisid": ZEROS,
    "realisid per row": PER_ROW,
    "openpose": (branch(),),
    "openpose, depth": (branch(), branch("depth")),
    "realisid, openpose": (*ZEROS, branch()),
    "mediapipe": (branch("face", condition="pose", style="mediapipe-face"),),
    "idpatch": IDPATCH,
    "idpatch, openpose": (*IDPATCH, branch()),
    "boxed text of each person": (
        branch("body", condition="pose", per="person", writes="box"),
        branch("place", condition="location", pooled="zeros"),
    ),
}


@pytest.mark.parametrize(
    ("ratio", "steps"), [(0.5, 16), (0.6, 13), (0.7, 10), (0.75, 8), (0.8, 6), (0.9, 3), (1.0, 1), (None, 0), (0.0, 30)]
)
def test_steps_without_id_of_thirty(ratio: float | None, steps: int) -> None:
    assert steps_without_id(30, ratio) == steps


def test_the_rules_of_a_delay_for_all_steps_and_hundredths() -> None:
    """FastComposer: `i <= (1 - α) * S` is without ID. ID-Patch: `i < S * (1 - α)` is. They differ in 407 pairs."""
    pairs = list(itertools.product(range(1, 101), (share / 100 for share in range(101))))
    for steps, ratio in pairs:
        inclusive = [i for i in range(steps) if i <= (1 - ratio) * steps]
        exclusive = [i for i in range(steps) if i < steps * (1 - ratio)]
        assert steps_without_id(steps, ratio) == len(inclusive)
        assert steps_without_id(steps, ratio, "exclusive") == len(exclusive)
    differing = [pair for pair in pairs if steps_without_id(*pair) != steps_without_id(*pair, "exclusive")]
    assert len(differing) == 407 and not any(ratio == 0.8 and 20 <= steps <= 50 for steps, ratio in differing)
    assert steps_without_id(30, None, "exclusive") == 0


def test_weights_sum_to_one_and_are_equation_8() -> None:
    assert guidance_weights(7.5, 5.0, True) == (-6.5, 2.5, 5.0)
    assert guidance_weights(7.5, 5.0, False) == (-6.5, 7.5, 0.0)
    for lambda_t, lambda_i in itertools.product((0.0, 1.0, 3.3), (0.0, 1.0, 4.7)):
        assert sum(guidance_weights(lambda_t, lambda_i, True)) == pytest.approx(1)


def test_a_window_is_that_of_diffusers() -> None:
    """diffusers: `1.0 - float(i / len(timesteps) < start or (i + 1) / len(timesteps) > end)`. Its halves are tried one
    by one for all steps up to 100 and all hundredths, then together at random."""
    shares = [share / 100 for share in range(101)]
    pairs = [(share, 1.0) for share in shares[:-1]] + [(0.0, share) for share in shares[1:]]
    pairs += [(float(min(pair)), float(max(pair))) for pair in np.random.default_rng(0).choice(shares, (100, 2))]
    for steps, (start, end) in itertools.product(range(1, 101), pairs):
        kept = [1.0 - float(i / steps < start or (i + 1) / steps > end) for i in range(steps)]
        assert [float(in_window(i, steps, start, end)) for i in range(steps)] == kept


def picture(
    persons: int, with_id: bool = True, lambda_t: float = 7.5, lambda_i: float = 5.0, branches: int = 2
) -> PictureRows:
    weights = guidance_weights(lambda_t, lambda_i, with_id and persons > 0)
    return PictureRows((0, 1), tuple(range(persons)), weights, (True,) * branches)


def counts(plan: RowPlan) -> tuple[int, ...]:
    return len(plan.encoder), len(plan.decoder), *(len(rows.rows) for rows in plan.branches)


@pytest.mark.parametrize("persons", [1, 2, 3, 4])
def test_row_counts_are_the_table_of_the_design(persons: int) -> None:
    n = persons
    assert counts(plan_rows([picture(n)], ZEROS)) == (2, 3, 2 * n, 2 * n)
    assert counts(plan_rows([picture(n, with_id=False)], ZEROS)) == (2, 2, n, n)
    assert counts(plan_rows([picture(n)], PER_ROW)) == (2, 3, 3 * n, 3 * n)
    assert counts(plan_rows([picture(n, with_id=False)], PER_ROW)) == (2, 2, 2 * n, 2 * n)
    assert counts(plan_rows([picture(n)], ZEROS, share=False)) == (3, 3, 3 * n, 3 * n)
    assert plan_rows([picture(n)], ZEROS).branches[0].rows == plan_rows([picture(n)], ZEROS).branches[1].rows


@pytest.mark.parametrize("persons", [0, 1, 2, 3])
def test_a_branch_that_reads_text_has_a_row_for_each_text(persons: int) -> None:
    """Text and full rows share it, and so do all persons; every image of a request has rows of its own."""
    ids = 2 * persons if persons else 0
    assert counts(plan_rows([picture(persons, branches=3)], TABLES["realisid, openpose"])) == (
        2, 3 if persons else 2, ids, ids, 2,
    )  # fmt: skip
    plan = plan_rows([picture(persons, branches=2)] * 4, TABLES["openpose, depth"])
    assert counts(plan)[2:] == (8, 8) and {row.subject for row in plan.branches[0].rows} == {0}
    zeros = (branch(pooled="zeros"),)  # none and text differ in what they read all the same
    assert counts(plan_rows([picture(persons, branches=1)], zeros))[2:] == (2,)
    assert counts(plan_rows([PictureRows((0, 0), (), (-6.5, 7.5, 0.0), (True,))], zeros))[2:] == (1,)


def test_an_inactive_branch_has_no_rows() -> None:
    rows = PictureRows((0, 1), (0, 1), (-6.5, 2.5, 5.0), (True, False, True))
    assert counts(plan_rows([rows], TABLES["realisid, openpose"])) == (2, 3, 4, 0, 2)


@pytest.mark.parametrize(
    ("lambda_t", "lambda_i", "with_id", "kinds"),
    [
        (7.5, 5.0, True, [NONE, TEXT, FULL]),
        (5.0, 5.0, True, [NONE, FULL]),  # λi = λt drops the text row …
        (5.0, 5.0, False, [NONE, TEXT]),  # … after the switch only
        (1.0, 5.0, True, [TEXT, FULL]),  # λt = 1 drops the none row
        (7.5, 0.0, True, [NONE, TEXT]),  # λi = 0 the full row
        (1.0, 1.0, True, [FULL]),
        (0.0, 0.0, True, [NONE]),
    ],
)
def test_a_row_without_weight_is_not_evaluated(
    lambda_t: float, lambda_i: float, with_id: bool, kinds: list[int]
) -> None:
    plan = plan_rows([picture(1, with_id, lambda_t, lambda_i)], ZEROS)
    assert [row.kind for row in plan.decoder] == kinds
    assert [plan.decoder_of[0, kind] >= 0 for kind in (NONE, TEXT, FULL)] == [
        kind in kinds for kind in (NONE, TEXT, FULL)
    ]


def test_nobody_means_no_branch() -> None:
    plan = plan_rows([picture(0)], ZEROS)
    assert counts(plan) == (2, 2, 0, 0) and [row.kind for row in plan.decoder] == [NONE, TEXT]
    assert all((rows.of == -1).all() and rows.of.shape == (2, 1) for rows in plan.branches)


def test_equal_texts_share_an_encoder_row() -> None:
    plan = plan_rows([PictureRows((0, 0), (0,), (-6.5, 2.5, 5.0), (True, True))], ZEROS)
    assert len(plan.encoder) == 1 and list(plan.encoder_of) == [0, 0, 0]


@pytest.mark.parametrize("persons", [1, 2, 3, 4, 6, 8])
def test_row_counts_of_id_patch(persons: int) -> None:
    """Two rows of everything for any number of persons, before and after the switch; three with λi ≠ λt."""
    subjects = tuple(range(persons))

    def plan(lambda_i: float | None, with_id: bool, absent: bool = False) -> RowPlan:
        weights = guidance_weights(5.5, lambda_i, with_id)
        return plan_rows([PictureRows((0, 1), subjects, weights, (True,), absent=absent)], IDPATCH, "text_and_id")

    before, after = plan(None, False, absent=True), plan(None, True)
    assert counts(before) == counts(after) == (2, 2, 2)
    assert counts(plan(3.0, True)) == (3, 3, 3)
    nobody, everybody = (0,) * persons, tuple(range(1, persons + 1))
    assert [row.tokens for row in before.decoder] == [Tokens(0), Tokens(1)]
    assert [row.tokens for row in after.decoder] == [Tokens(0, nobody), Tokens(1, everybody)]
    assert [row.tokens for row in plan(3.0, True).decoder][1] == Tokens(1, nobody)
    assert [row.tokens for row in after.branches[0].rows] == [row.tokens for row in after.encoder]
    assert [row.pooled_text for row in after.branches[0].rows] == [0, 1]


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
def test_every_decoder_row_reads_its_own(table: tuple[Branch, ...]) -> None:
    """Over random batches: rows of the right picture, subject and tokens; no row twice; none unused."""
    rng = np.random.default_rng(1)
    for _ in range(100):
        pictures, first = [], 0
        for request in range(int(rng.integers(1, 5))):
            count = int(rng.integers(0, 5))
            weights = guidance_weights(*rng.choice([0.0, 1.0, 5.0, 7.5], 2), bool(count and rng.integers(2)))
            texts = (int(rng.integers(3)), int(rng.integers(3)))
            active = tuple(bool(rng.integers(3)) for _ in table)
            persons = tuple(range(first, first + count))
            absent = bool(rng.integers(2)) and not weights[FULL]
            pictures += [PictureRows(texts, persons, weights, active, request, absent)] * int(rng.integers(1, 3))
            first += count
        unet_tokens = "text_and_id" if any(branch.tokens == "text_and_id" for branch in table) else "text"
        for share in (True, False):
            check_rows(plan_rows(pictures, table, unet_tokens, share), pictures, table, unet_tokens, share)


def ids_after_text(source: PictureRows, kind: int) -> tuple[int, ...]:
    """The IDs of a row that reads "text_and_id"."""
    if source.absent:
        return ()
    return tuple(person + 1 for person in source.persons) if kind == FULL else (0,) * len(source.persons)


def check_rows(
    plan: RowPlan, pictures: list[PictureRows], table: tuple[Branch, ...], unet_tokens: str, share: bool
) -> None:
    for r, row in enumerate(plan.decoder):
        source = pictures[row.picture]
        assert plan.decoder_of[row.picture, row.kind] == r
        assert source.weights[row.kind] != 0 or not share
        ids = ids_after_text(source, row.kind)
        assert row.text == source.texts[row.kind != NONE]
        assert row.tokens == Tokens(row.text, ids if unet_tokens == "text_and_id" else ())
        encoder = plan.encoder[plan.encoder_of[r]]
        assert (encoder.picture, encoder.tokens, encoder.text) == (row.picture, row.tokens, row.text)
        for each, rows, active in zip(table, plan.branches, source.active, strict=True):
            received = [rows.rows[i] for i in rows.of[r] if i >= 0]
            subjects = list(source.persons) if each.per == "person" else [source.request]
            assert [one.subject for one in received] == (subjects if active else [])
            for one in received:
                ids = (one.subject + 1 if row.kind == FULL else 0,)
                assert one.picture == row.picture
                assert (
                    one.tokens
                    == {
                        "id": Tokens(None, ids),
                        "text": Tokens(row.text),
                        "text_and_id": Tokens(row.text, ids_after_text(source, row.kind)),
                    }[each.tokens]
                )
                assert one.pooled_text == (row.text if each.pooled == "per_row" else None)
    assert set(plan.encoder_of) == set(range(len(plan.encoder)))
    assert len(set(plan.encoder)) == len(plan.encoder) or not share
    for rows in plan.branches:
        assert len(set(rows.rows)) == len(rows.rows) or not share
        assert set(rows.of.ravel()) - {-1} == set(range(len(rows.rows)))
