"""Commands, places and base models that are refused, with these pieces of the sentence that helps."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from tests.export.adopt.bad_sources import ADD, FACE, ONE, Bad, Spoil, nothing, replace
from tests.export.checkpoint.bad_checkpoints import edit, put


def scheduler(**changes: Any) -> Spoil:
    return lambda here: edit(here / "SDXL" / "scheduler" / "scheduler_config.json", **changes)


def is_left(here: Path) -> None:
    (here / "OUT").mkdir()
    (here / "OUT" / "thesis.txt").write_text("years of work")


SETTINGS = "NAME=FOLDER[,style=STYLE][,scale=NUMBER][,start=NUMBER][,end=NUMBER]"
COMMANDS: Bad = {
    # the command
    "no name": (nothing, ONE.replace("openpose=", ""), 2, (f"--net openpose: expected {SETTINGS}.",)),
    "no folder": (nothing, ONE.replace("=openpose", "="), 2, (f"--net openpose=: expected {SETTINGS}.",)),
    "a large name": (nothing, ONE.replace("openpose=", "Pose="), 2, ("'Pose' cannot be a branch's name. Use small",)),
    "a network's name": (nothing, ONE.replace("openpose=", "unet="), 2, ("and none of unet, vae, id, text",)),
    "style": (
        nothing,
        ONE.replace("=openpose", "=openpose,style=x"),
        2,
        ("style is 'x', expected one of openpose-mm",),
    ),
    "scale": (nothing, ONE.replace("=openpose", "=openpose,scale=big"), 2, ("scale is 'big', expected a number.",)),
    "infinite": (nothing, ONE.replace("=openpose", "=openpose,scale=inf"), 2, ("scale is 'inf', expected a number.",)),
    "start": (nothing, ONE.replace("=openpose", "=openpose,start=-1"), 2, ("start is '-1', expected a number from 0",)),
    "end": (
        nothing,
        ONE.replace("=openpose", "=openpose,end=1.5"),
        2,
        ("end is '1.5', expected a number from 0 to 1",),
    ),
    "window": (
        nothing,
        ONE.replace("=openpose", "=openpose,start=0.6,end=0.5"),
        2,
        ("--net openpose: start is 0.6, expected a number from 0 to 1, less than end. Give another value.",),
    ),
    "twice": (nothing, ONE.replace("=openpose", "=openpose,end=1,end=0"), 2, ("end is given twice. Leave one out.",)),
    "another setting": (
        nothing,
        ONE.replace("=openpose", "=openpose,stile=x"),
        2,
        ("--net openpose=openpose,stile=x: unknown setting stile. Known: style, scale, start, end.",),
    ),
    "two of a name": (
        nothing,
        ONE.replace("--base", "--net openpose=canny --base"),
        2,
        ("two nets are named openpose. Give each its own name.",),
    ),
    "a row that is there": (
        nothing,
        ADD.replace("openpose=", "local="),
        2,
        ("has a branch local already (its branches: local, global). Give the net another name.",),
    ),
    "a folder that is there": (
        lambda p: (p / "CKPT" / "controlnet_openpose").mkdir() or put(p / "CKPT/controlnet_openpose/notes.txt", "x"),
        ADD,
        1,
        ("CKPT/controlnet_openpose is there already, and no row of realisid_config.json names it. Remove the folder",),
    ),
    # where it goes
    "taken": (
        is_left,
        ONE,
        2,
        ("OUT exists and is not a checkpoint made by export.adopt, so it is never overwritten",),
    ),
    "a file": (lambda p: put(p / "OUT", "x"), ONE, 2, ("OUT exists and is not a checkpoint made by export.adopt",)),
    "into a source": (
        nothing,
        ONE.replace("OUT", "openpose/OUT"),
        2,
        ("--out openpose/OUT lies in ", "and sources are never written. Choose another --out."),
    ),
    "onto a source": (nothing, ADD.replace("OUT", "CKPT"), 2, ("--out CKPT is ", "sources are never written")),
    "around a source": (nothing, ONE.replace("OUT", "."), 2, ("--out . holds ", "sources are never written")),
}
BASES: Bad = {
    # the base model
    "SD 2.1": (
        nothing,
        FACE.replace("--weights face", "--weights root"),
        1,
        (
            "root is a ControlNet of cross_attention_dim 40, ",
            "and the base model SD15 is a model of cross_attention_dim 48.",
        ),
    ),
    "SD 2.1 by its width": (
        lambda p: (
            replace("openpose", "sd15", 9, cross_attention_dim=1024)(p),
            edit(p / "SD15" / "unet" / "config.json", cross_attention_dim=768),
        ),
        ONE.replace("SDXL", "SD15"),
        1,
        (
            "openpose is a ControlNet of SD 2.1 (cross_attention_dim 1024), ",
            "and the base model SD15 is a model of SD 1.5 (cross_attention_dim 768).",
        ),
    ),
    "another family": (
        nothing,
        ONE.replace("SDXL", "SD15"),
        1,
        ("openpose is a ControlNet", "the base model SD15 is", "Take a ControlNet and a base model of one family."),
    ),
    "another family in a checkpoint": (
        nothing,
        ADD.replace("=openpose", "=face/diffusion_sd15") + " --variant fp16",
        1,
        ("face/diffusion_sd15 is a ControlNet", "the base model CKPT is"),
    ),
    "blocks": (
        replace("openpose", "sdxl", 9, block_out_channels=(16, 32, 32)),
        ONE,
        1,
        ("controlnet_openpose gives 10 residuals", "take the base model"),
    ),
    "no base": (nothing, ONE.replace("SDXL", "no.where"), 1, ("no.where is not a folder, and not the id", "--base.")),
    "a base in one file": (
        lambda p: put(p / "sdxl.safetensors", "x"),
        ONE.replace("SDXL", "sdxl.safetensors"),
        1,
        ("sdxl.safetensors is a file, expected a folder", "from_single_file"),
    ),
    "a hub base that is not here": (
        nothing,
        ONE.replace("SDXL", "somebody/nothing"),
        1,
        (
            "the base model somebody/nothing is neither a folder here nor in the hub's cache of this machine",
            "its noise schedule and widths are needed",
            "(hf download somebody/nothing), or give its folder as --base.",
        ),
    ),
    "half a base": (
        lambda p: (shutil.rmtree(p / "SDXL/vae"), shutil.rmtree(p / "SDXL/scheduler")),
        ONE,
        1,
        ("the base model SDXL", "lacks vae, scheduler. Expected a whole model in diffusers' layout"),
    ),
    "no checkpoint": (nothing, ADD.replace("CKPT", "nowhere"), 1, ("nowhere does not exist, expected a checkpoint",)),
    "licences": (
        lambda p: edit(p / "CKPT" / "model_index.json", licences=[{"part": 1}]),
        ADD,
        1,
        ("licences is not a list of objects with the keys part, licence, source",),
    ),
    # its noise schedule
    "Karras, in a class that is not offered": (
        scheduler(_class_name="KDPM2DiscreteScheduler", use_karras_sigmas=True),
        ONE,
        1,
        (
            "use_karras_sigmas is true. No sampler here takes the steps of KDPM2DiscreteScheduler with Karras sigmas",
            'If DDIM without them will do, copy the base model\'s folder, set "use_karras_sigmas": false in the copy',
        ),
    ),
    "exponential": (
        scheduler(use_exponential_sigmas=True),
        ONE,
        1,
        (
            "use_exponential_sigmas is true. No sampler here takes the steps of EulerDiscreteScheduler with exp",
            "If euler without them will do, copy the base model's folder,",
        ),
    ),
    "beta": (scheduler(use_beta_sigmas=True), ONE, 1, ("EulerDiscreteScheduler with beta sigmas",)),
    "an end above 0": (
        scheduler(final_sigmas_type="sigma_min"),
        ONE,
        1,
        (
            "final_sigmas_type is 'sigma_min', and euler takes the steps of EulerDiscreteScheduler with \"zero\", so",
            'If those will do, copy the base model\'s folder, set "final_sigmas_type": "zero" in the copy, and',
        ),
    ),
    "more steps than a distillation has": (
        scheduler(_class_name="LCMScheduler", original_inference_steps=20),
        ONE,
        1,
        ("by default 30 steps of lcm would be taken. num_inference_steps is 30; lcm takes its steps from the 20",),
    ),
    "half a distillation": (
        scheduler(_class_name="TCDScheduler", original_inference_steps=0.5),
        ONE,
        1,
        ("scheduler_config.json: original_inference_steps is 0.5, expected a whole number of at least 1. Correct the",),
    ),
    "no scheduler": (scheduler(_class_name="UNet2DModel"), ONE, 1, ("names the class 'UNet2DModel', which is not a",)),
    "flow": (
        scheduler(_class_name="FlowMatchEulerDiscreteScheduler", shift=3.0),
        ONE,
        1,
        ("with shift is another kind of noise schedule",),
    ),
    "no betas": (scheduler(beta_start=...), ONE, 1, ("neither beta_start and beta_end nor trained_betas are given",)),
    "clipping": (scheduler(_class_name="DDIMScheduler", clip_sample=True), ONE, 1, ("clip_sample is true; the fused",)),
    "clipping by default": (
        scheduler(_class_name="DDIMScheduler", clip_sample=...),
        ONE,
        1,
        ("clip_sample is not set, which DDIM reads as true; the fused",),
    ),
    "prediction": (
        scheduler(prediction_type="flow_prediction"),
        ONE,
        1,
        ("prediction_type is 'flow_prediction', expected epsilon or v_prediction or sample",),
    ),
    "beta schedule": (scheduler(beta_schedule="cosine"), ONE, 1, ("does not give a schedule for DDIM",)),
    "betas": (scheduler(beta_end=float("nan")), ONE, 1, ("its alphas_cumprod are not in 0..1. Correct the file.",)),
}
