"""Samplers by name: what a table has, and what is refused in which words."""

from __future__ import annotations

import dataclasses
import json
import pickle
from typing import Any

import numpy as np
import pytest
import torch

import realisid_trt
from realisid_trt import Sampler
from realisid_trt.errors import RequestError
from realisid_trt.loop.samplers import NAMES, table_of
from tests.realisid_trt.schedulers import PREDICTIONS, schedule_of

TWO_ROWS = ("heun", "heun-karras", "dpmpp-sde", "dpmpp-sde-karras")
DRAWING = ("euler-a", "dpmpp-2m-sde", "dpmpp-2m-sde-karras", "dpmpp-sde", "dpmpp-sde-karras", "lcm", "tcd")


def test_the_names() -> None:
    assert NAMES == (
        "ddim", "euler", "euler-a", "heun", "dpmpp-2m", "dpmpp-2m-sde", "dpmpp-sde", "unipc", "lcm", "tcd",
        "euler-karras", "heun-karras", "dpmpp-2m-karras", "dpmpp-2m-sde-karras", "dpmpp-sde-karras", "unipc-karras",
    )  # fmt: skip
    documented = " ".join((Sampler.__doc__ or "").split())
    assert all(f" {name}" in documented for name in NAMES) and "Sampler" in realisid_trt.__all__


