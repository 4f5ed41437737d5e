"""DDIM: diffusers' own timesteps and steps; the noise that every machine draws."""

import warnings

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

from realisid_trt.errors import RealisIDWarning, RequestError
from realisid_trt.loop import ddim
from realisid_trt.loop.ddim import DDIM, initial_noise


def both(**config: object) -> tuple[DDIMScheduler, DDIM]:
    config = {
        "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False,
        "set_alpha_to_one": False, "steps_offset": 1, "timestep_spacing": "leading", "prediction_type": "epsilon",
        **config,
    }  # fmt: skip
    theirs = DDIMScheduler(**config)
    theirs.alphas_cumprod = theirs.alphas_cumprod.double()
    theirs.final_alpha_cumprod = torch.as_tensor(theirs.final_alpha_cumprod).double()
    ours = DDIM(
        theirs.alphas_cumprod.numpy(),
        float(theirs.final_alpha_cumprod),
        str(config["timestep_spacing"]),
        int(str(config["steps_offset"])),
        str(config["prediction_type"]),
    )
    return theirs, ours


def test_thirty_steps_of_sdxl() -> None:
    timesteps = both()[1].timesteps(30)
    assert list(timesteps[:2]) == [958, 925] and list(timesteps[-2:]) == [34, 1]


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("to_one", [False, True])
@pytest.mark.parametrize("steps", [1, 4, 7, 30, 50])
def test_steps_are_those_of_diffusers(spacing: str, prediction: str, to_one: bool, steps: int) -> None:
    theirs, ours = both(timestep_spacing=spacing, prediction_type=prediction, set_alpha_to_one=to_one)
    theirs.set_timesteps(steps)
    assert theirs.timesteps.tolist() == ours.timesteps(steps).tolist()
    z = torch.randn(1, 4, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for (scale, shift), t in zip(ours.coefficients(steps), theirs.timesteps, strict=True):
        prediction_of_net = torch.sin(z * 3 + t)
        expected = theirs.step(prediction_of_net, t, z, eta=0.0).prev_sample
        torch.testing.assert_close(scale * z + shift * prediction_of_net, expected, rtol=1e-12, atol=1e-12)
        z = expected


@pytest.mark.parametrize("steps", [0, -1, 1000, 1001])
def test_impossible_numbers_of_steps(steps: int) -> None:
    with pytest.raises(RequestError, match="num_inference_steps is"):
        both()[1].timesteps(steps)


def test_initial_noise_is_the_same_everywhere() -> None:
    """Golden values: other noise would change every picture of every user."""
    noise = initial_noise(7, (4, 8, 8))
    assert noise.dtype == np.float32 and noise.shape == (4, 8, 8)
    golden = np.array(GOLDEN, np.float32)
    np.testing.assert_array_equal(noise.ravel()[[0, 1, 2, 100, -1]], golden)
    assert abs(float(initial_noise(0, (4, 128, 128)).std()) - 1) < 0.01


GOLDEN = [-0.5023735761642456, 0.5068453550338745, 2.019348621368408, -1.6783469915390015, -0.5514437556266785]


def test_trailing_has_as_many_timesteps_as_steps() -> None:
    """diffusers gives one more, −1, for 62 numbers of steps."""
    odd = 0
    for steps in range(1, 1001):
        theirs, ours = both(timestep_spacing="trailing")
        theirs.set_timesteps(steps)
        found = ours.timesteps(steps)
        assert len(found) == steps and found.min() >= 0 and len(ours.coefficients(steps)) == steps
        assert found.tolist() == theirs.timesteps[:steps].tolist()
        odd += len(theirs.timesteps) != steps
    assert odd == 62


def test_a_numpy_that_draws_other_numbers_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ddim, "NOISE_SHA256", "0" * 64)
    ddim._check_noise.cache_clear()
    with pytest.warns(RealisIDWarning, match="draws other normal numbers than earlier ones"):
        initial_noise(0, (1,))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        initial_noise(0, (1,))  # once
    monkeypatch.undo()
    ddim._check_noise.cache_clear()
