"""Every sampler's table against diffusers' own scheduler, and dpmpp-sde against k-diffusion's equations."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from realisid_trt import Sampler
from realisid_trt.loop import samplers
from realisid_trt.loop.sampler_tables import Table
from realisid_trt.loop.samplers import NAMES, NoiseSchedule, table_of
from tests.realisid_trt.schedulers import (
    MASK,
    PREDICTIONS,
    SCHEDULERS,
    SPACINGS,
    Latents,
    distance,
    levels_of,
    make,
    network,
    noises_of,
    our_latents,
    schedule_of,
    set_timesteps,
    their_latents,
)

STEPS = (1, 4, 7, 30)
EXACT = 1e-12
LISTED = ("ddim", "lcm", "tcd")  # they step in ᾱ, the others in σ
DMD2 = (999, 749, 499, 249)
ALIGN_YOUR_STEPS = (999, 845, 730, 587, 443, 310, 193, 116, 53, 13)


def cases(steps: tuple[int, ...] = STEPS) -> Iterator[tuple[str, str, int]]:
    """spacing, prediction and steps."""
    yield from ((spacing, prediction, count) for spacing in SPACINGS for prediction in PREDICTIONS for count in steps)


def late_start(steps: int, strength: float = 0.6) -> int:
    """diffusers' rule for a picture to start from."""
    return steps - min(int(steps * strength), steps)


def knows(name: str, prediction: str) -> bool:
    """EulerAncestralDiscreteScheduler refuses "sample"; `test_ancestral_steps_of_clean_latents` has it."""
    return (name, prediction) != ("euler-a", "sample")


def check(
    name: str, scheduler: Any, table: Table, noises: Latents, start: int = 0, mask: Latents | None = None
) -> None:
    first = start * getattr(scheduler, "order", 1)
    np.testing.assert_allclose(table.timesteps, scheduler.timesteps[first:].double(), rtol=EXACT, atol=1e-9)
    np.testing.assert_allclose(table.levels[:-1], levels_of(scheduler)[first:], rtol=EXACT)
    ours, theirs = (
        our_latents(table, noises, start, mask),
        their_latents(SCHEDULERS[name], scheduler, noises, start, mask),
    )
    assert distance(ours, theirs) < EXACT


def test_every_sampler_is_compared() -> None:
    assert {*SCHEDULERS, "dpmpp-sde", "dpmpp-sde-karras"} == set(NAMES)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_tables_are_diffusers_schedulers(name: str) -> None:
    """From noise, and from a picture that joins after two fifths of the steps."""
    for spacing, prediction, steps in cases():
        if not knows(name, prediction):
            continue
        for start in sorted({0, late_start(steps)} - {steps}):
            scheduler = make(SCHEDULERS[name], prediction_type=prediction, timestep_spacing=spacing)
            table = table_of(name, schedule_of(spacing, prediction), steps, start)
            check(name, set_timesteps(scheduler, steps), table, noises_of(2 * steps), start)


@pytest.mark.slow("tables from every start")
@pytest.mark.parametrize("name", SCHEDULERS)
def test_tables_are_diffusers_schedulers_from_every_start(name: str) -> None:
    """From every start, and with cells that keep a picture; 14 and 15 steps differ in diffusers' lower orders."""
    for spacing, prediction, steps in cases((2, 3, 7, 14, 15, 50)):
        if not knows(name, prediction):
            continue
        for start in range(steps) if steps < 50 else (0, 20, 49):
            scheduler = make(SCHEDULERS[name], prediction_type=prediction, timestep_spacing=spacing)
            table = table_of(name, schedule_of(spacing, prediction), steps, start)
            check(
                name, set_timesteps(scheduler, steps), table, noises_of(2 * steps), start, MASK if start % 2 else None
            )


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("start", [0, 3])
def test_cells_that_keep_a_picture(name: str, start: int) -> None:
    """`blend` is the level of the next listed timestep, and the picture itself in the end."""
    for spacing in SPACINGS:
        scheduler = set_timesteps(make(SCHEDULERS[name], timestep_spacing=spacing), 7)
        check(name, scheduler, table_of(name, schedule_of(spacing, "epsilon"), 7, start), noises_of(14), start, MASK)


