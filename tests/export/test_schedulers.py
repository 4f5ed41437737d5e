"""The reference's steps against the samplers' tables, on small random functions; and the reference's loop over them."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, EulerAncestralDiscreteScheduler
from torch import Tensor

from export.checkpoint import Checkpoint
from export.miniature import make_checkpoint
from export.truth.reference import Reference, ReferenceControl, ReferencePerson
from export.truth.schedulers import default_dtype, given_noise, module_of, steps_of
from realisid_trt import Sampler
from realisid_trt.loop.noise import step_noise
from realisid_trt.loop.sampler_tables import Table
from realisid_trt.loop.samplers import NAMES, NoiseSchedule, table_of
from tests.realisid_trt.schedulers import (
    BETAS,
    PREDICTIONS,
    SPACINGS,
    Latents,
    distance,
    network,
    noises_of,
    our_latents,
)

EXACT = 1e-12
MORE = (
    Sampler("ddim", spacing="trailing", eta=0.5), Sampler("tcd", eta=0.7), Sampler("tcd", original_inference_steps=40),
    Sampler("lcm", timesteps=(999, 749, 499, 249)), Sampler("euler", timesteps=(999, 600.5, 12.25)),
    Sampler("euler-a", timesteps=(999, 600.5, 12.25)), Sampler("unipc", timesteps=(999, 749, 499, 249)),
    Sampler("dpmpp-sde", timesteps=(999, 600.5, 12.25)), Sampler("dpmpp-2m", spacing="linspace"),
    Sampler("dpmpp-sde-karras", spacing="trailing"), Sampler("euler", spacing="trailing"),
)  # fmt: skip
SAMPLERS = (*map(Sampler, NAMES), *MORE)


def said(sampler: Sampler) -> str:
    return str(sampler.to_json())


def ddim_of(prediction: str, spacing: str, **config: Any) -> tuple[dict[str, Any], NoiseSchedule]:
    """Every key of a DDIMScheduler, and its noise schedule as an engine has it."""
    values = {"clip_sample": False, "steps_offset": 1, "set_alpha_to_one": False, **BETAS, **config}
    ddim = DDIMScheduler(**values, prediction_type=prediction, timestep_spacing=spacing)
    alphas = ddim.alphas_cumprod.double().numpy()
    schedule = NoiseSchedule(alphas, float(ddim.final_alpha_cumprod), spacing, 1, prediction)
    return {key: value for key, value in ddim.config.items() if not key.startswith("_")}, schedule


def their_latents(sampler: Sampler, ddim: dict[str, Any], table: Table, noises: Latents, dtype: Any) -> list[Latents]:
    """The final latents, as one evaluation after another gives them; their numbers and timesteps are the table's."""
    steps = steps_of(sampler, ddim, len(set(table.step_of)), dtype)
    assert steps.step_of == table.step_of.tolist()
    np.testing.assert_allclose(steps.timesteps.double(), table.timesteps, rtol=1e-6, atol=1e-4)
    x = steps.begin(torch.from_numpy(noises[0])[None].to(dtype))
    for row, timestep in enumerate(table.timesteps):
        prediction = torch.from_numpy(network(steps.read(x).numpy()[0], float(timestep)))[None].to(dtype)
        x = steps.step(prediction, x, lambda row=row: torch.from_numpy(noises[1 + row])[None].to(dtype))
        assert x.dtype == dtype
    return [x.double().numpy()[0]]


@pytest.mark.parametrize("sampler", SAMPLERS, ids=said)
def test_the_reference_takes_the_steps_of_the_tables(sampler: Sampler) -> None:
    for prediction in PREDICTIONS:
        for spacing in SPACINGS:
            ddim, schedule = ddim_of(prediction, spacing)
            for steps in (1, 4, 7) if sampler.timesteps is None else (len(sampler.timesteps),):
                noises = noises_of(2 * steps)
                table = table_of(sampler, schedule, steps)
                ours = our_latents(table, noises)[-1:]
                assert distance(ours, their_latents(sampler, ddim, table, noises, torch.float64)) < EXACT


