"""The rows of samplers with histories: Heun, DPM-Solver++, UniPC. Symbols as in sampler_tables.py."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from .noise_levels import Array
from .sampler_tables import H1, H2, NO_ROW, NOISE, Steps, Table, Z, blend_of, clean, of_sigmas, predicted_noise


@dataclass(frozen=True, eq=False)
class Row:
    """One evaluation: its timestep, σ before it, the step to which it belongs, and its lines of the matrix."""

    timestep: float
    sigma: float
    step: int
    latents: Array
    history: Array = field(default_factory=lambda: NO_ROW)
    second_history: Array = field(default_factory=lambda: NO_ROW)


def heun(steps: Steps) -> Table:
    """Heun's method in σ, Karras et al. 2022 (arXiv 2206.00364), Algorithm 1. diffusers' HeunDiscreteScheduler.

    Two rows a step, with w = (σ' - σ)/2: z' = α'(z/α + 2w·e), h1' = α'(z/α + w·e); then z' = h1 + α'w·e. The last step
    has the first row alone.
    """
    sigmas, prediction = steps.sigmas, steps.schedule.prediction_type
    alpha, s = of_sigmas(sigmas)
    rows = list[Row]()
    for i in steps.taken:
        half = (sigmas[i + 1] - sigmas[i]) / 2
        x, e = Z / alpha[i], predicted_noise(prediction, alpha[i], s[i])
        last = i + 1 == len(steps.timesteps)
        kept = NO_ROW if last else alpha[i + 1] * (x + half * e)
        rows.append(Row(steps.timesteps[i], sigmas[i], i, alpha[i + 1] * (x + 2 * half * e), kept))
        if not last:
            corrected = H1 + alpha[i + 1] * half * predicted_noise(prediction, alpha[i + 1], s[i + 1])
            rows.append(Row(steps.timesteps[i + 1], sigmas[i + 1], i, corrected))
    return _with_histories(steps, rows, 1, rows_a_step=2)


def dpmpp_2m(steps: Steps, sde: bool = False) -> Table:
    """DPM-Solver++(2M), Lu et al. 2022 (arXiv 2211.01095), Algorithm 2, and its form for the SDE. diffusers'
    DPMSolverMultistepScheduler, "dpmsolver++" and "sde-dpmsolver++", order 2, midpoint.

    u = σ'/σ = exp(-h), h = λ' - λ, λ = -ln σ, r = h_before/h, h1' = d
    ODE: z' = (s'/s)·z + α'(1 - u)·[d + (d - h1)/2r]
    SDE: z' = (s'/s)·u·z + α'(1 - u²)·[d + (d - h1)/2r] + s'√(1 - u²)·noise
    The first row taken, and the last one: [..] = d.
    """
    sigmas, prediction = steps.sigmas, steps.schedule.prediction_type
    alpha, s = of_sigmas(sigmas)
    rows = list[Row]()
    for i in steps.taken:
        d, u = clean(prediction, alpha[i], s[i]), sigmas[i + 1] / sigmas[i]
        guess = d
        if i > steps.start and u > 0:
            r = np.log(sigmas[i - 1] / sigmas[i]) / -np.log(u)
            guess = d + (d - H1) / (2 * r)
        if sde:
            share = (1 - u) * (1 + u)
            latents = s[i + 1] / s[i] * u * Z + alpha[i + 1] * share * guess + s[i + 1] * np.sqrt(share) * NOISE
        else:
            latents = s[i + 1] / s[i] * Z + alpha[i + 1] * (1 - u) * guess
        rows.append(Row(steps.timesteps[i], sigmas[i], i, latents, d))
    return _with_histories(steps, rows, 1)


def dpmpp_sde(steps: Steps) -> Table:
    """DPM-Solver++(S) of the SDE, η = 1, r = ½: k-diffusion's sample_dpmpp_sde with independent noise in each row.

    Two rows a step, the first to the geometric middle of its noise levels, σ_m = √(σσ'). An ancestral step from σ to τ
    goes down to σ_down = τ²/σ and adds noise of σ_up = √(τ² - σ_down²).
    z' = α_m((σ_down/σ)·z/α + (1 - σ_down/σ)·d + σ_up·noise) to σ_m, h1' = α'(σ_down/σ)·z/α of σ'; then
    z' = h1 + α'((1 - σ_down/σ)·d + σ_up·noise) to σ'. The last step is one row, z' = d.
    """
    sigmas, prediction = steps.sigmas, steps.schedule.prediction_type
    alpha, s = of_sigmas(sigmas)
    rows = list[Row]()
    for i in steps.taken:
        d = clean(prediction, alpha[i], s[i])
        if i + 1 == len(steps.timesteps):
            rows.append(Row(steps.timesteps[i], sigmas[i], i, d))
            continue
        middle = np.sqrt(sigmas[i] * sigmas[i + 1])
        (share, deviation), (end_share, end_deviation) = (_ancestral(sigmas[i], to) for to in (middle, sigmas[i + 1]))
        alpha_middle, s_middle = of_sigmas(middle)
        latents = alpha_middle * (share * Z / alpha[i] + (1 - share) * d + deviation * NOISE)
        rows.append(Row(steps.timesteps[i], sigmas[i], i, latents, alpha[i + 1] * end_share * Z / alpha[i]))
        d_middle = clean(prediction, alpha_middle, s_middle)
        latents = H1 + alpha[i + 1] * ((1 - end_share) * d_middle + end_deviation * NOISE)
        rows.append(Row(float(steps.schedule.timesteps_at(middle)), middle, i, latents))
    return _with_histories(steps, rows, 1, rows_a_step=2)


def _ancestral(sigma: float, to: float) -> tuple[float, float]:
    """σ_down/σ and σ_up of an ancestral step from one σ to another."""
    share = (to / sigma) ** 2
    return share, to * float(np.sqrt(1 - share))


def unipc(steps: Steps) -> Table:
    """UniPC of order 2 for the prediction of clean latents, Zhao et al. 2023 (arXiv 2302.04867). diffusers'
    UniPCMultistepScheduler, "bh2".

    The corrector of a row needs this row's d, and the predictor needs the corrected x: both are known after one
    evaluation. Before it x = w + f·d is known but for d, so w and the last d are the histories. First row: x = z.
    h, u as in `dpmpp_2m`; B = u - 1; r = (λ_before - λ)/h; change = (h2 - d)/r; ρ0 + ρ1 = φ2/B, r·ρ0 + ρ1 = 2φ3/B,
    φ2 = (1 - u)/h - 1, φ3 = -φ2/h - ½
        base = (s'/s)·x + α'(1 - u)·d
        z' = base - α'B/2·change,  h1' = w' = base - α'B(ρ0·change - ρ1·d),  f' = -α'B·ρ1,  h2' = d
    First row taken: z' = base, w' = base + α'B/2·d, f' = -α'B/2. Last row: z' = base.
    """
    sigmas, prediction = steps.sigmas, steps.schedule.prediction_type
    alpha, s = of_sigmas(sigmas)
    rows, share = list[Row](), 0.0
    for i in steps.taken:
        d, u = clean(prediction, alpha[i], s[i]), sigmas[i + 1] / sigmas[i]
        x = Z if i == steps.start else H1 + share * d
        base = s[i + 1] / s[i] * x + alpha[i + 1] * (1 - u) * d
        if u == 0:
            rows.append(Row(steps.timesteps[i], sigmas[i], i, base))
            continue
        h, slope = -np.log(u), alpha[i + 1] * (u - 1)
        if i == steps.start:
            latents, w, share = base, base + slope / 2 * d, -slope / 2
        else:
            r = np.log(sigmas[i] / sigmas[i - 1]) / h
            change = (H2 - d) / r
            phi2 = (1 - u) / h - 1  # the paper's h·φ_2 and h·φ_3, at -h
            phi3 = -phi2 / h - 0.5
            sums = phi2 / (u - 1), 2 * phi3 / (u - 1)  # ρ0 + ρ1 and r·ρ0 + ρ1
            rho0 = (sums[1] - sums[0]) / (r - 1)
            rho1 = sums[0] - rho0
            latents = base - slope / 2 * change
            w, share = base - slope * (rho0 * change - rho1 * d), -slope * rho1
        rows.append(Row(steps.timesteps[i], sigmas[i], i, latents, w, d))
    return _with_histories(steps, rows, 2)


def _with_histories(steps: Steps, rows: Sequence[Row], histories: int, rows_a_step: int = 1) -> Table:
    """The table of these rows. Histories that no later row reads are left out."""
    matrix = np.zeros((len(rows), 4, 5))
    sigma = np.array([row.sigma for row in rows])
    matrix[:, 0] = [row.latents for row in rows]
    matrix[:, 1] = [row.history for row in rows]
    matrix[:, 2] = [row.second_history for row in rows]
    matrix[:, 3] = clean(steps.schedule.prediction_type, *of_sigmas(sigma))
    matrix[-1, 1:3] = 0
    for i in reversed(range(len(rows) - 1)):
        matrix[i, 1:3][~matrix[i + 1, :3, 2:4].any(axis=0)] = 0
    levels = np.append(of_sigmas(sigma)[0] ** 2, 1.0)
    first = rows_a_step * steps.start
    return Table(
        timesteps=np.array([row.timestep for row in rows]),
        matrix=matrix,
        histories=histories,
        step_of=np.array([row.step for row in rows]),
        row_of=np.arange(first, first + len(rows)),
        init=steps.init,
        levels=levels,
        blend=blend_of(levels[1:]),
        name=steps.name,
    )
