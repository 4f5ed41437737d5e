"""diffusers' own schedulers, in float64 and as they are, and the steps that they and our tables take."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from export.truth.schedulers import SCHEDULERS as THEIRS
from export.truth.schedulers import DiffusersScheduler, default_dtype, given_noise, module_of
from realisid_trt.loop.sampler_tables import Table
from realisid_trt.loop.samplers import NoiseSchedule

SHAPE = (3, 7, 5)
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SPACINGS = ("leading", "trailing", "linspace")
PREDICTIONS = ("epsilon", "v_prediction", "sample")

Latents = NDArray[Any]


# DDIM as SDXL's file has it
SCHEDULERS = THEIRS | {
    "ddim": replace(THEIRS["ddim"], config={**THEIRS["ddim"].config, "set_alpha_to_one": False}),
}
IN_SIGMAS = ("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler")  # x = z/α


def make(theirs: DiffusersScheduler, wide: bool = True, **config: Any) -> Any:
    with default_dtype(torch.float64 if wide else torch.float32):
        keys = {**BETAS, "timestep_spacing": "leading", "steps_offset": 1, **theirs.config, **config}
        return getattr(module_of(theirs.file, wide), theirs.name)(**keys)


@cache
def schedule_of(
    spacing: str, prediction: str, wide: bool = True, zero_snr: bool = False, to_one: bool = False
) -> NoiseSchedule:
    """The schedule as an engine has it: of a DDIMScheduler."""
    config = {"rescale_betas_zero_snr": zero_snr, "set_alpha_to_one": to_one, "prediction_type": prediction}
    scheduler = make(SCHEDULERS["ddim"], wide, **config)
    alphas = scheduler.alphas_cumprod.double().numpy()
    return NoiseSchedule(alphas, 1.0 if to_one else float(alphas[0]), spacing, 1, prediction)


def network(latents: Latents, timestep: float) -> Latents:
    """What a network says: nonlinear, bounded, of the whole picture and the timestep."""
    moved = np.roll(latents, (1, 2, 1), (0, 1, 2))
    return np.asarray(0.6 * latents + 0.5 * np.tanh(2 * moved * math.cos(timestep / 150) - 0.3 * latents + 0.1))


def noises_of(count: int) -> Latents:
    """(count + 1, *SHAPE): the initial noise, and one for each row of the whole schedule."""
    return np.random.default_rng(1).standard_normal((count + 1, *SHAPE))


PICTURE = np.random.default_rng(2).standard_normal(SHAPE) * 0.8  # z0 of late starts
MASK = np.random.default_rng(3).integers(0, 2, SHAPE[1:]).astype(float)


def set_timesteps(scheduler: Any, steps: int, timesteps: Any = None) -> Any:
    """The scheduler, ready to take so many steps, or these."""
    with default_dtype(dtype_of(scheduler)):
        scheduler.set_timesteps(**({"num_inference_steps": steps} if timesteps is None else {"timesteps": timesteps}))
    return scheduler


def dtype_of(scheduler: Any) -> torch.dtype:
    """float64 if `make` read its source so."""
    return torch.float64 if scheduler.__module__.startswith("diffusers.schedulers.wide_") else torch.float32


def levels_of(scheduler: Any) -> Latents:
    """ᾱ before every call of `step`."""
    if hasattr(scheduler, "sigmas"):
        return np.asarray(1 / (1 + scheduler.sigmas.double().numpy()[:-1] ** 2))
    return np.asarray(scheduler.alphas_cumprod.double()[scheduler.timesteps])


def their_latents(
    theirs: DiffusersScheduler, scheduler: Any, noises: Latents, start: int = 0, mask: Latents | None = None
) -> list[Latents]:
    """The latents after every call of `step`, as z.

    start: the first step; above 0 PICTURE is what the latents are made of. mask: cells that are drawn anew, the others
    keep PICTURE, as StableDiffusionXLInpaintPipeline has it.
    """
    dtype, at = dtype_of(scheduler), 0
    module = module_of(theirs.file, dtype == torch.float64)
    with default_dtype(dtype), given_noise(module, lambda: torch.from_numpy(noises[1 + at])[None].to(dtype)):
        first = start * getattr(scheduler, "order", 1)
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(first)
        picture, noise = torch.from_numpy(PICTURE)[None], torch.from_numpy(noises[0])[None]
        found, listed = list[Latents](), scheduler.timesteps[first:]
        x = scheduler.add_noise(picture, noise, listed[:1]) if start else noise * scheduler.init_noise_sigma
        x = x.double()
        for at, timestep in enumerate(listed, first):
            z = scheduler.scale_model_input(x, timestep).double()
            m = torch.from_numpy(network(z.numpy()[0], float(timestep)))[None]
            x = scheduler.step(m, timestep, x, **theirs.step).prev_sample.double()
            if mask is not None:
                after = scheduler.timesteps[at + 1 : at + 2]
                kept = scheduler.add_noise(picture, noise, after) if len(after) else picture
                x = torch.from_numpy(mask) * x + torch.from_numpy(1 - mask) * kept
            sigma = float(scheduler.sigmas[scheduler.step_index]) if theirs.name in IN_SIGMAS else 0.0
            found.append(x.numpy()[0] / math.sqrt(1 + sigma**2))
    return found


def our_latents(table: Table, noises: Latents, start: int = 0, mask: Latents | None = None) -> list[Latents]:
    """The latents after every row of a table, by its definition, in float64. start, mask: as for `their_latents`."""
    if start:
        z = math.sqrt(table.levels[0]) * PICTURE + math.sqrt(1 - table.levels[0]) * noises[0]
    else:
        z = table.init * noises[0]
    state, found = np.stack([z, np.zeros_like(z), np.zeros_like(z)]), []
    for timestep, matrix, row, blend in zip(table.timesteps, table.matrix, table.row_of, table.blend, strict=True):
        columns = np.stack([state[0], network(state[0], timestep), state[1], state[2], noises[1 + row]])
        state = np.tensordot(matrix[:3], columns, 1)
        if mask is not None:
            state[0] = mask * state[0] + (1 - mask) * (blend[0] * PICTURE + blend[1] * noises[0])
        found.append(state[0])
    return found


def distance(ours: list[Latents], theirs: list[Latents]) -> float:
    """The largest difference after any row, over the largest number."""
    assert len(ours) == len(theirs) and np.isfinite(theirs).all()
    return float(np.abs(np.subtract(ours, theirs)).max() / np.abs(theirs).max())