@pytest.mark.parametrize(
    "sampler",  # heun refuses such schedules, and dpmpp-2m's linspace does not begin at the last timestep
    [each for each in SAMPLERS if not each.name.startswith("heun") and each != Sampler("dpmpp-2m", spacing="linspace")],
    ids=said,
)
@pytest.mark.parametrize("prediction", ["v_prediction", "sample"])
def test_schedules_that_begin_in_pure_noise(sampler: Sampler, prediction: str) -> None:
    ddim, schedule = ddim_of(prediction, "trailing", rescale_betas_zero_snr=True, set_alpha_to_one=True)
    steps = 4 if sampler.timesteps is None else len(sampler.timesteps)
    noises, table = noises_of(2 * steps), table_of(sampler, schedule, steps)
    ours = our_latents(table, noises)[-1:]
    assert distance(ours, their_latents(sampler, ddim, table, noises, torch.float64)) < EXACT


@pytest.mark.parametrize("sampler", SAMPLERS, ids=said)
def test_in_float32_the_schedulers_are_as_they_are(sampler: Sampler) -> None:
    """They round, and do not compute anything else."""
    ddim, schedule = ddim_of("v_prediction", "leading")
    steps = 4 if sampler.timesteps is None else len(sampler.timesteps)
    noises, table = noises_of(2 * steps), table_of(sampler, schedule, steps)
    theirs = their_latents(sampler, ddim, table, noises, torch.float32)
    assert 0 < distance(our_latents(table, noises)[-1:], theirs) < 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_another_step_is_found(name: str) -> None:
    """A coefficient off by a billionth, or the noise of another row."""
    ddim, schedule = ddim_of("epsilon", "leading")
    noises, table = noises_of(8), table_of(name, schedule, 4)
    theirs = their_latents(Sampler(name), ddim, table, noises, torch.float64)
    for column in np.flatnonzero(table.matrix[1, 0]):
        matrix = table.matrix.copy()
        matrix[1, 0, column] += 1e-9
        assert distance(our_latents(replace(table, matrix=matrix), noises)[-1:], theirs) > EXACT, column
    if table.draws.any():
        moved = np.roll(noises[1:], 1, axis=0)
        assert distance(our_latents(table, np.concatenate([noises[:1], moved]))[-1:], theirs) > 0.01


def test_diffusers_and_torch_stay_as_they_were() -> None:
    """The source is read a second time, and the noise is given to that copy alone."""
    theirs = __import__(EulerAncestralDiscreteScheduler.__module__, fromlist=["x"])
    before = theirs.randn_tensor, torch.get_default_dtype()
    for wide in (False, True):
        module = module_of("scheduling_euler_ancestral_discrete", wide)
        drawn = module.randn_tensor
        assert module is not theirs and module.EulerAncestralDiscreteScheduler is not EulerAncestralDiscreteScheduler
        with pytest.raises(KeyError), default_dtype(torch.float64), given_noise(module, lambda: torch.zeros(1)):
            assert module.randn_tensor((5,), dtype=torch.float16).shape == (1,)
            assert theirs.randn_tensor is before[0]
            raise KeyError
        assert module.randn_tensor is drawn
    assert (theirs.randn_tensor, torch.get_default_dtype()) == before


# The reference's loop


def predicted(latents: Latents, timestep: float, level: float) -> Latents:
    return network(latents, timestep) + 0.1 * math.tanh(level / 100)


class Net:
    """In the place of the UNet: a small function of latents, timestep and the sum of the tokens.

    read: that sum at every call.
    """

    def __init__(self) -> None:
        self.read: list[float] = []

    def __call__(self, latents: Tensor, timestep: Tensor, *, encoder_hidden_states: Tensor, **options: Any) -> Any:
        level = float(encoder_hidden_states.sum())
        self.read.append(level)
        return (torch.from_numpy(predicted(latents.numpy()[0], float(timestep), level))[None],)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """ID-Patch: its UNet reads the ID's tokens, which are absent while the ID is delayed."""
    return Checkpoint.open(make_checkpoint(tmp_path_factory.mktemp("made") / "idpatch", method="idpatch"))


def reference_of(checkpoint: Checkpoint, **config: Any) -> tuple[Reference, Net]:
    reference = Reference(replace(checkpoint, config=replace(checkpoint.config, **config)), torch.float64)
    reference.unet = net = Net()
    return reference, net


def persons() -> list[ReferencePerson]:
    return [ReferencePerson(embedding=torch.linspace(-1, 1, 512), anchor=(9, 9))]


