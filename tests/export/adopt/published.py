"""Small ControlNets in the layouts of the published ones, and base models as they are published: random numbers."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import ControlNetModel

from export.checkpoint.classes import quiet
from export.miniature import make_checkpoint

STEM = "diffusion_pytorch_model"
SHAPES: dict[str, dict[str, Any]] = {
    "sdxl": {
        "block_out_channels": (16, 32, 64), "transformer_layers_per_block": [1, 1, 2], "attention_head_dim": [2, 4, 8],
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "norm_num_groups": 8, "cross_attention_dim": 64, "use_linear_projection": True,
        "addition_embed_type": "text_time", "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 80,
        "conditioning_embedding_out_channels": (8, 16, 32),
    },
    "sd15": {
        "block_out_channels": (16, 32, 64, 64), "attention_head_dim": 2, "norm_num_groups": 8,
        "cross_attention_dim": 48, "conditioning_embedding_out_channels": (8, 16, 32),
    },
}  # fmt: skip
# The `-small` nets: no attention anywhere, so no tokens are read.
SMALL = {
    "down_block_types": ("DownBlock2D",) * 3, "mid_block_type": "UNetMidBlock2D",
    "transformer_layers_per_block": [0] * 3,
}  # fmt: skip
SCHEDULERS: dict[str, dict[str, Any]] = {  # as the base models have them
    "sdxl": {
        "_class_name": "EulerDiscreteScheduler", "_diffusers_version": "0.19.0.dev0", "beta_end": 0.012,
        "beta_schedule": "scaled_linear", "beta_start": 0.00085, "clip_sample": False, "interpolation_type": "linear",
        "num_train_timesteps": 1000, "prediction_type": "epsilon", "sample_max_value": 1.0, "set_alpha_to_one": False,
        "skip_prk_steps": True, "steps_offset": 1, "timestep_spacing": "leading", "trained_betas": None,
        "use_karras_sigmas": False,
    },
    "sd15": {
        "_class_name": "PNDMScheduler", "_diffusers_version": "0.6.0", "beta_end": 0.012,
        "beta_schedule": "scaled_linear", "beta_start": 0.00085, "num_train_timesteps": 1000,
        "set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1, "trained_betas": None,
        "clip_sample": False,
    },
}  # fmt: skip


def random_net(shape: str, seed: int, **changes: Any) -> ControlNetModel:
    """A ControlNet whose every number is random, the zero convolutions' too."""
    with quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = ControlNetModel(**{**SHAPES[shape], **changes})
        for parameter in net.parameters():
            parameter.data.normal_(std=0.1)
    return net


def save(net: ControlNetModel, folder: Path, **options: Any) -> None:
    with quiet():
        net.save_pretrained(folder, **options)


def card(folder: Path, text: str) -> None:
    (folder / "README.md").unlink(missing_ok=True)  # it may be a link to another test's
    (folder / "README.md").write_text(f"---\n{text}\n---\n# A model\nlicense: not this line\n", encoding="utf-8")


def make_published(folder: Path) -> None:
    """openpose (as xinsir has it), canny (as diffusers: two precisions, and pickles), small, face (as CrucibleAI)."""
    save(random_net("sdxl", 1).half(), folder / "openpose")
    card(folder / "openpose", "license: apache-2.0")
    canny = random_net("sdxl", 2)
    save(canny, folder / "canny")
    save(canny, folder / "canny", safe_serialization=False)
    canny.half()
    save(canny, folder / "canny", variant="fp16")
    save(canny, folder / "canny", variant="fp16", safe_serialization=False)
    card(folder / "canny", 'license: "openrail++"\nbase_model: x')
    save(random_net("sdxl", 3, **SMALL), folder / "small")
    save(random_net("sd15", 4, cross_attention_dim=40), folder / "face")  # the root is another family's
    face = random_net("sd15", 5)
    save(face, folder / "face" / "diffusion_sd15", safe_serialization=False)
    save(face.half(), folder / "face" / "diffusion_sd15", variant="fp16")
    card(folder / "face", "language: en\nlicense:\n- openrail\n- mit\ntags: x")


def make_bases(folder: Path) -> None:
    """SDXL and SD15, without anything of ours, and CKPT: a RealisID checkpoint that takes its UNet from SDXL."""
    for name, shape in (("SDXL", "sdxl"), ("SD15", "sd15")):
        made = make_checkpoint(folder / name, family=shape, vae_factor=4)
        if name == "SDXL":
            shutil.copytree(made, folder / "CKPT", copy_function=os.link)
        for part in ("controlnet_local", "controlnet_global", "id_projection", "image_encoder", "feature_extractor"):
            shutil.rmtree(made / part)
        (made / "realisid_config.json").unlink()
        zeros = {"force_zeros_for_empty_prompt": True} if name == "SDXL" else {}
        write(made / "model_index.json", {"_class_name": "StableDiffusionPipeline", **zeros})
        write(made / "scheduler" / "scheduler_config.json", SCHEDULERS[shape])
    shutil.rmtree(folder / "CKPT" / "unet")
    index = json.loads((folder / "CKPT" / "model_index.json").read_text())
    write(folder / "CKPT" / "model_index.json", {**index, "base_model": "../SDXL"})
    (folder / "SDXL" / "LICENSE.md").write_text("\n# CreativeML Open RAIL++-M\n\nSection I\n")


def write(file: Path, values: dict[str, Any]) -> None:
    file.unlink(missing_ok=True)
    file.write_text(json.dumps(values))


def as_hub_cache(folder: Path, cache: Path, name: str) -> Path:
    """The snapshot of a folder in a hub cache: every file a link into blobs/."""
    model = cache / f"models--{name.replace('/', '--')}"
    (model / "blobs").mkdir(parents=True)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text("abc")
    for number, file in enumerate(sorted(path for path in folder.rglob("*") if path.is_file())):
        link = model / "snapshots" / "abc" / file.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        os.link(file, model / "blobs" / f"{number:064x}")
        link.symlink_to(os.path.relpath(model / "blobs" / f"{number:064x}", link.parent))
    return model / "snapshots" / "abc"
