"""python -m training.start: a RealisID checkpoint to begin a training with, made from the user's base model.

Both branches begin as copies of the UNet's encoder followed by zero convolutions: before it is trained, the checkpoint
makes the base model's pictures.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from export.checkpoint import Checkpoint
from export.checkpoint.classes import component_of, full_config, module_class, quiet
from export.checkpoint.files import read_header, read_json
from export.checkpoint.folders import FROM_BASE, base_folder, unpack
from export.checkpoint.id_projection import build_projection
from export.files import disk_errors, target_folder, whole_folder
from export.miniature.presets import preprocessor_config
from realisid_trt.commands.command_line import Outcome, execute, run
from realisid_trt.config import RealisIDConfig
from realisid_trt.errors import CheckpointError, RealisIDWarning, RequestError

ENCODER, EXTRACTOR = "image_encoder", "feature_extractor"
PREPROCESSOR = "preprocessor_config.json"
ZEROS = "force_zeros_for_empty_prompt"
CONDITION_WIDTHS = (16, 32, 96, 256)  # ControlNet's
CONDITIONS = {"local": 3, "global": 1}  # channels of the pose drawing and of the location mask
PROJECTIONS = ("linear", "resampler")


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 1 failed, 2 bad usage."""
    given = vars(_parser().parse_args(arguments))
    as_json = given.pop("json")
    return run(lambda: _start(**given), as_json)


def _start(
    base: str, image_encoder: str, out: str, projection: str, face_margin: float, seed: int, variant: str | None
) -> Outcome:
    path = start_checkpoint(
        base, image_encoder, out, projection=projection, seed=seed, variant=variant,
        config=RealisIDConfig(branch_pooled_text="zeros", face_margin=face_margin),
    )  # fmt: skip
    command = f"python -m training.train branches --checkpoint {out}{f' --variant {variant}' if variant else ''}"
    return Outcome({"path": str(path)}, [f"{path}: train it with {command}"])


def start_checkpoint(
    base: str | Path,
    image_encoder: str | Path,
    out: str | Path,
    *,
    config: RealisIDConfig,
    projection: str = "linear",
    seed: int = 0,
    variant: str | None = None,
) -> Path:
    """A checkpoint at `out` that takes everything but branches, image encoder and ID projection from `base`.

    base:          folder of an SDXL or SD 1.5 model in diffusers' layout, or a hub id; it is referred to, not copied.
    image_encoder: folder of a CLIP vision model, or the folder that holds it as image_encoder/ (IP-Adapter's
                   sdxl_models/, or a model in diffusers' layout); its JSON and safetensors are copied. Photos are
                   normalised as the preprocessor_config.json in it, or in feature_extractor/ beside it, has it; as
                   CLIP does, with a warning, if there is neither.
    config:        of realisid_config.json; only the setting for an absent prompt is the base's.
    projection:    "linear" or "resampler" (16 tokens). seed: of its weights.
    variant:       of the weight files of both, e.g. "fp16"; a part without it uses its plain files.

    Raises CheckpointError if the folders lack something, RequestError if `out` is taken, DiskError.
    """
    out = target_folder(out)
    if out.exists() and any(out.iterdir()):
        raise RequestError(f"{out} exists. Choose another --out.")
    if (file := Path(os.path.expanduser(base))).is_file():
        raise CheckpointError(f"the base model {base} is a file, expected a folder. {unpack(file)}")
    local = (given := Path(os.path.expanduser(base))).is_dir()
    parts = [name for name in FROM_BASE if name not in (ENCODER, EXTRACTOR)]
    folder = base_folder(str(given.absolute()) if local else str(base), out, parts, variant, local)
    encoder = _encoder_folder(Path(os.path.expanduser(image_encoder)))
    encoder_config = full_config(component_of(ENCODER, encoder, variant))
    with whole_folder(out) as partial:
        with disk_errors(out.parent):
            width = _write_branches(folder, partial, variant)
            _copy_encoder(encoder, partial, encoder_config)
            _write_projection(partial / "id_projection", projection, encoder_config, width, seed)
            # SDXL says that zeros stand for an absent prompt; SD 1.5 says nothing, and means the empty text
            zeros = read_json(folder / "model_index.json", "it lists the model's parts").get(ZEROS, False)
            _write_json(partial / "realisid_config.json", {**config.to_dict(), ZEROS: bool(zeros)})
            _write_json(partial / "model_index.json", {
                "_class_name": "RealisIDPipeline",
                "base_model": os.path.relpath(folder, out) if local else str(base),
            })  # fmt: skip
        Checkpoint.open(partial, base_model=folder, variant=variant).check_weights()
    return out


