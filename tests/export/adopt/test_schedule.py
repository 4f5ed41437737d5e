"""The base model's own sampler, as an adopted checkpoint names it."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from export.adopt.schedule import OFFERED, read_schedule
from export.truth.schedulers import SCHEDULERS as SAMPLERS
from realisid_trt import Sampler
from realisid_trt.errors import CheckpointError
from realisid_trt.loop.samplers import NAMES, table_of
from tests.export.adopt.published import SCHEDULERS, write
from tests.export.adopt.test_adopt import XINSIR, adopt, opened

SDE, KARRAS = {"algorithm_type": "sde-dpmsolver++"}, {"use_karras_sigmas": True}
# class and keys of the base model → the key `sampler`
OWN: list[tuple[str, dict[str, Any], Any]] = [
    ("DDIMScheduler", {}, "ddim"),
    ("EulerDiscreteScheduler", {}, "euler"),
    ("EulerDiscreteScheduler", {**KARRAS, "sigma_min": None, "timestep_type": "discrete"}, "euler-karras"),
    ("EulerDiscreteScheduler", {"timestep_spacing": "trailing"}, "euler"),
    ("EulerAncestralDiscreteScheduler", {}, "euler-a"),
    ("EulerAncestralDiscreteScheduler", KARRAS, "euler-a"),  # a key that the class does not have
    ("HeunDiscreteScheduler", {}, "heun"),
    ("HeunDiscreteScheduler", KARRAS, "heun-karras"),
    ("DPMSolverMultistepScheduler", {}, "dpmpp-2m"),
    ("DPMSolverMultistepScheduler", {**KARRAS, "euler_at_final": True, "solver_type": "midpoint"}, "dpmpp-2m-karras"),
    ("DPMSolverMultistepScheduler", {**SDE, "lower_order_final": False}, "dpmpp-2m-sde"),
    ("DPMSolverMultistepScheduler", {**SDE, **KARRAS}, "dpmpp-2m-sde-karras"),
    ("UniPCMultistepScheduler", {"solver_order": 2, "disable_corrector": []}, "unipc"),
    ("UniPCMultistepScheduler", {**KARRAS, "timestep_spacing": "linspace"}, "unipc-karras"),
    ("LCMScheduler", {}, "lcm"),
    ("LCMScheduler", {"original_inference_steps": 100}, {"name": "lcm", "original_inference_steps": 100}),
    ("TCDScheduler", {"timestep_spacing": "trailing"}, "tcd"),
]
# class, key and value whose steps are not offered → what is said
OTHERWISE: list[tuple[str, dict[str, Any], str]] = [
    ("EulerDiscreteScheduler", {"interpolation_type": "log_linear"}, "interpolation_type is 'log_linear', and euler"),
    ("EulerDiscreteScheduler", {**KARRAS, "sigma_max": 80.0}, "sigma_max is 80.0, and euler takes the steps of Euler"),
    ("EulerDiscreteScheduler", {"timestep_type": "continuous"}, "timestep_type is 'continuous', and euler"),
    (
        "DPMSolverMultistepScheduler",
        {"solver_order": 3},
        "solver_order is 3, and dpmpp-2m takes the steps of DPM",
    ),
    ("DPMSolverMultistepScheduler", {"solver_type": "heun"}, "solver_type is 'heun', and dpmpp-2m"),
    ("DPMSolverMultistepScheduler", {"lambda_min_clipped": -5.1}, "lambda_min_clipped is -5.1, and dpmpp-2m"),
    (
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"},
        "algorithm_type is 'dpmsolver', and dpmpp-2m",
    ),
    (
        "DPMSolverMultistepScheduler",
        {"use_lu_lambdas": True},
        "use_lu_lambdas is true. No sampler here takes the",
    ),
    ("UniPCMultistepScheduler", {"solver_type": "bh1"}, "solver_type is 'bh1', and unipc"),
    ("UniPCMultistepScheduler", {"disable_corrector": [0]}, "disable_corrector is [0], and unipc takes the steps of"),
    ("UniPCMultistepScheduler", {"predict_x0": False}, "predict_x0 is False, and unipc"),
    (
        "LCMScheduler",
        {"timestep_scaling": 8.0},
        "timestep_scaling is 8.0, and lcm takes the steps of LCMScheduler with",
    ),
    ("TCDScheduler", {"clip_sample": True}, "clip_sample is true; the fused step is linear"),
    ("HeunDiscreteScheduler", {"clip_sample": True}, "clip_sample is true; the fused step is linear"),
    ("UniPCMultistepScheduler", {"thresholding": True}, "thresholding is true; the fused step is linear"),
]


def base(here: Path, name: str, **keys: Any) -> Path:
    """The base model with another scheduler. Returns `scheduler/`."""
    given = {**SCHEDULERS["sdxl"], "_class_name": name, **keys}
    write(here / "SDXL" / "scheduler" / "scheduler_config.json", given)
    return here / "SDXL" / "scheduler"


@pytest.mark.parametrize(("name", "keys", "expected"), OWN)
def test_the_sampler_is_the_base_model_s_own(name: str, keys: dict[str, Any], expected: Any, here: Path) -> None:
    """And `scheduler/` keeps the schedule, of which the sampler takes the timesteps that the base's class takes."""
    folder = base(here, name, **keys)
    out = adopt(f"controlnet --net {XINSIR} --base SDXL --out OUT")
    assert json.loads((out / "realisid_config.json").read_text())["sampler"] == expected
    checkpoint = opened(out)
    assert checkpoint.config.sampler == Sampler.of(expected)
    config = checkpoint.scheduler_config
    assert config["timestep_spacing"] == keys.get("timestep_spacing", "leading") and config["steps_offset"] == 1
    assert config["set_alpha_to_one"] == (name != "DDIMScheduler")  # SDXL's file says false, which only DDIM reads
    theirs = getattr(diffusers, name).from_pretrained(folder)
    theirs.set_timesteps(8)
    table = table_of(Sampler.of(expected), checkpoint.noise_schedule, 8)
    assert torch.allclose(torch.from_numpy(table.timesteps), theirs.timesteps.double(), rtol=1e-5, atol=1e-3)


