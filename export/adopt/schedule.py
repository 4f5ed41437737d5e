"""The noise schedule of a base model, as an adopted checkpoint writes it: DDIM on the same betas."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from realisid_trt.errors import CheckpointError

from ..checkpoint.checks import check_scheduler, with_defaults
from ..checkpoint.classes import quiet
from ..checkpoint.files import read_json, readable

FILE = "scheduler_config.json"
KEPT = (
    "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type",
    "timestep_spacing", "steps_offset", "rescale_betas_zero_snr",
)  # fmt: skip
CLIPS = ("clip_sample", "thresholding")
# Keys that space the steps of a sampler otherwise than by timesteps.
SIGMAS = {
    "use_karras_sigmas": "Karras", "use_exponential_sigmas": "exponential", "use_beta_sigmas": "beta",
    "use_lu_lambdas": "Lu's",
}  # fmt: skip
DISTILLED = ("LCMScheduler", "TCDScheduler")  # samplers of models that were distilled to a few steps


def ddim_schedule(folder: Path) -> dict[str, Any]:
    """The scheduler_config.json of the adopted checkpoint. folder: `scheduler/` of the base model.

    The betas, prediction type, spacing and offset are the base's, with the defaults of the base's own scheduler class.
    The last step ends at ᾱ = 1, as the samplers for which ControlNets are published do. Raises CheckpointError.
    """
    import diffusers

    where = folder / FILE
    with readable(folder):
        source = read_json(where, "it describes the noise schedule that the base model was trained on")
    name = source.get("_class_name", "DDIMScheduler")
    cls = getattr(diffusers, name, None) if isinstance(name, str) and name.endswith("Scheduler") else None
    if not (inspect.isclass(cls) and issubclass(cls, diffusers.SchedulerMixin)):
        raise CheckpointError(
            f"{where} names the class {name!r}, which is not a scheduler of diffusers {diffusers.__version__}. Copy "
            "the file from the base model that the UNet was trained on."
        )
    if name in DISTILLED:
        raise CheckpointError(
            f"{where}: {name} is the sampler of a model that was distilled to a few steps, and DDIM's steps are not "
            "what it learned. Such base models are not supported yet: take the model that it was distilled from."
        )
    for key, kind in SIGMAS.items():
        if source.get(key):
            raise CheckpointError(
                f"{where}: {key} is true. {name} with {kind} sigmas takes other steps than DDIM, the only sampler "
                f'here, and pictures would differ. If DDIM will do, copy the base model\'s folder, set "{key}": false '
                "in the copy, and give the copy as --base."
            )
    full = with_defaults(cls, source)
    values = {key: full[key] for key in KEPT if key in full}
    clips = {key: bool(source.get(key)) and key in inspect.signature(cls.__init__).parameters for key in CLIPS}
    values = {"_class_name": "DDIMScheduler", **values, "set_alpha_to_one": True, "clip_sample": False}
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
    return values
