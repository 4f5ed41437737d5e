"""DDIM as it was before there were other samplers: the same timesteps and coefficients, bit for bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from realisid_trt import Sampler
from realisid_trt.errors import RequestError
from realisid_trt.loop.samplers import NoiseSchedule, table_of
from tests.realisid_trt.schedulers import SCHEDULERS, SPACINGS, make, schedule_of, set_timesteps


def timesteps_before(schedule: NoiseSchedule, steps: int) -> NDArray[np.int64]:
    """Of version 0.5.0."""
    train = len(schedule.alphas_cumprod)
    timesteps: NDArray[Any]
    if schedule.timestep_spacing == "leading":
        timesteps = (np.arange(steps) * (train // steps))[::-1] + schedule.steps_offset
    elif schedule.timestep_spacing == "trailing":
        timesteps = np.round(np.arange(train, 0, -train / steps))[:steps] - 1
    else:
        timesteps = np.linspace(0, train - 1, steps).round()[::-1]
    return timesteps.astype(np.int64)


def coefficients_before(schedule: NoiseSchedule, steps: int) -> NDArray[np.float64]:
    """A and B of version 0.5.0."""
    timesteps = timesteps_before(schedule, steps)
    previous = timesteps - len(schedule.alphas_cumprod) // len(timesteps)
    a = schedule.alphas_cumprod[timesteps]
    a_prev = np.where(previous >= 0, schedule.alphas_cumprod[previous.clip(0)], schedule.final_alpha_cumprod)
    if schedule.prediction_type == "v_prediction":
        scale = np.sqrt(a * a_prev) + np.sqrt((1 - a) * (1 - a_prev))
        shift = np.sqrt(a * (1 - a_prev)) - np.sqrt(a_prev * (1 - a))
    else:
        scale = np.sqrt(a_prev / a)
        shift = np.sqrt(1 - a_prev) - scale * np.sqrt(1 - a)
    return np.stack([scale, shift], axis=1)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("to_one", [False, True])
def test_not_one_bit_differs(spacing: str, prediction: str, to_one: bool) -> None:
    schedule = schedule_of(spacing, prediction, wide=False, to_one=to_one)
    for steps in [*range(1, 130), 333, 500, 999]:
        table = table_of("ddim", schedule, steps)
        np.testing.assert_array_equal(table.timesteps, timesteps_before(schedule, steps))
        np.testing.assert_array_equal(table.matrix[:, 0, :2], coefficients_before(schedule, steps))
        assert table.histories == 0 and table.init == 1 and not table.draws.any()
        assert not table.matrix[:, 1:3].any() and not table.matrix[:, :, 2:].any()


def test_pure_noise_keeps_its_bits() -> None:
    """DDIM steps from ᾱ = 0 itself; samplers in σ take 2^-24 for it."""
    schedule = schedule_of("trailing", "v_prediction", wide=False, zero_snr=True)
    for steps in (1, 7, 30):
        table = table_of("ddim", schedule, steps)
        np.testing.assert_array_equal(table.matrix[:, 0, :2], coefficients_before(schedule, steps))
        assert table.levels[0] == 0 and table_of("euler", schedule, steps).levels[0] == pytest.approx(2**-24)


def test_thirty_steps_of_sdxl() -> None:
    timesteps = table_of("ddim", schedule_of("leading", "epsilon"), 30).timesteps
    assert list(timesteps[:2]) == [958, 925] and list(timesteps[-2:]) == [34, 1]


def test_a_last_alpha_of_one_is_diffusers_set_alpha_to_one() -> None:
    theirs = set_timesteps(make(SCHEDULERS["ddim"], set_alpha_to_one=True), 7)
    assert float(theirs.final_alpha_cumprod) == 1
    last = table_of("ddim", schedule_of("leading", "epsilon", to_one=True), 7).matrix[-1]
    np.testing.assert_allclose(last[0], last[3], rtol=1e-12)  # it leaves its prediction of the clean latents


def test_fresh_noise_of_none_is_the_default() -> None:
    schedule = schedule_of("leading", "epsilon")
    ours, given = table_of("ddim", schedule, 7), table_of(Sampler("ddim", eta=0), schedule, 7)
    np.testing.assert_array_equal(ours.matrix, given.matrix)


@pytest.mark.parametrize("steps", [0, -1, 1001, True, 4.0])
def test_impossible_numbers_of_steps(steps: Any) -> None:
    said = rf"^num_inference_steps is {steps}, expected 1 to 1000: the schedule has 1000 timesteps\.$"
    with pytest.raises(RequestError, match=said):
        table_of("ddim", schedule_of("leading", "epsilon"), steps)


def test_a_first_timestep_beyond_the_schedule() -> None:
    said = (
        "num_inference_steps is 1000; with steps_offset 1 the first timestep would be 1000, beyond the schedule's 1000"
    )
    with pytest.raises(RequestError, match=said):
        table_of("ddim", schedule_of("leading", "epsilon"), 1000)


def test_trailing_has_as_many_timesteps_as_steps() -> None:
    """diffusers gives one more, −1, for 62 numbers of steps."""
    odd, schedule = 0, schedule_of("trailing", "epsilon")
    scheduler = make(SCHEDULERS["ddim"], timestep_spacing="trailing")
    for steps in range(1, 1001):
        theirs = set_timesteps(scheduler, steps).timesteps
        table = table_of("ddim", schedule, steps)
        assert len(table.timesteps) == steps and table.timesteps.min() >= 0 and len(table.matrix) == steps
        assert table.timesteps.tolist() == theirs[:steps].tolist()
        odd += len(theirs) != steps
    assert odd == 62
