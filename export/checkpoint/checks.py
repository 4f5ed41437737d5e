"""The facts that the configs of a checkpoint state together, and every contradiction between them."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from realisid_trt.branches import Branch
from realisid_trt.checks import is_finite, is_whole
from realisid_trt.config import RealisIDConfig
from realisid_trt.errors import CheckpointError, RequestError
from realisid_trt.loop.noise_levels import PREDICTIONS, SPACINGS
from realisid_trt.loop.samplers import NoiseSchedule, table_of

from .face_encoder import FaceEncoder
from .files import read_json, refuse
from .id_checks import check_aligned_face, check_face_crop

Config = Mapping[str, Any]
# The exported networks leave out parts of diffusers' forward. Key → the values with which a model does not need them.
UNET_ONLY = {
    "center_input_sample": (False,), "class_embed_type": (None,), "num_class_embeds": (None,),
    "encoder_hid_dim": (None,), "encoder_hid_dim_type": (None,), "time_embedding_type": ("positional",),
    "time_cond_proj_dim": (None,), "class_embeddings_concat": (False,), "attention_type": ("default",),
    "mid_block_type": ("UNetMidBlock2DCrossAttn",), "addition_embed_type": (None, "text_time"),
}  # fmt: skip
BRANCH_ONLY = {
    "class_embed_type": (None,), "num_class_embeds": (None,), "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,), "global_pool_conditions": (False,),
    "controlnet_conditioning_channel_order": ("rgb",), "mid_block_type": ("UNetMidBlock2DCrossAttn", "UNetMidBlock2D"),
}  # fmt: skip
DOWN_BLOCKS = ("DownBlock2D", "CrossAttnDownBlock2D")
UP_BLOCKS = ("UpBlock2D", "CrossAttnUpBlock2D")
# Keys of those schedulers of diffusers that have no schedule of betas: EDM, flow matching.
FOREIGN_SCHEDULES = ("sigma_data", "sigma_schedule", "use_flow_sigmas", "shift", "base_shift", "max_shift")


def with_defaults(cls: type, config: Config) -> dict[str, Any]:
    """The config with the defaults of its diffusers class where a key is left out, as from_pretrained reads it."""
    parameters = inspect.signature(cls.__init__).parameters.values()  # type: ignore[misc]
    return {**{p.name: p.default for p in parameters if p.default is not p.empty}, **config}


def residual_shapes(config: Config) -> tuple[tuple[int, int], ...]:
    """(channels, level) of every skip, then of the mid block, in the order in which diffusers' encoder makes them.

    conv_in; then every level's layers and, except at the last level, its downsampler.
    """
    widths, layers = config["block_out_channels"], config["layers_per_block"]
    last = len(widths) - 1
    shapes = [(widths[0], 0)]
    for level, channels in enumerate(widths):
        shapes += [(channels, level)] * (layers if isinstance(layers, int) else layers[level])
        shapes += [(channels, level + 1)] * (level < last)
    return (*shapes, (widths[-1], last))


def check_all(
    configs: Mapping[str, Config],
    realisid: RealisIDConfig,
    text_encoders: tuple[str, ...],
    face_encoder: FaceEncoder | None = None,
) -> dict[str, Any]:
    """The facts that follow from the configs, under the names of Checkpoint's fields. Raises CheckpointError.

    configs: "unet", "vae", "controlnet_local", … → config.json with its defaults filled in; "feature_extractor" →
             preprocessor_config.json.
    face_encoder: of a checkpoint whose `id_input` is "aligned_face".
    """
    unet, vae = configs["unet"], configs["vae"]
    _check_unet(unet)
    sample_size = _sample_size(unet)
    factor = 2 ** (len(vae["block_out_channels"]) - 1)
    if vae["latent_channels"] != unet["in_channels"]:
        raise refuse("vae", "latent_channels", vae["latent_channels"], f"{unet['in_channels']}, the UNet's in_channels")
    _check_vae(vae)
    for row in realisid.table:
        _check_branch(row, realisid.table, configs[f"controlnet_{row.name}"], unet, factor)
    pooled_dim = _check_text([(name, configs[name]) for name in text_encoders], unet)
    tokens, image_size, mean, std = 0, 0, (), ()
    if face_encoder is not None:
        tokens = check_aligned_face(configs, face_encoder, _width(unet, "unet"), realisid.patch_px)
    elif realisid.id_input != "none":
        tokens, image_size = check_face_crop(configs, _width(unet, "unet"))
        mean, std = (tuple(configs["feature_extractor"][key]) for key in ("image_mean", "image_std"))
    if realisid.box_snap not in (None, factor, 4 * factor):
        raise CheckpointError(
            f"realisid_config.json: box_snap is {realisid.box_snap}, expected {factor} or {4 * factor} px: the VAE's "
            "scale factor f, or 4f. Correct the file, or leave the key out for f."
        )
    return {
        "config": dataclasses.replace(realisid, box_snap=realisid.box_snap or factor),
        "vae_scale_factor": factor,
        "levels": len(unet["block_out_channels"]),
        "sample_size": sample_size,
        "latent_channels": unet["in_channels"],
        "residuals": residual_shapes(unet),
        "has_added_conditions": unet["addition_embed_type"] == "text_time",
        "pooled_dim": pooled_dim,
        "cross_attention_dim": _width(unet, "unet"),
        "emb_dim": unet.get("time_embedding_dim") or 4 * unet["block_out_channels"][0],
        "image_size": image_size,
        "image_mean": mean,
        "image_std": std,
        "num_id_tokens": tokens,
    }


def _check_unet(unet: Config) -> None:
    for key, allowed in UNET_ONLY.items():
        if unet[key] not in allowed:
            raise refuse("unet", key, unet[key], " or ".join(map(repr, allowed)), "This kind of UNet is not supported.")
    for key, known in (("down_block_types", DOWN_BLOCKS), ("up_block_types", UP_BLOCKS)):
        if not set(unet[key]) <= set(known):
            raise refuse("unet", key, unet[key], f"only {' and '.join(known)}", "This kind of UNet is not supported.")
    if unet["in_channels"] != unet["out_channels"]:
        raise refuse(
            "unet",
            "in_channels",
            unet["in_channels"],
            f"{unet['out_channels']}, its out_channels",
            "Inpainting and learned-variance UNets are not supported: take the text-to-image model.",
        )


def _check_vae(vae: Config) -> None:
    """Checks the numbers that latents are scaled by."""
    scale, shift, channels = vae["scaling_factor"], vae.get("shift_factor"), vae["latent_channels"]
    if not is_finite(scale) or scale <= 0:
        raise refuse("vae", "scaling_factor", scale, "a number above 0: SDXL's is 0.13025, SD 1.5's 0.18215")
    if shift is not None and not is_finite(shift):
        raise refuse("vae", "shift_factor", shift, "a number, or none")
    mean, std = vae.get("latents_mean"), vae.get("latents_std")
    if (mean is None) != (std is None):
        missing, other = ("latents_mean", "latents_std") if mean is None else ("latents_std", "latents_mean")
        raise refuse("vae", missing, None, f"{channels} numbers: {other} is given, and one is useless alone")
    for key, values in (("latents_mean", mean), ("latents_std", std)):
        if values is None:
            continue
        numbers = isinstance(values, (list, tuple)) and len(values) == channels and all(map(is_finite, values))
        if not numbers or (key == "latents_std" and min(values) <= 0):
            above = " above 0" if key == "latents_std" else ""
            raise refuse("vae", key, values, f"{channels} numbers{above}, one for each latent channel")


def _sample_size(unet: Config) -> int:
    size = unet["sample_size"]
    if isinstance(size, (list, tuple)) and len(set(size)) == 1:
        size = size[0]
    step = 2 ** (len(unet["block_out_channels"]) - 1)
    if not is_whole(size) or size < step or size % step:
        raise refuse(
            "unet",
            "sample_size",
            size,
            f"the side of the square latents it was trained on, a multiple of {step}",
            "It sets the size of pictures, and the canvas of branches that see faces (128 for SDXL, 64 for SD 1.5): "
            "add it to the file.",
        )
    return int(size)


def _width(config: Config, name: str) -> int:
    """cross_attention_dim, which diffusers allows to be one number per level: here all must be equal."""
    width = config["cross_attention_dim"]
    if isinstance(width, (list, tuple)) and len(set(width)) == 1:
        width = width[0]
    if not is_whole(width):
        raise refuse(name, "cross_attention_dim", width, "one number for all levels")
    return int(width)


SHOWN = {
    "pose": "a drawing of the pose",
    "location": "the location mask",
    "image": "a picture",
    "id_patches": "a drawing with the patches of IDs",
}


def _check_branch(row: Branch, table: Sequence[Branch], branch: Config, unet: Config, factor: int) -> None:
    name = row.folder
    if branch["conditioning_channels"] != row.channels:
        others = [other.folder for other in table if other.channels == branch["conditioning_channels"]]
        raise refuse(
            name,
            "conditioning_channels",
            branch["conditioning_channels"],
            f"{row.channels}, since its condition is {SHOWN[row.condition]}",
            f"Check that {name} and {others[0]} are not swapped."
            if others
            else "Correct channels in the branch's row.",
        )
    for key, allowed in BRANCH_ONLY.items():
        if branch[key] not in allowed:
            expected = " or ".join(map(repr, allowed))
            raise refuse(name, key, branch[key], expected, "This kind of branch is not supported.")
    if not set(branch["down_block_types"]) <= set(DOWN_BLOCKS):
        raise refuse(name, "down_block_types", branch["down_block_types"], f"only {' and '.join(DOWN_BLOCKS)}")
    embedding = branch["conditioning_embedding_out_channels"]
    if 2 ** (len(embedding) - 1) != factor:
        raise refuse(
            name,
            "conditioning_embedding_out_channels",
            list(embedding),
            f"{factor.bit_length()} numbers: the condition must shrink {factor}-fold, as the VAE does",
            "Take the VAE that the branch was trained with.",
        )
    if branch["in_channels"] != unet["in_channels"]:
        raise refuse(name, "in_channels", branch["in_channels"], f"{unet['in_channels']}, the UNet's")
    ours, theirs = residual_shapes(branch), residual_shapes(unet)
    if ours != theirs:
        raise CheckpointError(
            f"{name} gives {len(ours)} residuals {_shapes(ours)}, the UNet takes {len(theirs)} {_shapes(theirs)} "
            "(channels@level). block_out_channels and layers_per_block must be the UNet's: take the base model that "
            "the branch was trained on."
        )
    if _width(branch, name) != _width(unet, "unet"):
        raise refuse(
            name,
            "cross_attention_dim",
            branch["cross_attention_dim"],
            f"{_width(unet, 'unet')}, the UNet's",
            "Take the base model that the branch was trained on.",
        )
    added = ("addition_embed_type", "projection_class_embeddings_input_dim", "addition_time_embed_dim")
    for key in added[: None if unet["addition_embed_type"] else 1]:
        if branch[key] != unet[key]:
            raise refuse(name, key, branch[key], f"{unet[key]!r}, the UNet's")


def _shapes(shapes: tuple[tuple[int, int], ...]) -> str:
    return " ".join(f"{channels}@{level}" for channels, level in shapes)


def _check_text(encoders: list[tuple[str, Config]], unet: Config) -> int:
    """The pooled width: of the last encoder's projection, 0 without added conditions."""
    widths = [config["hidden_size"] for _, config in encoders]
    names = " + ".join(name for name, _ in encoders)
    if sum(widths) != _width(unet, "unet"):
        raise CheckpointError(
            f"{names} give {' + '.join(map(str, widths))} = {sum(widths)} features a token, the UNet's "
            f"cross_attention_dim is {_width(unet, 'unet')}. Take the text encoders of the UNet's own base model."
        )
    lengths = {config["max_position_embeddings"] for _, config in encoders}
    if len(lengths) > 1:
        raise CheckpointError(
            f"{names} have max_position_embeddings {sorted(lengths)}, expected one number, since their features are "
            "joined token by token. Take the text encoders of one base model."
        )
    if unet["addition_embed_type"] is None:
        return 0
    name, config = encoders[-1]
    pooled = unet["projection_class_embeddings_input_dim"] - 6 * unet["addition_time_embed_dim"]
    if config["projection_dim"] != pooled:
        raise refuse(
            name,
            "projection_dim",
            config["projection_dim"],
            f"{pooled}: the UNet's projection_class_embeddings_input_dim less the width of six time ids",
            "Take the text encoders of the UNet's own base model.",
        )
    return int(pooled)


