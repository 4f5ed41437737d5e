"""The noise of a seed and of its steps: golden numbers, and the same noise however a picture is made."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

from realisid_trt.errors import RealisIDWarning
from realisid_trt.loop import noise
from realisid_trt.loop.noise import initial_noise, step_noise
from realisid_trt.loop.samplers import NAMES, table_of
from tests.realisid_trt.schedulers import schedule_of

SHAPE = (4, 8, 8)
PLACES = [0, 1, 2, 100, -1]
GOLDEN = [-0.5023735761642456, 0.5068453550338745, 2.019348621368408, -1.6783469915390015, -0.5514437556266785]
GOLDEN_ROWS = {
    (7, 0): [1.086013913154602, -0.08482304960489273, 1.3050493001937866, -0.7685989737510681, -1.0110836029052734],
    (7, 29): [1.3908323049545288, 1.2710565328598022, 1.7746587991714478, 0.35430657863616943, -0.3172060251235962],
    (2**31, 1): [0.8459712862968445, 0.4924747347831726, -0.5913962721824646, 0.7343426942825317, 0.05730949342250824],
}


def test_initial_noise_is_the_same_everywhere() -> None:
    """Golden values: other noise would change every picture of every user."""
    found = initial_noise(7, SHAPE)
    assert found.dtype == np.float32 and found.shape == SHAPE
    np.testing.assert_array_equal(found.ravel()[PLACES], np.array(GOLDEN, np.float32))
    assert abs(float(initial_noise(0, (4, 128, 128)).std()) - 1) < 0.01


@pytest.mark.parametrize("seed, row", GOLDEN_ROWS)
def test_step_noise_is_the_same_everywhere(seed: int, row: int) -> None:
    found = step_noise(seed, row, SHAPE)
    assert found.dtype == np.float32 and found.shape == SHAPE
    np.testing.assert_array_equal(found.ravel()[PLACES], np.array(GOLDEN_ROWS[seed, row], np.float32))


def test_a_row_has_the_words_of_its_own_part_of_the_counter() -> None:
    """Philox's words are promised for ever: row r begins (1 + r)·2^128 draws after the initial noise, same key."""
    words = np.random.Philox(7).state["state"]
    key, counter = words["key"], words["counter"].copy()
    counter[2] += np.uint64(1 + 4)
    expected = np.random.Generator(np.random.Philox(key=key, counter=counter)).standard_normal(SHAPE, dtype=np.float32)
    np.testing.assert_array_equal(step_noise(7, 4, SHAPE), expected)


def test_no_two_rows_have_noise_in_common() -> None:
    """64 streams of 4096 numbers: correlations are those of chance, 5 standard errors of 2016 pairs at most."""
    streams = [
        initial_noise(7, (4096,)),
        *(step_noise(7, row, (4096,)) for row in range(62)),
        initial_noise(8, (4096,)),
    ]
    correlations = np.corrcoef(streams) - np.eye(64)
    assert np.abs(correlations).max() < 5 / np.sqrt(4096)


@pytest.mark.parametrize("name", NAMES)
def test_a_late_start_uses_the_same_noise(name: str) -> None:
    """A row of a table has its noise from its number in the whole schedule. Of batches: test_steps.py."""
    schedule = schedule_of("leading", "v_prediction")
    whole, late = table_of(name, schedule, 7), table_of(name, schedule, 7, start=3)
    assert {int(row) for row in late.row_of} == {int(row) for row in whole.row_of[whole.step_of >= 3]}
    for row, timestep in zip(late.row_of, late.timesteps, strict=True):
        assert timestep == whole.timesteps[row]


def test_a_numpy_that_draws_other_numbers_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(noise, "NOISE_SHA256", "0" * 64)
    noise._check_noise.cache_clear()
    with pytest.warns(RealisIDWarning, match="draws other normal numbers than earlier ones"):
        initial_noise(0, (1,))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step_noise(0, 0, (1,))  # once
    noise._check_noise.cache_clear()
    with pytest.warns(RealisIDWarning, match="draws other normal numbers than earlier ones"):
        step_noise(0, 0, (1,))
    monkeypatch.undo()
    noise._check_noise.cache_clear()