def test_every_sampler_of_diffusers_is_some_base_s_own() -> None:
    """dpmpp-sde has no class in diffusers alone: it needs the package torchsde."""
    assert {Sampler.of(sampler).name for *_, sampler in OWN} == set(SAMPLERS)
    assert set(NAMES) - set(SAMPLERS) == {"dpmpp-sde", "dpmpp-sde-karras"}
    assert {theirs.name for theirs in SAMPLERS.values()} == set(OFFERED)


@pytest.mark.parametrize("name", OFFERED)
def test_every_key_of_a_class_is_weighed(name: str) -> None:
    """The schedule, what is refused, and keys that change no step of the sampler. A new key of diffusers fails here."""
    parameters = inspect.signature(getattr(diffusers, name).__init__).parameters
    schedule = {
        "self", "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type",
        "timestep_spacing", "steps_offset", "rescale_betas_zero_snr", "set_alpha_to_one",
    }  # fmt: skip
    refused = {
        "clip_sample", "thresholding", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas",
        "use_lu_lambdas", "use_flow_sigmas", "original_inference_steps",
    }  # fmt: skip
    idle = {
        "clip_sample_range", "dynamic_thresholding_ratio", "sample_max_value", "flow_shift", "time_shift_type",
        "euler_at_final", "variance_type",
    }  # fmt: skip
    if name == "DPMSolverMultistepScheduler":
        idle.add("lower_order_final")
    if name == "TCDScheduler":
        idle.add("timestep_scaling")
    assert set(parameters) - schedule - refused - idle == set(OFFERED[name].options)
    for key, values in OFFERED[name].options.items():
        assert parameters[key].default in values


@pytest.mark.parametrize(("name", "keys", "said"), OTHERWISE)
def test_steps_that_are_not_offered_are_refused(name: str, keys: dict[str, Any], said: str, here: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        read_schedule(base(here, name, **keys))
    assert said in str(caught.value)


@pytest.mark.parametrize("name", ["PNDMScheduler", "DPMSolverSinglestepScheduler", "DDPMScheduler"])
def test_a_sampler_that_is_not_offered_leaves_ddim(name: str, here: Path, capsys: Any) -> None:
    base(here, name)
    out = adopt(f"controlnet --net {XINSIR} --base SDXL --out OUT")
    assert "sampler" not in json.loads((out / "realisid_config.json").read_text())
    checkpoint = opened(out)
    assert checkpoint.config.sampler is None and checkpoint.scheduler_config["set_alpha_to_one"]
    assert (
        f"note: the base model's own sampler, {name}, is not offered here: pictures are sampled by DDIM on the same "
        "noise schedule"
    ) in capsys.readouterr().out.splitlines()


def test_sd15_is_sampled_by_ddim(here: Path, capsys: Any) -> None:
    assert opened(adopt("mediapipe-face --weights face --base SD15 --variant fp16 --out OUT")).config.sampler is None
    assert "note: the base model's own sampler, PNDMScheduler, is not offered here" in capsys.readouterr().out


def test_a_sampler_of_distilled_weights_is_noted(here: Path, capsys: Any) -> None:
    base(here, "LCMScheduler")
    adopt(f"controlnet --net {XINSIR} --base SDXL --out OUT")
    said = capsys.readouterr().out
    assert "sampler: lcm, the base model's own (LCMScheduler)\n" in said
    assert "note: lcm is for weights that were distilled to a few steps. Set num_inference_steps and guid" in said


def test_add_keeps_the_sampler(here: Path) -> None:
    """Of an adopted checkpoint, whatever the base model says by now; and RealisID's keeps DDIM by having none."""
    adopt("controlnet --net canny=canny --base SDXL --out first")
    base(here, "HeunDiscreteScheduler")
    more = adopt(f"add --checkpoint first --net {XINSIR} --out MORE")
    assert opened(more).config.sampler == Sampler("euler")
    realisid = adopt(f"add --checkpoint CKPT --net {XINSIR} --out OUT")
    assert "sampler" not in json.loads((realisid / "realisid_config.json").read_text())