def check_scheduler(ddim: Config, source: Config) -> None:
    """Raises CheckpointError unless the runtime can take steps on it: linear in the latents and the prediction.

    ddim: config of the DDIMScheduler that is made. source: the keys of the file.
    """
    where = "scheduler/scheduler_config.json"
    name = source.get("_class_name", "DDIMScheduler")
    foreign = [key for key in FOREIGN_SCHEDULES if source.get(key) not in (None, False)]
    if name.startswith(("EDM", "FlowMatch")) or foreign:
        said = f"{name} with {', '.join(foreign)}" if foreign else name
        raise CheckpointError(
            f"{where}: {said} is another kind of noise schedule (EDM or flow matching). An engine takes its steps on a "
            "schedule of betas. Take a base model that was trained on one, as SDXL and SD 1.5 are."
        )
    if not {"beta_start", "beta_end"} <= set(source) and source.get("trained_betas") is None:
        raise CheckpointError(
            f"{where}: neither beta_start and beta_end nor trained_betas are given, so the schedule is not known. "
            "Copy the file from the base model that the UNet was trained on."
        )
    for key in ("clip_sample", "thresholding"):
        if ddim[key]:
            said = f"{key} is true" if key in source else f"{key} is not set, which DDIM reads as true"
            raise CheckpointError(
                f'{where}: {said}; the fused step is linear and cannot clip. Set "{key}": false, as SDXL has it, if '
                "the model was not made for clipping."
            )
    for key, known in (("prediction_type", PREDICTIONS), ("timestep_spacing", SPACINGS)):
        if ddim[key] not in known:
            raise CheckpointError(
                f"{where}: {key} is {ddim[key]!r}, expected {' or '.join(known)}. Correct the file to what the UNet "
                "was trained for."
            )
    offset, timesteps = ddim["steps_offset"], ddim["num_train_timesteps"]
    if not is_whole(offset) or not 0 <= offset < timesteps:
        raise CheckpointError(
            f"{where}: steps_offset is {offset!r}, expected a whole number from 0 to {timesteps - 1}. Correct the "
            "file: SDXL and SD 1.5 have 1."
        )
    if source.get("eta"):
        raise CheckpointError(
            f"{where}: eta is {source['eta']}, expected 0: the noise of a step belongs to the sampler. Remove the key, "
            f'and write "sampler": {{"name": "ddim", "eta": {source["eta"]}}} into realisid_config.json.'
        )
    if ddim["rescale_betas_zero_snr"] and ddim["prediction_type"] == "epsilon":
        raise CheckpointError(
            f"{where}: rescale_betas_zero_snr with prediction_type epsilon divides by zero at the first step. Set it "
            "to false, or use a v_prediction model."
        )


