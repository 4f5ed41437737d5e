"""The steps of every sampler, by diffusers' own schedulers; those of dpmpp-sde by k-diffusion's equations.

>>> steps = steps_of(Sampler("heun"), checkpoint.scheduler_config, 8, torch.float64)
>>> x = steps.begin(noise)
>>> for timestep, step in zip(steps.timesteps, steps.step_of):     # 15 evaluations of 8 steps
...     x = steps.step(network(steps.read(x), timestep), x, draw)
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from realisid_trt.loop.samplers import Sampler

from ..checkpoint.classes import quiet

Draw = Callable[[], Tensor]  # → the noise of an evaluation, of the latents' shape


@dataclass(frozen=True)
class DiffusersScheduler:
    """A scheduler of diffusers: its file and class, keys of its config, and arguments of its `step`."""

    file: str
    name: str
    config: Mapping[str, Any] = field(default_factory=dict)
    step: Mapping[str, Any] = field(default_factory=dict)


_EULER = DiffusersScheduler("scheduling_euler_discrete", "EulerDiscreteScheduler")
_HEUN = DiffusersScheduler("scheduling_heun_discrete", "HeunDiscreteScheduler")
_DPM = DiffusersScheduler("scheduling_dpmsolver_multistep", "DPMSolverMultistepScheduler")
_UNIPC = DiffusersScheduler("scheduling_unipc_multistep", "UniPCMultistepScheduler")
_SDE, _KARRAS = {"algorithm_type": "sde-dpmsolver++"}, {"use_karras_sigmas": True}

# every sampler but dpmpp-sde, which diffusers draws from a Brownian path
SCHEDULERS = {
    "ddim": DiffusersScheduler("scheduling_ddim", "DDIMScheduler", {"clip_sample": False}),
    "euler": _EULER,
    "euler-a": DiffusersScheduler("scheduling_euler_ancestral_discrete", "EulerAncestralDiscreteScheduler"),
    "heun": _HEUN,
    "dpmpp-2m": _DPM,
    "dpmpp-2m-sde": DiffusersScheduler(_DPM.file, _DPM.name, _SDE),
    "unipc": _UNIPC,
    "lcm": DiffusersScheduler("scheduling_lcm", "LCMScheduler", {"clip_sample": False}),
    "tcd": DiffusersScheduler("scheduling_tcd", "TCDScheduler", {"clip_sample": False}),
    "euler-karras": DiffusersScheduler(_EULER.file, _EULER.name, _KARRAS),
    "heun-karras": DiffusersScheduler(_HEUN.file, _HEUN.name, _KARRAS),
    "dpmpp-2m-karras": DiffusersScheduler(_DPM.file, _DPM.name, _KARRAS),
    "dpmpp-2m-sde-karras": DiffusersScheduler(_DPM.file, _DPM.name, _SDE | _KARRAS),
    "unipc-karras": DiffusersScheduler(_UNIPC.file, _UNIPC.name, _KARRAS),
}
# Classes that take no list of timesteps → a sampler with the same noise levels, whose class does.
_LISTS_OF = {"euler-a": "euler", "unipc": "dpmpp-2m"}


@cache
def module_of(file: str, wide: bool) -> Any:
    """A module of diffusers' schedulers, loaded a second time, so that its noise can be given.

    wide: every float32 in its source is read as float64.
    """
    plain: Any = importlib.import_module(f"diffusers.schedulers.{file}")
    text = Path(plain.__file__).read_text(encoding="utf-8")
    if wide:
        for word in ("torch.float32", "np.float32"):
            text = text.replace(word, word.replace("32", "64"))
    name = f"diffusers.schedulers.{'wide' if wide else 'plain'}_{file}"
    spec = importlib.util.spec_from_loader(name, loader=None, origin=plain.__file__)
    assert spec is not None
    found = importlib.util.module_from_spec(spec)
    found.__package__, found.__file__ = "diffusers.schedulers", plain.__file__
    sys.modules[name] = found
    exec(compile(text, plain.__file__, "exec"), found.__dict__)
    return found


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """torch makes tensors of this type here where nothing else is said."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def given_noise(module: Any, draw: Draw) -> Iterator[None]:
    """The schedulers of a module of `module_of` draw this noise here. Shape, generator and device do not matter."""
    theirs = module.__dict__.get("randn_tensor")
    module.randn_tensor = lambda *arguments, **options: draw()
    try:
        yield
    finally:
        module.randn_tensor = theirs


