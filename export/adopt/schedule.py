"""The noise schedule and the sampler of a base model, as an adopted checkpoint writes them."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from realisid_trt.errors import CheckpointError, RequestError
from realisid_trt.loop.samplers import ORIGINAL_INFERENCE_STEPS, Sampler

from ..checkpoint.checks import check_scheduler, with_defaults
from ..checkpoint.classes import quiet
from ..checkpoint.files import read_json, readable

FILE = "scheduler_config.json"
KEPT = (
    "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type",
    "timestep_spacing", "steps_offset", "rescale_betas_zero_snr",
)  # fmt: skip
CLIPS = ("clip_sample", "thresholding")
KARRAS = "use_karras_sigmas"
# Keys that space the steps of a sampler otherwise than by timesteps.
SIGMAS = {
    KARRAS: "Karras", "use_exponential_sigmas": "exponential", "use_beta_sigmas": "beta", "use_lu_lambdas": "Lu's",
}  # fmt: skip
DDIM = "DDIMScheduler"


@dataclass(frozen=True)
class _Offered:
    """A scheduler class of diffusers that is offered here.

    name:    of the sampler. karras: whether there is a NAME-karras.
    options: its keys that change its steps → the values with which they are those of the sampler.
    """

    name: str
    karras: bool = False
    options: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)


_ENDS_AT_ZERO = {"final_sigmas_type": ("zero",)}
_UNBOUNDED = {"sigma_min": (None,), "sigma_max": (None,)}
# Of order 2, "lower_order_final" and "euler_at_final" change nothing in DPM-Solver++ that ends at σ = 0, and
# "variance_type" nothing in a network without a second output.
OFFERED = {
    DDIM: _Offered("ddim"),
    "EulerDiscreteScheduler": _Offered(
        "euler",
        karras=True,
        options={"interpolation_type": ("linear",), "timestep_type": ("discrete",), **_ENDS_AT_ZERO, **_UNBOUNDED},
    ),
    "EulerAncestralDiscreteScheduler": _Offered("euler-a"),
    "HeunDiscreteScheduler": _Offered("heun", karras=True),
    "DPMSolverMultistepScheduler": _Offered(
        "dpmpp-2m",
        karras=True,
        options={
            "algorithm_type": ("dpmsolver++", "sde-dpmsolver++"),
            "solver_order": (2,),
            "solver_type": ("midpoint", "logrho", "bh1", "bh2"),
            "lambda_min_clipped": (-float("inf"),),
            "use_dynamic_shifting": (False,),
            **_ENDS_AT_ZERO,
        },
    ),
    "UniPCMultistepScheduler": _Offered(
        "unipc",
        karras=True,
        options={
            "solver_order": (2,),
            "solver_type": ("bh2", "midpoint", "heun", "logrho"),
            "predict_x0": (True,),
            "lower_order_final": (True,),
            "disable_corrector": ([],),
            "solver_p": (None,),
            "use_dynamic_shifting": (False,),
            "shift_terminal": (None,),
            **_ENDS_AT_ZERO,
            **_UNBOUNDED,
        },
    ),
    "LCMScheduler": _Offered("lcm", options={"timestep_scaling": (10.0,)}),
    "TCDScheduler": _Offered("tcd"),
}
DISTILLED = ("lcm", "tcd")  # samplers of models that were distilled to a few steps


@dataclass(frozen=True)
class BaseSchedule:
    """What an adopted checkpoint says of its steps.

    scheduler: scheduler_config.json, of a DDIMScheduler. sampler: the base model's own; None: DDIM in its place.
    said:      sentences for the person who adopts.
    """

    scheduler: dict[str, Any]
    sampler: Sampler | None
    said: tuple[str, ...]

    @property
    def config(self) -> dict[str, Any]:
        """Keys of realisid_config.json."""
        return {} if self.sampler is None else {"sampler": self.sampler.to_json()}


def read_schedule(folder: Path) -> BaseSchedule:
    """The schedule and the sampler of a base model. folder: its `scheduler/`.

    The betas, prediction type, spacing and offset are the base's, with the defaults of the base's own scheduler class.
    DDIM on this schedule ends at ᾱ = 1, as the samplers for which ControlNets are published do, unless the base's own
    DDIM ends elsewhere. Raises CheckpointError, also for options of a sampler that change its steps to others than are
    offered here.
    """
    import diffusers

    where = folder / FILE
    with readable(folder):
        source = read_json(where, "it describes the noise schedule that the base model was trained on")
    name = source.get("_class_name", DDIM)
    cls = getattr(diffusers, name, None) if isinstance(name, str) and name.endswith("Scheduler") else None
    if not (inspect.isclass(cls) and issubclass(cls, diffusers.SchedulerMixin)):
        raise CheckpointError(
            f"{where} names the class {name!r}, which is not a scheduler of diffusers {diffusers.__version__}. Copy "
            "the file from the base model that the UNet was trained on."
        )
    known = inspect.signature(cls.__init__).parameters
    full = with_defaults(cls, {key: value for key, value in source.items() if key in (*known, *KEPT)})
    values = {key: full[key] for key in KEPT if key in full}
    ends_at_one = full["set_alpha_to_one"] if name == DDIM else True
    values = {"_class_name": DDIM, **values, "set_alpha_to_one": ends_at_one, "clip_sample": False}
    clips = {key: bool(full.get(key)) for key in CLIPS}
    try:
        check_scheduler({**with_defaults(diffusers.DDIMScheduler, values), **clips}, source)
        with quiet():
            scheduler: Any = diffusers.DDIMScheduler.from_config(values)  # type: ignore[no-untyped-call]
        if not ((scheduler.alphas_cumprod >= 0) & (scheduler.alphas_cumprod <= 1)).all():  # NaN is neither
            raise ValueError("its alphas_cumprod are not in 0..1")
    except CheckpointError as error:
        raise CheckpointError(f"the base model's {folder.parent}/{error}") from error
    except Exception as error:  # ValueError, NotImplementedError, or others for a wrong value
        raise CheckpointError(f"{where} does not give a schedule for DDIM: {error}. Correct the file.") from error
    sampler = _sampler(name, full, where)
    return BaseSchedule(values, sampler, _said(name, sampler))


def _sampler(name: str, full: Mapping[str, Any], where: Path) -> Sampler | None:
    """The sampler of a scheduler class with these keys; None: it is not offered. Raises CheckpointError."""
    offered = OFFERED.get(name)
    for key, kind in SIGMAS.items():
        if full.get(key) and not (key == KARRAS and offered is not None and offered.karras):
            raise CheckpointError(
                f"{where}: {key} is true. No sampler here takes the steps of {name} with {kind} sigmas, and pictures "
                f"would differ. If {'DDIM' if offered is None else offered.name} without them will do, "
                f"{_in_a_copy(key, 'false')}"
            )
    if offered is None:
        return None
    for key, values in offered.options.items():
        if key in full and full[key] not in values:
            usual = json.dumps(values[0])
            raise CheckpointError(
                f"{where}: {key} is {full[key]!r}, and {offered.name} takes the steps of {name} with {usual}, so "
                f"pictures would differ. If those will do, {_in_a_copy(key, usual)}"
            )
    given: dict[str, Any] = {"name": offered.name}
    if str(full.get("algorithm_type", "")).startswith("sde"):
        given["name"] += "-sde"
    if full.get(KARRAS):
        given["name"] += "-karras"
    if offered.name in DISTILLED and full["original_inference_steps"] != ORIGINAL_INFERENCE_STEPS:
        given["original_inference_steps"] = full["original_inference_steps"]
    try:
        return Sampler(**given)
    except RequestError as error:
        raise CheckpointError(f"{where}: {error} Correct the file.") from error


def _in_a_copy(key: str, value: str) -> str:
    return f'copy the base model\'s folder, set "{key}": {value} in the copy, and give the copy as --base.'


def _said(name: str, sampler: Sampler | None) -> tuple[str, ...]:
    if sampler is None:
        return (
            f"note: the base model's own sampler, {name}, is not offered here: pictures are sampled by DDIM on the "
            "same noise schedule",
        )
    said = f"sampler: {sampler.name}, the base model's own ({name})"
    if sampler.name not in DISTILLED:
        return (said,)
    return (
        said,
        f"note: {sampler.name} is for weights that were distilled to a few steps. Set num_inference_steps and "
        "guidance_scale in realisid_config.json to what they were published with; where their authors write guidance "
        "0, it is guidance_scale 1 here",
    )