def check_steps(realisid: RealisIDConfig, ddim: Config, schedule: NoiseSchedule) -> None:
    """Raises CheckpointError if the sampler or the number of steps that a request has by default do not go with the
    noise schedule.

    ddim: config of the DDIMScheduler of scheduler/.
    """
    if realisid.num_inference_steps > ddim["num_train_timesteps"]:  # says which file is wrong, or both
        raise CheckpointError(
            f"realisid_config.json: num_inference_steps is {realisid.num_inference_steps}, the scheduler's "
            f"num_train_timesteps is {ddim['num_train_timesteps']}. Correct the wrong one."
        )
    sampler, steps = realisid.default_sampler, realisid.num_inference_steps
    try:
        table_of(sampler, schedule, steps)
    except RequestError as error:
        raise CheckpointError(
            f"realisid_config.json: by default {steps} step{'s' * (steps > 1)} of {sampler.name} would be taken. "
            f"{error}"
        ) from error


def check_tokenizer(folder: Path, text_encoder: Config) -> None:
    """Raises CheckpointError for missing tokenizer files, or more tokens than the text encoder has embeddings."""
    if (folder / "tokenizer.json").is_file():
        model = read_json(folder / "tokenizer.json", "the tokenizer").get("model", {})
        tokens = model.get("vocab", {}) if isinstance(model, Mapping) else {}
    else:
        tokens = read_json(folder / "vocab.json", "the tokenizer's tokens and their ids")
        if not (folder / "merges.txt").is_file():
            raise CheckpointError(f"{folder}/merges.txt is missing: the tokenizer's merges. Copy it beside vocab.json.")
    if len(tokens) > text_encoder["vocab_size"]:
        raise CheckpointError(
            f"{folder} has {len(tokens)} tokens, its text encoder {text_encoder['vocab_size']} embeddings "
            "(vocab_size). Take the tokenizer that belongs to the encoder."
        )