@pytest.mark.parametrize(
    "name, prediction",
    [
        (name, prediction)
        for name in sorted({*SCHEDULERS} - {"heun", "heun-karras"})  # heun refuses such schedules
        for prediction in ("v_prediction", "sample")
        if knows(name, prediction)
    ],
)
def test_schedules_that_begin_in_pure_noise(name: str, prediction: str) -> None:
    config = {"prediction_type": prediction, "timestep_spacing": "trailing", "rescale_betas_zero_snr": True}
    schedule = schedule_of("trailing", prediction, zero_snr=True)
    for steps in STEPS:
        for start in sorted({0, late_start(steps)} - {steps}):
            scheduler = set_timesteps(make(SCHEDULERS[name], **config), steps)
            check(name, scheduler, table_of(name, schedule, steps, start), noises_of(steps), start)


@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_ddim_with_fresh_noise(eta: float) -> None:
    theirs = replace(SCHEDULERS["ddim"], step={"eta": eta})
    for spacing, prediction, steps in cases():
        for start in sorted({0, late_start(steps)} - {steps}):
            scheduler = set_timesteps(make(theirs, prediction_type=prediction, timestep_spacing=spacing), steps)
            noises = noises_of(steps)
            table = table_of(Sampler("ddim", eta=eta), schedule_of(spacing, prediction), steps, start)
            assert distance(our_latents(table, noises, start), their_latents(theirs, scheduler, noises, start)) < EXACT


@pytest.mark.parametrize("gamma", [0.0, 0.7, 1.0])
def test_tcd_with_another_gamma(gamma: float) -> None:
    theirs = replace(SCHEDULERS["tcd"], step={"eta": gamma})
    for prediction in PREDICTIONS:
        for steps in STEPS:
            scheduler = set_timesteps(make(theirs, prediction_type=prediction), steps)
            noises = noises_of(steps)
            table = table_of(Sampler("tcd", eta=gamma), schedule_of("leading", prediction), steps)
            assert distance(our_latents(table, noises), their_latents(theirs, scheduler, noises)) < EXACT
            assert table.draws.any() == (gamma > 0 and steps > 1) and not table.draws[-1]


@pytest.mark.parametrize(
    "name, timesteps",
    [
        ("lcm", DMD2), ("lcm", (800,)), ("lcm", (999, 500, 0)), ("tcd", DMD2), ("tcd", (999, 500, 0)),
        ("euler", DMD2), ("euler", (999, 600.5, 12.25)), ("heun", DMD2), ("dpmpp-2m", ALIGN_YOUR_STEPS),
        ("dpmpp-2m-sde", ALIGN_YOUR_STEPS),
    ],
)  # fmt: skip
def test_timesteps_of_ones_own(name: str, timesteps: tuple[float, ...]) -> None:
    """Published lists: DMD2's of LCM, Hyper-SDXL's single step, AlignYourSteps. Some classes have no such argument."""
    for spacing in SPACINGS:
        for start in range(len(timesteps)):
            scheduler = set_timesteps(make(SCHEDULERS[name], timestep_spacing=spacing), 0, list(timesteps))
            sampler = Sampler(name, timesteps=timesteps)
            table = table_of(sampler, schedule_of(spacing, "epsilon"), len(timesteps), start)
            check(name, scheduler, table, noises_of(2 * len(timesteps)), start)


@pytest.mark.parametrize("original", [10, 40])
@pytest.mark.parametrize("name", ["lcm", "tcd"])
def test_another_distillation(name: str, original: int) -> None:
    scheduler = set_timesteps(make(SCHEDULERS[name], original_inference_steps=original), 7)
    sampler = Sampler(name, original_inference_steps=original)
    check(name, scheduler, table_of(sampler, schedule_of("leading", "epsilon"), 7), noises_of(7))


