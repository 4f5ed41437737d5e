"""The rows of samplers without histories: DDIM, Euler, Euler ancestral, LCM, TCD. Symbols as in sampler_tables.py."""

from __future__ import annotations

import numpy as np

from .noise_levels import Array
from .sampler_tables import NOISE, M, Steps, Table, Z, blend_of, clean, columns_of, of_sigmas


def first_order(prediction: str, a: Array, a_next: Array, variance: Array) -> Array:
    """(S, 5): from ᾱ to ᾱ', of whose noise a part is fresh. DDIM, Song et al. 2020 (arXiv 2010.02502), Eq. (12).

    z' = α'·d + √(1 - ᾱ' - n²)·e + n·noise          a = ᾱ, a_next = ᾱ', variance = n²; all (S,)
    ε-prediction: A = √(ᾱ'/ᾱ),  B = √(1 - ᾱ' - n²) - A·√(1 - ᾱ)
    v-prediction: A = √(ᾱ·ᾱ') + √((1 - ᾱ)(1 - ᾱ' - n²)),  B = √(ᾱ(1 - ᾱ' - n²)) - √(ᾱ'(1 - ᾱ))
    sample:       A = √((1 - ᾱ' - n²)/(1 - ᾱ)),  B = √ᾱ' - A·√ᾱ
    """
    kept = np.maximum(1 - a_next - variance, 0)  # rounding may leave -1e-17
    if prediction == "epsilon":
        scale = np.sqrt(a_next / a)
        shift = np.sqrt(kept) - scale * np.sqrt(1 - a)
    elif prediction == "v_prediction":
        scale = np.sqrt(a * a_next) + np.sqrt((1 - a) * kept)
        shift = np.sqrt(a * kept) - np.sqrt(a_next * (1 - a))
    else:
        scale = np.sqrt(kept / (1 - a))
        shift = np.sqrt(a_next) - scale * np.sqrt(a)
    return columns_of(scale, Z) + columns_of(shift, M) + columns_of(np.sqrt(variance), NOISE)


def fresh_variance(a: Array, a_next: Array) -> Array:
    """(S,): n² of DDIM with η = 1, Eq. (16): (1 - ᾱ')/(1 - ᾱ)·(1 - ᾱ/ᾱ')."""
    return np.asarray((1 - a_next) / (1 - a) * (1 - a / a_next))


def ddim(steps: Steps) -> Table:
    """DDIM with n² = η²·(n² of η = 1). diffusers' DDIMScheduler.

    As there a step goes to t - T // S, whatever comes next in the list, and below 0 to `final_alpha_cumprod`.
    """
    alphas, final, t = steps.schedule.alphas_cumprod, steps.schedule.final_alpha_cumprod, steps.timesteps.astype(int)
    previous = t - len(alphas) // len(t)
    a, a_next = alphas[t], np.where(previous >= 0, alphas[previous.clip(0)], final)
    variance = steps.eta**2 * fresh_variance(a, a_next) if steps.eta else np.zeros_like(a)
    rows = first_order(steps.schedule.prediction_type, a, a_next, variance)
    return _table(steps, rows, np.append(a, final), np.append(a[1:], 1.0))


def euler(steps: Steps, ancestral: bool = False) -> Table:
    """Euler's method in σ: DDIM on levels of its own. diffusers' EulerDiscreteScheduler.

    ancestral: DDIM with η = 1 on them. diffusers' EulerAncestralDiscreteScheduler.
    """
    alpha, _ = of_sigmas(steps.sigmas)
    a = alpha**2
    variance = fresh_variance(a[:-1], a[1:]) if ancestral else np.zeros(len(a) - 1)
    rows = first_order(steps.schedule.prediction_type, a[:-1], a[1:], variance)
    return _table(steps, rows, a, a[1:])


def lcm(steps: Steps) -> Table:
    """Latent consistency models, Luo et al. 2023 (arXiv 2310.04378), multistep sampling. diffusers' LCMScheduler.

    z' = α'·(c_out·d + c_skip·z) + s'·noise; the last row leaves c_out·d + c_skip·z
    c_skip = ¼/((10·t)² + ¼),  c_out = 10·t/√((10·t)² + ¼)
    """
    a = steps.schedule.alphas_cumprod[steps.timesteps.astype(int)]
    a_next = np.append(a[1:], 1.0)
    scaled = 10 * steps.timesteps
    skip, out = 0.25 / (scaled**2 + 0.25), scaled / np.sqrt(scaled**2 + 0.25)
    d = clean(steps.schedule.prediction_type, np.sqrt(a), np.sqrt(1 - a))
    guess = out[:, None] * d + columns_of(skip, Z)
    rows = np.sqrt(a_next)[:, None] * guess + columns_of(np.sqrt(1 - a_next), NOISE)
    return _table(steps, rows, np.append(a, 1.0), a_next)


def tcd(steps: Steps) -> Table:
    """Trajectory consistency distillation, Zheng et al. 2024 (arXiv 2402.19159), strategic stochastic sampling.
    diffusers' TCDScheduler.

    y = α_q·d + s_q·e at q = ⌊(1 - γ)·t'⌋, then noise back up to t': z' = √(ᾱ'/ᾱ_q)·y + √(1 - ᾱ'/ᾱ_q)·noise
    The last row is y at q = 0, so it ends at the first ᾱ.
    """
    t, alphas, gamma = steps.timesteps.astype(int), steps.schedule.alphas_cumprod, steps.eta
    after = np.append(t[1:], 0)
    between = np.floor(np.float32(1 - gamma) * after.astype(np.float32)).astype(int)  # float32 as diffusers
    a, a_next, a_between = alphas[t], alphas[after], alphas[between]
    ratio = a_next / a_between if gamma else np.ones(len(t))  # 1 in the last row: both are timestep 0
    guess = first_order(steps.schedule.prediction_type, a, a_between, np.zeros(len(t)))
    rows = np.sqrt(ratio)[:, None] * guess + columns_of(np.sqrt(1 - ratio), NOISE)
    return _table(steps, rows, np.append(a, a_between[-1]), a_next)


def _table(steps: Steps, rows: Array, levels: Array, next_levels: Array) -> Table:
    """From (S, 5) rows z' of the whole schedule; levels (S + 1,), and next_levels (S,) for the blend."""
    start, a = steps.start, levels[:-1]
    matrix = np.zeros((len(rows), 4, 5))
    matrix[:, 0] = rows
    matrix[:, 3] = clean(steps.schedule.prediction_type, np.sqrt(a), np.sqrt(1 - a))
    taken = np.arange(start, len(rows))
    return Table(
        timesteps=steps.timesteps[start:],
        matrix=matrix[start:],
        histories=0,
        step_of=taken,
        row_of=taken,
        init=steps.init,
        levels=levels[start:],
        blend=blend_of(next_levels[start:]),
        name=steps.name,
    )