class Evaluations(Protocol):
    """The evaluations of the network that a sampler's steps need, one after another.

    timesteps: (R,) what the network reads. step_of: the step to which each evaluation belongs.
    """

    timesteps: Tensor
    step_of: list[int]

    def begin(self, noise: Tensor) -> Tensor:
        """The state x before the first evaluation, from standard normal noise."""

    def read(self, x: Tensor) -> Tensor:
        """The latents of the next evaluation, as the network was trained to read them."""

    def step(self, prediction: Tensor, x: Tensor, draw: Draw) -> Tensor:
        """The state after it; the final latents after the last one. prediction: of the network, guided."""


def steps_of(sampler: Sampler, ddim: Mapping[str, Any], num_inference_steps: int, dtype: torch.dtype) -> Evaluations:
    """The evaluations of so many steps on a noise schedule.

    ddim: every key of the DDIMScheduler of the schedule, as `Checkpoint.scheduler_config` has them. The levels ᾱ are
          those that it computes, in float32, as an engine has them.
    dtype: float64, or float32: the schedulers as they are.
    """
    assert sampler.timesteps is None or len(sampler.timesteps) == num_inference_steps, sampler
    if sampler.name.startswith("dpmpp-sde"):
        return KDiffusionSde(sampler, ddim, num_inference_steps, dtype)
    return SchedulerSteps(sampler, ddim, num_inference_steps, dtype)


def scheduler_of(sampler: Sampler, ddim: Mapping[str, Any], dtype: torch.dtype) -> Any:
    """diffusers' scheduler of a sampler, before its timesteps are set. ddim, dtype: as in `steps_of`."""
    theirs = SCHEDULERS[sampler.name]
    cls = getattr(module_of(theirs.file, dtype == torch.float64), theirs.name)
    said = {**ddim, **theirs.config}
    if sampler.spacing is not None:
        said["timestep_spacing"] = sampler.spacing
    if sampler.original_inference_steps is not None:
        said["original_inference_steps"] = sampler.original_inference_steps
    if _reads_noise(sampler, ddim):
        said["prediction_type"] = "epsilon"
    known = inspect.signature(cls.__init__).parameters
    with quiet(), default_dtype(dtype):
        scheduler = cls(**{key: value for key, value in said.items() if key in known})
        alphas = DDIMScheduler.from_config(dict(ddim)).alphas_cumprod.to(dtype)
    if alphas[-1] == 0:  # for which classes that step in σ have 2^-24
        alphas[-1] = scheduler.alphas_cumprod[-1]
    scheduler.alphas_cumprod = alphas
    if hasattr(scheduler, "final_alpha_cumprod"):
        scheduler.final_alpha_cumprod = alphas.new_tensor(1.0) if ddim["set_alpha_to_one"] else alphas[0]
    return scheduler


def _reads_noise(sampler: Sampler, ddim: Mapping[str, Any]) -> bool:
    """Whether the prediction is turned into noise first: EulerAncestral does not accept clean latents."""
    return sampler.name == "euler-a" and ddim["prediction_type"] == "sample"


def _ready(sampler: Sampler, ddim: Mapping[str, Any], num_inference_steps: int, dtype: torch.dtype) -> Any:
    """The same with its timesteps set."""
    scheduler, listed = scheduler_of(sampler, ddim, dtype), sampler.timesteps
    with quiet(), default_dtype(dtype):
        if listed is not None and sampler.name not in _LISTS_OF:
            scheduler.set_timesteps(timesteps=list(listed))
            return scheduler
        scheduler.set_timesteps(num_inference_steps)
    if listed is not None:
        levels = _ready(Sampler(_LISTS_OF[sampler.name], timesteps=listed), ddim, num_inference_steps, dtype)
        scheduler.timesteps, scheduler.sigmas = levels.timesteps, levels.sigmas
    return scheduler