@pytest.mark.parametrize("spacing", SPACINGS)
def test_ancestral_steps_of_clean_latents(spacing: str) -> None:
    """A network that predicts clean latents says as much as one that predicts ε = (z - α·m)/s."""
    of_noise, of_latents = (
        table_of("euler-a", schedule_of(spacing, prediction), 7) for prediction in ("epsilon", "sample")
    )
    alpha, s = np.sqrt(of_noise.levels[:-1])[:, None], np.sqrt(1 - of_noise.levels[:-1])[:, None]
    expected = of_noise.matrix.copy()
    expected[:, :, 0] += of_noise.matrix[:, :, 1] / s
    expected[:, :, 1] *= -alpha / s
    np.testing.assert_allclose(of_latents.matrix, expected, rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_preview_is_the_prediction_of_the_clean_latents(name: str, prediction: str) -> None:
    table = table_of(name, schedule_of("leading", prediction), 7, start=2)
    for row, a in zip(table.matrix, table.levels, strict=False):
        alpha, s = math.sqrt(a), math.sqrt(1 - a)
        expected = {"epsilon": (1 / alpha, -s / alpha), "v_prediction": (alpha, -s), "sample": (0, 1)}[prediction]
        np.testing.assert_allclose(row[3], [*expected, 0, 0, 0], rtol=EXACT)


# dpmpp-sde


def k_diffusion_sde(scheduler: Any, schedule: NoiseSchedule, noises: Latents) -> list[Latents]:
    """k-diffusion's sample_dpmpp_sde, eta and s_noise 1, r ½, with given noise; z after every evaluation.

    scheduler: an EulerDiscreteScheduler, for its σ and timesteps.
    """
    sigmas, timesteps = scheduler.sigmas.double().numpy(), scheduler.timesteps.double().numpy()
    logs = np.log(((1 - schedule.alphas_cumprod) / schedule.alphas_cumprod) ** 0.5)
    drawn = iter(noises[1:])

    def denoised(x: Latents, sigma: float, timestep: float) -> Latents:
        c_in = 1 / math.sqrt(sigma**2 + 1)
        said = network(x * c_in, timestep)
        if schedule.prediction_type == "epsilon":
            return np.asarray(x - sigma * said)
        return said if schedule.prediction_type == "sample" else x * c_in**2 - sigma * c_in * said

    def ancestral_step(sigma_from: float, sigma_to: float) -> tuple[float, float]:
        sigma_up = min(sigma_to, (sigma_to**2 * (sigma_from**2 - sigma_to**2) / sigma_from**2) ** 0.5)
        return (sigma_to**2 - sigma_up**2) ** 0.5, sigma_up

    found = []
    x = noises[0] * (sigmas[0] if schedule.timestep_spacing != "leading" else math.sqrt(sigmas[0] ** 2 + 1))
    for sigma, sigma_next, timestep in zip(sigmas, sigmas[1:], timesteps, strict=False):
        first = denoised(x, sigma, timestep)
        if sigma_next == 0:
            x = x + (x - first) / sigma * (sigma_next - sigma)
            found.append(x)
            continue
        t, t_next = -math.log(sigma), -math.log(sigma_next)
        middle = math.exp(-(t + (t_next - t) / 2))
        down, up = ancestral_step(sigma, middle)
        x_2 = down / sigma * x - math.expm1(t + math.log(down)) * first + next(drawn) * up
        found.append(x_2 / math.sqrt(1 + middle**2))
        second = denoised(x_2, middle, float(scheduler._sigma_to_t(np.array(middle), logs)))
        down, up = ancestral_step(sigma, sigma_next)
        x = down / sigma * x - math.expm1(t + math.log(down)) * second + next(drawn) * up
        found.append(x / math.sqrt(1 + sigma_next**2))
    return found


@pytest.mark.parametrize("name", ["dpmpp-sde", "dpmpp-sde-karras"])
def test_dpmpp_sde_is_k_diffusions(name: str) -> None:
    for spacing, prediction, steps in cases():
        levels = make(SCHEDULERS[name.replace("dpmpp-sde", "euler")], timestep_spacing=spacing)
        schedule, noises = schedule_of(spacing, prediction), noises_of(2 * steps)
        table = table_of(name, schedule, steps)
        theirs = k_diffusion_sde(set_timesteps(levels, steps), schedule, noises)
        assert distance(our_latents(table, noises), theirs) < EXACT
        np.testing.assert_allclose(table.timesteps[::2], levels.timesteps.double(), rtol=EXACT, atol=1e-9)


@pytest.mark.parametrize("name", ["dpmpp-sde", "dpmpp-sde-karras"])
@pytest.mark.parametrize("start", [1, 3, 6])
def test_a_late_start_of_dpmpp_sde_is_the_end_of_its_table(name: str, start: int) -> None:
    """Its steps remember nothing of earlier ones."""
    whole, late = (table_of(name, schedule_of("trailing", "epsilon"), 7, first) for first in (0, start))
    for part in ("timesteps", "matrix", "step_of", "row_of", "levels", "blend"):
        np.testing.assert_array_equal(getattr(late, part), getattr(whole, part)[2 * start :])


# How sharp these tests are


@pytest.mark.parametrize("name", NAMES)
def test_a_coefficient_off_by_a_billionth_is_found(name: str) -> None:
    for prediction in PREDICTIONS:
        schedule, noises, steps = schedule_of("leading", prediction), noises_of(10), 5
        table = table_of(name, schedule, steps)
        if name.startswith("dpmpp-sde"):
            levels = set_timesteps(make(SCHEDULERS[name.replace("dpmpp-sde", "euler")]), steps)
            theirs = k_diffusion_sde(levels, schedule, noises)
        elif knows(name, prediction):
            scheduler = set_timesteps(make(SCHEDULERS[name], prediction_type=prediction), steps)
            theirs = their_latents(SCHEDULERS[name], scheduler, noises)
        else:
            continue
        assert distance(our_latents(table, noises), theirs) < EXACT
        for place in zip(*np.nonzero(table.matrix[:, :3]), strict=True):
            matrix = table.matrix.copy()
            matrix[place] += 1e-9
            assert distance(our_latents(replace(table, matrix=matrix), noises), theirs) > EXACT, (prediction, place)


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("steps", [7, 30])
def test_unmodified_schedulers_differ_by_their_float32(name: str, steps: int) -> None:
    """The scheduler as it is, with levels and sums in float32, is no further away than rounding explains.

    The bound is the table's condition number times float32's epsilon: how far the latents move per relative change of
    a level, and of what a row leaves; summed over all levels and rows, as if all were rounded in the worst direction.
    """
    scheduler = set_timesteps(make(SCHEDULERS[name], wide=False), steps)
    schedule, noises = schedule_of("leading", "epsilon", wide=False), noises_of(2 * steps)
    sampler = Sampler(name)
    plan = samplers._steps_of(sampler, schedule, steps, 0)
    ours = our_latents(sampler._kind.table(plan), noises)
    moved, change = 0.0, 1e-6
    for step in range(steps):
        sigmas, alphas = plan.sigmas.copy(), schedule.alphas_cumprod.copy()
        sigmas[step] *= 1 + change
        alphas[int(plan.timesteps[step])] = 1 / (1 + sigmas[step] ** 2)
        other = replace(plan, schedule=replace(schedule, alphas_cumprod=alphas)) if name in LISTED else plan
        other = other if name in LISTED else replace(plan, sigmas=sigmas)
        moved += distance(our_latents(sampler._kind.table(other), noises), ours) / change
    table = sampler._kind.table(plan)
    for row in range(len(table.matrix)):
        matrix = table.matrix.copy()
        matrix[row, 0] *= 1 + change
        moved += distance(our_latents(replace(table, matrix=matrix), noises), ours) / change
    error = distance(ours, their_latents(SCHEDULERS[name], scheduler, noises))
    assert 0 < error < moved * np.finfo(np.float32).eps