def _encoder_folder(given: Path) -> Path:
    for folder in (given / ENCODER, given):
        if (folder / "config.json").is_file():
            return folder
    raise CheckpointError(
        f"{given} holds no config.json, and no {ENCODER}/ with one. Give the folder of a CLIP vision model "
        "(config.json and model.safetensors), or the one that holds it."
    )


def _copy_encoder(encoder: Path, out: Path, config: Mapping[str, Any]) -> None:
    """Copies image_encoder/, without files that may be pickles, and feature_extractor/."""
    (out / ENCODER).mkdir()
    for file in sorted(encoder.iterdir()):
        if file.suffix in (".json", ".safetensors") and file.name != PREPROCESSOR:
            shutil.copy2(file, out / ENCODER / file.name)
    (out / EXTRACTOR).mkdir()
    brothers = [encoder.with_name(EXTRACTOR) / PREPROCESSOR] if encoder.name == ENCODER else []
    for file in (encoder / PREPROCESSOR, *brothers):
        if file.is_file():
            shutil.copy2(file, out / EXTRACTOR / PREPROCESSOR)
            return
    size = config["image_size"]
    _write_json(out / EXTRACTOR / PREPROCESSOR, preprocessor_config(size))
    warnings.warn(
        f"{encoder} comes without a {PREPROCESSOR}, so photos are normalised as CLIP does: its mean and deviation, "
        f"{size} px.",
        RealisIDWarning,
        stacklevel=2,
    )


def _write_branches(base: Path, out: Path, variant: str | None) -> int:
    """Both ControlNets, in the UNet's own precision. Returns the width of the UNet's text and ID tokens."""
    component = component_of("unet", base / "unet", variant)
    vae = read_json(base / "vae" / "config.json", "it says how much smaller than pictures latents are")
    widths = CONDITION_WIDTHS[: len(vae["block_out_channels"])]
    with quiet():
        stored = {dtype for dtype, _ in read_header(component.files[0]).values()}
        dtype = torch.float16 if stored == {"F16"} else torch.bfloat16 if stored == {"BF16"} else torch.float32
        unet = module_class("UNet2DConditionModel").from_pretrained(
            base / "unet", torch_dtype=dtype, variant=component.variant
        )
        for name, channels in CONDITIONS.items():
            branch = module_class("ControlNetModel").from_unet(
                unet, conditioning_channels=channels, conditioning_embedding_out_channels=widths
            )
            branch.to(unet.dtype).save_pretrained(out / f"controlnet_{name}")
    return int(component.config["cross_attention_dim"])


def _write_projection(folder: Path, kind: str, encoder: Mapping[str, Any], width: int, seed: int) -> None:
    hidden = int(encoder["hidden_size"])
    if kind == "linear":
        tokens = (encoder["image_size"] // encoder["patch_size"]) ** 2 + 1
        config: dict[str, Any] = {
            "class": "linear", "input_dim": hidden, "output_dim": width, "num_tokens": tokens,
        }  # fmt: skip
    else:  # IP-Adapter-plus' shape
        config = {
            "class": "resampler", "dim": min(hidden, 1280), "depth": 4, "dim_head": 64, "heads": max(hidden // 64, 1),
            "num_queries": 16, "embedding_dim": hidden, "output_dim": width, "ff_mult": 4,
        }  # fmt: skip
    folder.mkdir()
    _write_json(folder / "config.json", config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        save_file(build_projection(config).state_dict(), folder / "model.safetensors", metadata={"format": "pt"})


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m training.start",
        description="Make a RealisID checkpoint to begin a training with, out of an SDXL or SD 1.5 model.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="""examples:
  python -m training.start --base stabilityai/stable-diffusion-xl-base-1.0 --image-encoder CLIP --out checkpoints/mine
  python -m training.start --base SDXL --image-encoder CLIP --projection resampler --out checkpoints/mine""",
    )
    add = parser.add_argument
    add("--base", required=True, metavar="MODEL", help="folder of the base model, or a hub id")
    add("--image-encoder", required=True, metavar="DIR", help="folder of a CLIP vision model, or of its image_encoder/")
    add("--out", required=True, metavar="DIR", help="folder to make")
    add("--projection", choices=PROJECTIONS, default="linear", help="default %(default)s")
    add(
        "--face-margin", type=float, default=1.0, help="side of the ID crop over that of the face (default %(default)s)"
    )
    add("--variant", help='of the weight files, e.g. "fp16"')
    add("--seed", type=int, default=0, help="of the ID projection's weights (default %(default)s)")
    add("--json", action="store_true", help="the last line of stdout is one JSON object")
    return parser


if __name__ == "__main__":
    sys.exit(execute(main))
