"""The row rule: the fewest rows, and the right ones."""

import itertools

import numpy as np
import pytest

from realisid_trt.loop.rows import FULL, NONE, TEXT, PictureRows, guidance_weights, phases, plan_rows, steps_without_id


@pytest.mark.parametrize(
    ("ratio", "steps"), [(0.5, 16), (0.6, 13), (0.7, 10), (0.75, 8), (0.8, 6), (0.9, 3), (1.0, 1), (None, 0), (0.0, 30)]
)
def test_steps_without_id_of_thirty(ratio: float | None, steps: int) -> None:
    assert steps_without_id(30, ratio) == steps


def test_weights_sum_to_one_and_are_equation_8() -> None:
    assert guidance_weights(7.5, 5.0, True) == (-6.5, 2.5, 5.0)
    assert guidance_weights(7.5, 5.0, False) == (-6.5, 7.5, 0.0)
    for lambda_t, lambda_i in itertools.product((0.0, 1.0, 3.3), (0.0, 1.0, 4.7)):
        assert sum(guidance_weights(lambda_t, lambda_i, True)) == pytest.approx(1)


def picture(persons: int, with_id: bool = True, lambda_t: float = 7.5, lambda_i: float = 5.0) -> PictureRows:
    return PictureRows((0, 1), tuple(range(persons)), guidance_weights(lambda_t, lambda_i, with_id and persons > 0))


@pytest.mark.parametrize("persons", [1, 2, 3, 4])
def test_row_counts_are_the_table_of_the_design(persons: int) -> None:
    def counts(with_id: bool, per_row: bool) -> tuple[int, int, int]:
        plan = plan_rows([picture(persons, with_id)], per_row)
        assert plan.local_branch.rows == plan.global_branch.rows
        return len(plan.encoder), len(plan.decoder), len(plan.local_branch.rows)

    assert counts(True, False) == (2, 3, 2 * persons)
    assert counts(False, False) == (2, 2, persons)
    assert counts(True, True) == (2, 3, 3 * persons)
    assert counts(False, True) == (2, 2, 2 * persons)
    assert len(plan_rows([picture(persons)], False, share=False).encoder) == 3
    assert len(plan_rows([picture(persons)], False, share=False).local_branch.rows) == 3 * persons


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
    plan = plan_rows([picture(1, with_id, lambda_t, lambda_i)], False)
    assert [row.kind for row in plan.decoder] == kinds
    assert [plan.decoder_of[0, kind] >= 0 for kind in (NONE, TEXT, FULL)] == [
        kind in kinds for kind in (NONE, TEXT, FULL)
    ]


def test_nobody_means_no_branch() -> None:
    plan = plan_rows([picture(0)], False)
    assert not plan.local_branch.rows and [row.kind for row in plan.decoder] == [NONE, TEXT]
    assert plan.local_branch.of.shape == plan.global_branch.of.shape == (2, 0)


def test_equal_texts_share_an_encoder_row() -> None:
    plan = plan_rows([PictureRows((0, 0), (0,), (-6.5, 2.5, 5.0))], False)
    assert len(plan.encoder) == 1 and list(plan.encoder_of) == [0, 0, 0]


def test_every_decoder_row_reads_its_own() -> None:
    """Over random batches: rows of the right picture, text, person and ID; no row twice; none unused."""
    rng = np.random.default_rng(1)
    for _ in range(300):
        pictures, first = [], 0
        for _ in range(rng.integers(1, 5)):
            count = int(rng.integers(0, 5))
            weights = guidance_weights(*rng.choice([0.0, 1.0, 5.0, 7.5], 2), bool(count and rng.integers(2)))
            texts = (int(rng.integers(3)), int(rng.integers(3)))
            branches = bool(rng.integers(3)), bool(rng.integers(3))
            pictures.append(PictureRows(texts, tuple(range(first, first + count)), weights, branches))
            first += count
        per_row = bool(rng.integers(2))
        for share in (True, False):
            plan = plan_rows(pictures, per_row, share)
            for r, row in enumerate(plan.decoder):
                source = pictures[row.picture]
                assert plan.decoder_of[row.picture, row.kind] == r
                assert source.weights[row.kind] != 0 or not share
                assert row.text == source.texts[row.kind != NONE]
                encoder = plan.encoder[plan.encoder_of[r]]
                assert (encoder.picture, encoder.text) == (row.picture, row.text)
                for branch, evaluated in zip((plan.local_branch, plan.global_branch), source.branches, strict=True):
                    rows = [branch.rows[i] for i in branch.of[r] if i >= 0]
                    assert [b.person for b in rows] == (list(source.persons) if evaluated or not share else [])
                    assert all(b.picture == row.picture and b.with_id == (row.kind == FULL) for b in rows)
                    assert all(b.pooled_text == (row.text if per_row else None) for b in rows)
            assert set(plan.encoder_of) == set(range(len(plan.encoder)))
            assert len(set(plan.encoder)) == len(plan.encoder) or not share
            for branch in (plan.local_branch, plan.global_branch):
                assert len(set(branch.rows)) == len(branch.rows) or not share
                assert set(branch.of.ravel()) - {-1} == set(range(len(branch.rows)))


def test_phases_are_runs_of_one_plan() -> None:
    a, b = object(), object()
    assert phases([a, a, b, b, b]) == [range(0, 2), range(2, 5)]
    assert phases([a]) == [range(0, 1)]