class SchedulerSteps:
    """Steps of a scheduler of diffusers. x is its `sample`: the latents z, or z/α in Euler's and Heun's."""

    def __init__(self, sampler: Sampler, ddim: Mapping[str, Any], num_inference_steps: int, dtype: torch.dtype) -> None:
        theirs = SCHEDULERS[sampler.name]
        self._module, self._dtype = module_of(theirs.file, dtype == torch.float64), dtype
        self._scheduler = _ready(sampler, ddim, num_inference_steps, dtype)
        self._reads_noise = _reads_noise(sampler, ddim)
        self._options = dict(theirs.step)
        if sampler.eta is not None:
            self._options["eta"] = sampler.eta
        self.timesteps: Tensor = self._scheduler.timesteps
        self.step_of = [row // self._scheduler.order for row in range(len(self.timesteps))]
        self._row = 0

    def begin(self, noise: Tensor) -> Tensor:
        return noise * self._scheduler.init_noise_sigma

    def read(self, x: Tensor) -> Tensor:
        with default_dtype(self._dtype):
            latents: Tensor = self._scheduler.scale_model_input(x, self.timesteps[self._row])
        return latents

    def step(self, prediction: Tensor, x: Tensor, draw: Draw) -> Tensor:
        with default_dtype(self._dtype), given_noise(self._module, draw):
            if self._reads_noise:
                prediction = (x - prediction) / self._scheduler.sigmas[self._row]
            after: Tensor = self._scheduler.step(
                prediction, self.timesteps[self._row], x, return_dict=False, **self._options
            )[0]
        self._row += 1
        return after


class KDiffusionSde:
    """k-diffusion's sample_dpmpp_sde with eta and s_noise 1, r ½, one evaluation after another. x is z/α.

    σ and timesteps are those of diffusers' EulerDiscreteScheduler. Each evaluation has noise of its own, where
    k-diffusion draws both from one Brownian path. Source: crowsonkb/k-diffusion, k_diffusion/sampling.py.
    """

    def __init__(self, sampler: Sampler, ddim: Mapping[str, Any], num_inference_steps: int, dtype: torch.dtype) -> None:
        euler = _ready(
            replace(sampler, name=sampler.name.replace("dpmpp-sde", "euler")), ddim, num_inference_steps, dtype
        )
        self._prediction_type = ddim["prediction_type"]
        self._init_sigma = float(euler.init_noise_sigma)
        alphas = euler.alphas_cumprod.double().numpy()
        logs = 0.5 * np.log((1 - alphas) / alphas)
        sigmas, timesteps = euler.sigmas.double().tolist(), euler.timesteps.double().tolist()
        # of each evaluation: σ of the step, σ of the network's input, σ after the step
        self._levels, self.step_of, listed = list[tuple[float, float, float]](), list[int](), list[float]()
        for number, timestep in enumerate(timesteps):
            sigma, after = sigmas[number : number + 2]
            self._levels.append((sigma, sigma, after))
            listed.append(timestep)
            self.step_of.append(number)
            if after > 0:
                middle = math.exp((math.log(sigma) + math.log(after)) / 2)
                self._levels.append((sigma, middle, after))
                listed.append(float(np.interp(math.log(middle), logs, np.arange(len(logs)))))
                self.step_of.append(number)
        self.timesteps = torch.tensor(listed, dtype=dtype)
        self._row, self._started = 0, torch.empty(0)

    def begin(self, noise: Tensor) -> Tensor:
        return noise * self._init_sigma

    def read(self, x: Tensor) -> Tensor:
        return x / math.sqrt(1 + self._levels[self._row][1] ** 2)

    def step(self, prediction: Tensor, x: Tensor, draw: Draw) -> Tensor:
        sigma, read_at, after = self._levels[self._row]
        self._row += 1
        denoised = self._denoised(prediction, x, read_at)
        if after == 0:  # Euler's method
            return x + (x - denoised) / sigma * (after - sigma)
        first = read_at == sigma
        if first:
            self._started = x
            after = self._levels[self._row][1]
        up = min(after, math.sqrt(after**2 * (sigma**2 - after**2) / sigma**2))
        down = math.sqrt(after**2 - up**2)
        t, t_down = -math.log(sigma), -math.log(down)
        return down / sigma * self._started - math.expm1(t - t_down) * denoised + draw() * up

    def _denoised(self, prediction: Tensor, x: Tensor, sigma: float) -> Tensor:
        """The clean latents that a prediction implies, of x = z/α."""
        if self._prediction_type == "epsilon":
            return x - sigma * prediction
        if self._prediction_type == "v_prediction":
            return x / (sigma**2 + 1) - sigma / math.sqrt(sigma**2 + 1) * prediction
        return prediction