@pytest.mark.parametrize("name", NAMES)
def test_a_table_is_what_it_says(name: str) -> None:
    schedule, steps, start = schedule_of("trailing", "v_prediction"), 7, 2
    table, late = table_of(name, schedule, steps), table_of(name, schedule, steps, start)
    twice = name in TWO_ROWS
    for found, first in ((table, 0), (late, start)):
        rows = 2 * (steps - first) - 1 if twice else steps - first
        assert found.matrix.shape == (rows, 4, 5) and found.matrix.dtype == np.float64
        assert found.timesteps.shape == (rows,) and found.levels.shape == (rows + 1,) and found.blend.shape == (rows, 2)
        expected = [first + row // 2 for row in range(rows)] if twice else list(range(first, steps))
        assert found.step_of.tolist() == expected
        assert found.row_of.tolist() == list(range(2 * first if twice else first, (2 * steps - 1) if twice else steps))
        # K histories, and nothing that the kernel would read beside them
        used = found.histories
        assert used == {"ddim": 0, "euler": 0, "euler-a": 0, "lcm": 0, "tcd": 0, "unipc": 2}.get(
            name.removesuffix("-karras"), 1
        )
        assert not found.matrix[:, 1 + used : 3].any() and not found.matrix[:, :, 2 + used : 4].any()
        assert not found.matrix[:, 1:, 4].any() and not found.matrix[:, 3, 2:].any()
        assert not found.matrix[0, :3, 2:4].any() and not found.matrix[-1, 1:3].any()
        assert found.draws[:-1].any() == (name in DRAWING) and not found.draws[-1]
        assert (np.diff(found.levels) > 0).all() or twice
        assert found.levels[-1] == (schedule.alphas_cumprod[0] if name in ("ddim", "tcd") else 1)
        np.testing.assert_allclose((found.blend**2).sum(axis=1), 1, rtol=1e-12)
        assert found.blend[-1].tolist() == [1, 0]


@pytest.mark.parametrize("name", NAMES)
def test_pictures_start_from_the_noise_that_diffusers_starts_from(name: str) -> None:
    """z = x/√(1 + σ²) of init_noise_sigma: s of the first level for Euler and Heun without "leading", else 1."""
    in_sigmas = name.removesuffix("-karras") in ("euler", "euler-a", "heun", "dpmpp-sde")
    for spacing in ("leading", "trailing", "linspace"):
        table = table_of(name, schedule_of(spacing, "epsilon"), 7)
        expected = np.sqrt(1 - table.levels[0]) if in_sigmas and spacing != "leading" else 1
        assert table.init == pytest.approx(expected, rel=1e-14)


def test_a_sampler_is_said_in_three_ways() -> None:
    schedule = schedule_of("leading", "epsilon")
    given = {"name": "euler", "spacing": "trailing"}
    said = Sampler("euler", spacing="trailing")
    assert Sampler.of(given) == said == Sampler.of(said) and Sampler.of("euler") == Sampler("euler") != said
    tables = [table_of(each, schedule, 4) for each in (given, said)]
    np.testing.assert_array_equal(tables[0].matrix, tables[1].matrix)
    assert tables[0].timesteps.tolist() == [999, 749, 499, 249] != table_of("euler", schedule, 4).timesteps.tolist()


def test_numbers_of_every_library() -> None:
    """A Sampler holds plain numbers: it can be hashed, compared, pickled and written as JSON."""
    plain = Sampler("lcm", timesteps=(999, 499))
    for timesteps in ([999, 499], np.array([999, 499]), torch.tensor([999, 499]), (np.int64(999), np.float32(499))):
        found = Sampler("lcm", timesteps=timesteps)
        assert found == plain and hash(found) == hash(plain) and pickle.loads(pickle.dumps(found)) == plain
    assert json.loads(json.dumps(dataclasses.asdict(plain)))["timesteps"] == [999, 499]
    assert type(Sampler("ddim", eta=np.float32(0.5)).eta) is float
    assert type(Sampler("tcd", original_inference_steps=np.int32(40)).original_inference_steps) is int


ALL = ", ".join(NAMES)
NAMED = f"a name, a Sampler, or a dict with a name. Names: {ALL}."
LISTS = "euler, euler-a, heun, dpmpp-2m, dpmpp-2m-sde, dpmpp-sde, unipc"

# what is given → all that is said
IMPOSSIBLE: dict[str, tuple[Any, str]] = {
    "unknown": ("dpm", f"sampler is 'dpm', expected one of {ALL}."),
    "no name": ({"eta": 0.5}, f"sampler is {{'eta': 0.5}}, expected {NAMED}"),
    "None": (None, f"sampler is None, expected {NAMED}"),
    "number": ({"name": 5}, f"sampler is 5, expected one of {ALL}."),
    "list": ({"name": ["ddim"]}, f"sampler is ['ddim'], expected one of {ALL}."),
    "Karras of DDIM": ("ddim-karras", f"ddim has no Karras noise levels. Write 'ddim', or take one of {ALL}."),
    "third order": (
        "dpmpp-3m-sde-karras",
        "dpmpp-3m-sde is not offered: diffusers, which samplers here are compared with, has a coefficient of it with "
        f"the wrong sign. Take one of {ALL}.",
    ),
    "many histories": (
        "lms",
        "lms is not offered: it keeps three or more past predictions, and a step here keeps two; dpmpp-2m does with "
        f"one. Take one of {ALL}.",
    ),
    "adaptive": (
        "dpm-adaptive",
        "dpm-adaptive is not offered: the number of its steps depends on the picture, and steps here are planned "
        f"before the first. Take one of {ALL}.",
    ),
    "clipping": (
        {"name": "ddim", "clip_sample": True},
        "sampler: clip_sample is not offered: a step is linear in the prediction and cannot clip it. Leave it out.",
    ),
    "thresholding": (
        {"name": "ddim", "thresholding": True},
        "sampler: thresholding is not offered: a step is linear in the prediction and cannot clip it. Leave it out.",
    ),
    "churn": (
        {"name": "euler", "s_churn": 1},
        "sampler: s_churn is not offered: noise is added to the latents after a step, and not to what the network "
        "reads. Leave it out.",
    ),
    "key": (
        {"name": "euler", "sigmas": [1, 0]},
        "sampler: unknown key 'sigmas'. Known keys: name, spacing, eta, timesteps, original_inference_steps.",
    ),
    "eta of heun": (
        {"name": "heun", "eta": 0.5},
        "heun has no eta; it has spacing, timesteps. Leave it out, or take a sampler that has it: ddim, tcd.",
    ),
    "spacing of lcm": (
        {"name": "lcm", "spacing": "trailing"},
        "lcm has no spacing; it has timesteps, original_inference_steps. Leave it out, or take a sampler that has it: "
        f"ddim, {LISTS}, euler-karras, heun-karras, dpmpp-sde-karras.",
    ),
    "spacing that changes nothing": (
        {"name": "unipc-karras", "spacing": "trailing"},
        "unipc-karras has no spacing. Leave it out, or take a sampler that has it: ddim, "
        f"{LISTS}, euler-karras, heun-karras, dpmpp-sde-karras.",
    ),
    "timesteps of ddim": (
        {"name": "ddim", "timesteps": [999, 499]},
        f"ddim has no timesteps; it has spacing, eta. Leave it out, or take a sampler that has it: {LISTS}, lcm, tcd.",
    ),
    "timesteps with Karras": (
        {"name": "euler-karras", "timesteps": [999, 499]},
        "euler-karras has no timesteps; it has spacing. Leave it out, or take a sampler that has it: "
        f"{LISTS}, lcm, tcd.",
    ),
    "distillation of euler": (
        {"name": "euler", "original_inference_steps": 50},
        "euler has no original_inference_steps; it has spacing, timesteps. Leave it out, or take a sampler that has "
        "it: lcm, tcd.",
    ),
    "spacing": (
        {"name": "ddim", "spacing": "karras"}, "spacing is 'karras', expected one of leading, trailing, linspace."
    ),
    "too much eta": ({"name": "ddim", "eta": 1.5}, "eta is 1.5, expected a number from 0 to 1."),
    "eta NaN": ({"name": "tcd", "eta": float("nan")}, "eta is nan, expected a number from 0 to 1."),
    "eta True": ({"name": "tcd", "eta": True}, "eta is True, expected a number from 0 to 1."),
    "timesteps of text": (
        {"name": "lcm", "timesteps": "999,499"},
        "timesteps is '999,499', expected numbers from 0 on, such as (999, 749, 499, 249).",
    ),
    "no timesteps": (
        {"name": "lcm", "timesteps": []}, "timesteps is [], expected numbers from 0 on, such as (999, 749, 499, 249)."
    ),
    "negative timestep": (
        {"name": "lcm", "timesteps": [999, -1]},
        "timesteps is [999, -1], expected numbers from 0 on, such as (999, 749, 499, 249).",
    ),
    "timestep NaN": (
        {"name": "euler", "timesteps": [999, float("nan")]},
        "timesteps is [999, nan], expected numbers from 0 on, such as (999, 749, 499, 249).",
    ),
    "rising": (
        {"name": "euler", "timesteps": [249, 499.5]},
        "timesteps is 249, 499.5, expected a falling list without duplicates, from noise to picture.",
    ),
    "duplicates": (
        {"name": "unipc", "timesteps": [999, 499, 499]},
        "timesteps is 999, 499, 499, expected a falling list without duplicates, from noise to picture.",
    ),
    "fractions": (
        {"name": "dpmpp-2m", "timesteps": [999, 499.5]},
        "timesteps is 999, 499.5, and dpmpp-2m takes whole numbers only.",
    ),
    "two lists": (
        {"name": "euler", "timesteps": [999], "spacing": "trailing"},
        "timesteps and spacing are both given, and each says which timesteps. Give one.",
    ),
    "two lists of lcm": (
        {"name": "lcm", "timesteps": [999], "original_inference_steps": 50},
        "timesteps and original_inference_steps are both given, and each says which timesteps. Give one.",
    ),
    "no distillation": (
        {"name": "lcm", "original_inference_steps": 0},
        "original_inference_steps is 0, expected a whole number of at least 1.",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_what_no_sampler_is(case: str) -> None:
    given, said = IMPOSSIBLE[case]
    with pytest.raises(RequestError) as caught:
        Sampler.of(given)
    assert str(caught.value) == said


# sampler, steps, start → all that is said, of SDXL's schedule
REFUSED: dict[str, tuple[Any, Any, Any, str]] = {
    "too many steps": (
        "unipc", 1001, 0, "num_inference_steps is 1001, expected 1 to 1000: the schedule has 1000 timesteps."
    ),
    "start": ("euler", 7, 7, "start is 7, expected 0 to 6: 7 steps were asked for."),
    "start before": ("euler", 7, -1, "start is -1, expected 0 to 6: 7 steps were asked for."),
    "start of text": ("euler", 7, "2", "start is '2', expected 0 to 6: 7 steps were asked for."),
    "fewer timesteps": (
        {"name": "lcm", "timesteps": [999, 499]}, 4, 0,
        "num_inference_steps is 4, and the sampler has 2 timesteps: 999, 499. Ask for 2 steps, or give 4 timesteps.",
    ),
    "timesteps beyond": (
        {"name": "euler", "timesteps": [999.5, 499]}, 2, 0,
        "timesteps begins with 999.5, expected at most 999: the schedule has 1000 timesteps.",
    ),
    "first beyond": (
        "euler", 1000, 0,
        "num_inference_steps is 1000; with steps_offset 1 the first timestep would be 1000, beyond the schedule's "
        "1000. Use fewer steps.",
    ),
    "equal levels": (
        "dpmpp-2m", 1000, 0,
        "num_inference_steps is 1000: with dpmpp-2m and leading spacing two steps would begin at the same noise "
        "level. Use fewer steps, or another spacing.",
    ),
    "equal rounded": (
        {"name": "unipc", "spacing": "linspace"}, 1000, 0,
        "num_inference_steps is 1000: with unipc and linspace spacing two steps would begin at the same noise "
        "level. Use fewer steps, or another spacing.",
    ),
    "more than distilled": (
        "lcm", 51, 0,
        "num_inference_steps is 51; lcm takes its steps from the 50 timesteps of its distillation "
        "(original_inference_steps). Ask for at most 50 steps.",
    ),
    "more than trained": (
        {"name": "tcd", "original_inference_steps": 2000}, 4, 0,
        "original_inference_steps is 2000, expected at most 1000: the schedule has 1000 timesteps.",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_schedule_does_not_have(case: str) -> None:
    sampler, steps, start, said = REFUSED[case]
    with pytest.raises(RequestError) as caught:
        table_of(sampler, schedule_of("leading", "epsilon"), steps, start)
    assert str(caught.value) == said


NOISE = "This checkpoint's noise schedule begins in pure noise (zero terminal SNR)"


@pytest.mark.parametrize("name", NAMES)
def test_pure_noise_and_epsilon(name: str) -> None:
    with pytest.raises(RequestError) as caught:
        table_of(name, schedule_of("trailing", "epsilon", zero_snr=True), 7)
    assert str(caught.value) == (
        f"{NOISE}, where its epsilon prediction says nothing of the picture. Such a schedule needs a v_prediction "
        "model: correct scheduler/ of the checkpoint."
    )


@pytest.mark.parametrize("name", ["heun", "heun-karras"])
def test_pure_noise_and_heun(name: str) -> None:
    with pytest.raises(RequestError) as caught:
        table_of(name, schedule_of("trailing", "v_prediction", zero_snr=True), 7)
    assert str(caught.value) == (
        f"{NOISE}, from where {name} would take a first step of unlimited length. Take another sampler, such as "
        "dpmpp-2m."
    )


@pytest.mark.parametrize(
    "sampler, first, advice",
    [
        ("euler-karras", 853, 'Take euler-karras with spacing "trailing".'),
        ("dpmpp-2m", 876, 'Take dpmpp-2m with spacing "trailing".'),
        ({"name": "tcd", "original_inference_steps": 60}, 959, "Give timesteps from 999 on."),
        ({"name": "euler", "timesteps": range(900, 200, -100)}, 900, "Give timesteps from 999 on."),
    ],
)
def test_pure_noise_that_no_step_sees(sampler: Any, first: int, advice: str) -> None:
    with pytest.raises(RequestError) as caught:
        table_of(sampler, schedule_of("leading", "v_prediction", zero_snr=True), 7)
    assert str(caught.value) == f"{NOISE}, at timestep 999, and the first step would be at {first}. {advice}"


def test_ddim_may_start_below_pure_noise() -> None:
    """As a checkpoint without the key `sampler` always could."""
    assert table_of("ddim", schedule_of("leading", "v_prediction", zero_snr=True), 7).timesteps[0] == 853


@pytest.mark.parametrize("name", sorted({*NAMES} - {"heun", "heun-karras"}))
def test_pure_noise_is_stepped_from(name: str) -> None:
    """No number is larger than the largest of a reading, 1/s at the first timestep; diffusers' x = z/α is 4096 times
    the noise."""
    for prediction in PREDICTIONS[1:]:
        for steps in (1, 4, 30):
            schedule = schedule_of("trailing", prediction, zero_snr=True)
            table = table_of(name, schedule, steps)
            assert table.timesteps[0] == 999 and np.isfinite(table.matrix).all()
            assert np.abs(table.matrix).max() <= 1 / np.sqrt(1 - schedule.alphas_cumprod[0])


@pytest.mark.parametrize("name", ["dpmpp-2m-karras", "dpmpp-2m-sde-karras", "unipc-karras"])
def test_karras_of_whole_timesteps_does_not_depend_on_the_spacing(name: str) -> None:
    """Also where the spacing's own list would begin beyond the schedule."""
    for steps in (30, 999):
        tables = [table_of(name, schedule_of(spacing, "epsilon"), steps) for spacing in ("leading", "trailing")]
        np.testing.assert_array_equal(tables[0].matrix, tables[1].matrix)