def windows_of(reference: Reference) -> list[tuple[float, float]]:
    """The share of the steps that the branches are told, at every call from now on; no branch runs."""
    shares: list[tuple[float, float]] = []

    def residuals(*given: Any) -> list[Tensor]:
        shares.append(given[-1])
        return []

    reference.branches = SimpleNamespace(residuals=residuals, snap=None)  # type: ignore[assignment]
    return shares


@pytest.mark.parametrize("name", ["ddim", "euler-a", "heun", "dpmpp-2m-karras", "dpmpp-sde", "unipc", "lcm"])
def test_delay_and_windows_count_steps_and_not_evaluations(name: str, checkpoint: Checkpoint) -> None:
    """Of 5 steps α = 0.6 delays the first two ("exclusive"). Heun and dpmpp-sde evaluate four times in them."""
    reference, net = reference_of(checkpoint)
    shares = windows_of(reference)
    noise = step_noise(9, 0, (4, 8, 8))[None]
    options: dict[str, Any] = {"num_inference_steps": 5, "subject_conditioning_ratio": 0.6, "guidance_scale": 2.0}
    made = reference.generate("x", persons(), torch.from_numpy(noise), sampler=name, seed=3, **options)
    table = table_of(name, checkpoint.noise_schedule, 5)
    assert len(net.read) == 3 * len(table.timesteps) == len(shares)
    for row, step in enumerate(table.step_of):
        assert set(shares[3 * row : 3 * row + 3]) == {(step / 5, (step + 1) / 5)}
        _, text, full = net.read[3 * row : 3 * row + 3]
        assert (text == full) == (step < 2)
    state = np.zeros((3, 4, 8, 8))
    state[0] = table.init * noise[0]
    for row, matrix in enumerate(table.matrix):
        none, text, full = (
            predicted(state[0], table.timesteps[row], level) for level in net.read[3 * row : 3 * row + 3]
        )
        guided = none + 2.0 * (text - none) + 2.0 * (full - text)
        columns = [state[0], guided, *state[1:], step_noise(3, table.row_of[row], (4, 8, 8))]
        state = np.tensordot(matrix[:3], np.stack(columns), 1)
    assert np.abs(made.numpy()[0] - state[0]).max() / np.abs(state[0]).max() < EXACT


def test_the_sampler_is_the_request_s_or_the_config_s_or_ddim(checkpoint: Checkpoint) -> None:
    noise = torch.from_numpy(step_noise(9, 0, (4, 8, 8)))[None]

    def made(configured: Sampler | None, sampler: Any = None, seed: int = 0) -> Tensor:
        reference, _ = reference_of(checkpoint, sampler=configured)
        windows_of(reference)
        return reference.generate("x", persons(), noise, num_inference_steps=4, sampler=sampler, seed=seed)

    assert checkpoint.config.sampler == Sampler("euler")  # as `adopt` writes it
    ddim, lcm = made(None), made(Sampler("lcm"))
    assert torch.equal(ddim, made(Sampler("lcm"), "ddim")) and not torch.equal(ddim, lcm)
    assert torch.equal(lcm, made(None, {"name": "lcm"})) and not torch.equal(lcm, made(None, "lcm", seed=1))
    assert torch.equal(ddim, made(None, "ddim", seed=1))
    euler = made(Sampler("euler"))  # on the timesteps of "leading" it is the DDIM of this checkpoint
    assert torch.allclose(euler, ddim, rtol=1e-12, atol=1e-12) and not torch.equal(euler, ddim)


def test_a_branch_acts_in_both_evaluations_of_its_last_step(checkpoint: Checkpoint) -> None:
    """A window of the first two steps of four: four evaluations of Heun's, of which the UNet is told."""
    reference, net = reference_of(checkpoint)
    told: list[bool] = []

    def unet(latents: Tensor, timestep: Tensor, **options: Any) -> Any:
        told.append("mid_block_additional_residual" in options)
        options.pop("down_block_additional_residuals", None)
        return net(latents, timestep, **options)

    reference.unet = unet  # type: ignore[assignment]
    side = checkpoint.sample_size * checkpoint.vae_scale_factor
    controls = {"id_patch": ReferenceControl(torch.zeros(3, side, side), end=0.5)}
    noise = torch.from_numpy(step_noise(9, 0, (4, checkpoint.sample_size, checkpoint.sample_size)))[None]
    reference.generate("x", persons(), noise, num_inference_steps=4, sampler="heun", controls=controls)
    assert told == [True] * 3 * 4 + [False] * 3 * 3
