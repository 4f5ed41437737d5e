"""Ways to spoil the noise schedule and the sampler of a good checkpoint, with pieces of the sentence that helps."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.export.checkpoint.bad_checkpoints import edit, put


def scheduler(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit(folder / "scheduler" / "scheduler_config.json", **changes)


EDM = {  # Playground v2.5's
    "_class_name": "EDMDPMSolverMultistepScheduler", "sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5,
    "num_train_timesteps": 1000, "prediction_type": "epsilon", "solver_order": 2, "rho": 7.0,
}  # fmt: skip

# name → (what is done to a good checkpoint, pieces of the error)
BAD_SCHEDULES: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "clipping": (scheduler(clip_sample=True), ("clip_sample is true; the fused step", '"clip_sample": false')),
    "clipping by default": (scheduler(clip_sample=...), ("clip_sample is not set, which DDIM reads as true",)),
    "thresholding": (scheduler(thresholding=True), ("thresholding is true; the fused step is linear",)),
    "flow prediction": (
        scheduler(prediction_type="flow_prediction"),
        ("prediction_type is 'flow_prediction', expected epsilon or v_prediction or sample",),
    ),
    "eta": (
        scheduler(eta=0.5),
        (
            "eta is 0.5, expected 0: the noise of a step belongs to the sampler. Remove the key, and write",
            '"eta": 0.5}',
        ),
    ),
    "another sampler": (
        lambda p: edit(p / "realisid_config.json", sampler="pndm"),
        ("/realisid_config.json: sampler: pndm is not offered: it keeps three or more", "Correct the file."),
    ),
    "an option of another sampler": (
        lambda p: edit(p / "realisid_config.json", sampler={"name": "euler", "eta": 0.5}),
        ("/realisid_config.json: sampler: euler has no eta; it has spacing, timesteps. Leave it out",),
    ),
    "timesteps that are not the steps": (
        lambda p: edit(p / "realisid_config.json", sampler={"name": "lcm", "timesteps": [999, 749, 499, 249]}),
        (
            "/realisid_config.json: sampler has 4 timesteps, and num_inference_steps is 30. Write num_inference_steps",
            "4, or as many timesteps as there are steps.",
        ),
    ),
    "timesteps beyond the schedule": (
        lambda p: edit(p / "realisid_config.json", num_inference_steps=1, sampler={"name": "lcm", "timesteps": [1000]}),
        ("realisid_config.json: by default 1 step of lcm would be taken. timesteps begins with 1000, expected at",),
    ),
    "more steps than the distillation": (
        lambda p: edit(p / "realisid_config.json", sampler={"name": "tcd", "original_inference_steps": 20}),
        ("by default 30 steps of tcd would be taken. num_inference_steps is 30; tcd takes its steps from the 20",),
    ),
    "pure noise that no step reads": (
        lambda p: (
            scheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction")(p),
            edit(p / "realisid_config.json", sampler="dpmpp-2m"),
        ),
        ("by default 30 steps of dpmpp-2m would be taken. This checkpoint's noise schedule begins in pure noise",),
    ),
    "steps": (
        lambda p: edit(p / "realisid_config.json", steps=4),
        ("/realisid_config.json: steps is 4, expected one of free, fixed. Correct the file.",),
    ),
    "zero SNR": (scheduler(rescale_betas_zero_snr=True), ("rescale_betas_zero_snr with prediction_type epsilon",)),
    "schedule": (scheduler(beta_schedule="cosine"), ("is not a config of a DDIM scheduler",)),
    "betas": (scheduler(beta_end=float("nan")), ("a config of a DDIM scheduler: its alphas_cumprod are not in 0..1",)),
    "spacing": (
        scheduler(timestep_spacing="karras"),
        ("timestep_spacing is 'karras', expected leading or trailing or linspace",),
    ),
    "EDM": (
        lambda p: put(p / "scheduler" / "scheduler_config.json", json.dumps(EDM)),
        ("EDMDPMSolverMultistepScheduler with sigma_data is another kind of noise schedule", "trained on one"),
    ),
    "EDM that was told not to clip": (
        lambda p: put(p / "scheduler" / "scheduler_config.json", json.dumps({**EDM, "clip_sample": False})),
        ("is another kind of noise schedule (EDM or flow matching)",),
    ),
    "EDM under another name": (scheduler(sigma_data=0.5), ("with sigma_data is another kind of noise schedule",)),
    "flow matching": (
        scheduler(_class_name="FlowMatchEulerDiscreteScheduler", shift=3.0),
        ("FlowMatchEulerDiscreteScheduler with shift is another kind",),
    ),
    "flow sigmas": (
        scheduler(_class_name="UniPCMultistepScheduler", use_flow_sigmas=True),
        ("with use_flow_sigmas is another kind",),
    ),
    "no betas": (
        scheduler(beta_start=..., beta_end=...),
        ("neither beta_start and beta_end nor trained_betas are given", "Copy the file from the base model"),
    ),
    "one beta": (scheduler(beta_end=...), ("neither beta_start and beta_end nor",)),
    "offset": (scheduler(steps_offset=None), ("steps_offset is None, expected a whole number from 0 to 999",)),
    "too many steps": (
        scheduler(num_train_timesteps=20),
        ("num_inference_steps is 30, the scheduler's num_train_timesteps is 20. Correct the wrong one",),
    ),
}
