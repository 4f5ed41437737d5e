"""The shapes of the checkpoints that `export.miniature` makes: one table of configs per preset, no weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from realisid_trt.branches import realisid_branches
from realisid_trt.checks import is_whole
from realisid_trt.config import RealisIDConfig
from realisid_trt.errors import RequestError

CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073]
CLIP_STD = [0.26862954, 0.26130258, 0.27577711]
PRESETS = ("miniature", "world", "mid", "sdxl")
SMALL = ("miniature", "world")  # a VAE of factor 4 by default, whose norms have 8 groups
FAMILIES = ("sdxl", "sd15")
METHODS = ("realisid", "idpatch", "controlnet", "mixed")
PREDICTIONS = ("epsilon", "v_prediction")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The options of `make_checkpoint`. The command line reads its defaults from here.

    seed:       of all weights: the same seed gives the same bytes.
    preset:     "miniature" (UNet 2 M parameters), "world" (4 M; the shape that is trained on training.world), "mid"
                (116 M) or "sdxl" (2567 M, half precision, sharded).
    method:     "realisid"; "idpatch", ID-Patch with its projections and a face encoder; "controlnet", two ControlNets
                that read text and no identities; "mixed", RealisID and a ControlNet that reads text and ends after six
                tenths of the steps.
    family:     "sdxl" (3 levels, two text encoders, added conditions) or "sd15" (4 levels, one, none).
    vae_factor: 4 or 8; None takes the preset's: 4 for the two small ones, 8 for the others.
    prediction: "epsilon" or "v_prediction".
    projection: "linear" or "resampler"; None takes linear, unless `id_tokens` is another number than linear gives.
                ID-Patch's are resamplers.
    id_tokens:  number of ID tokens; None takes the image encoder's for linear, 16 for the resampler.
    realisid:   the keys of realisid_config.json; box_snap None is written as the VAE's factor.
    """

    seed: int = 0
    preset: str = "miniature"
    method: str = "realisid"
    family: str = "sdxl"
    vae_factor: int | None = None
    prediction: str = "epsilon"
    projection: str | None = None
    id_tokens: int | None = None
    realisid: RealisIDConfig = RealisIDConfig(branch_pooled_text="zeros")

    def check(self) -> None:
        """Raises RequestError for an impossible value or pair of values."""
        for name, value, choices in (
            ("preset", self.preset, PRESETS),
            ("method", self.method, METHODS),
            ("family", self.family, FAMILIES),
            ("vae_factor", self.vae_factor, (None, 4, 8)),
            ("prediction", self.prediction, PREDICTIONS),
            ("projection", self.projection, (None, "linear", "resampler")),
        ):
            if value not in choices or isinstance(value, float):
                raise RequestError(f"{name} is {value!r}, expected one of {', '.join(map(str, choices))}.")
        if not is_whole(self.seed) or self.seed < 0:
            raise RequestError(f"seed is {self.seed!r}, expected a whole number of at least 0.")
        if self.id_tokens is not None and (not is_whole(self.id_tokens) or self.id_tokens < 1):
            raise RequestError(f"id_tokens is {self.id_tokens!r}, expected a whole number of at least 1.")
        if self.family == "sd15" and self.preset != "miniature":
            raise RequestError(f"preset {self.preset} has SDXL's shape. Use --family sdxl, or --preset miniature.")
        if self.preset == "sdxl" and self.vae_factor == 4:
            raise RequestError("preset sdxl has SDXL's VAE, whose factor is 8. Leave --vae-factor out.")
        if self.projection == "linear" and self.method == "idpatch":
            raise RequestError("method idpatch has resamplers. Leave --projection out.")
        if self.projection == "linear" and self.id_tokens not in (None, self.image_tokens):
            raise RequestError(
                f"id_tokens is {self.id_tokens}, but a linear projection gives one token per image token: "
                f"{self.image_tokens}. Use --projection resampler, or leave --id-tokens out."
            )
        if self.realisid.box_snap not in (None, self.factor, 4 * self.factor):
            raise RequestError(
                f"box_snap is {self.realisid.box_snap}, expected {self.factor} or {4 * self.factor} with this VAE."
            )

    @property
    def image_tokens(self) -> int:
        """Tokens of the image encoder, CLS included: (image_size / patch_size)² + 1."""
        encoder = IMAGE_ENCODERS[self.preset]
        return int((encoder["image_size"] // encoder["patch_size"]) ** 2 + 1)

    @property
    def factor(self) -> int:
        """The VAE's scale factor f."""
        return self.vae_factor or (4 if self.preset in SMALL else 8)

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights: half precision at full size (which goes into shards), else float32."""
        return torch.float16 if self.preset == "sdxl" else torch.float32


# attention_head_dim is the NUMBER of heads in diffusers' UNets: its name is historical.
UNETS: dict[str, dict[str, Any]] = {
    "miniature": {
        "sample_size": 32, "block_out_channels": (16, 32, 64), "transformer_layers_per_block": (1, 1, 2),
        "attention_head_dim": (2, 4, 8), "norm_num_groups": 8, "cross_attention_dim": 64,
        "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 6 * 8 + 32,
    },
    "world": {
        "sample_size": 32, "block_out_channels": (32, 64, 96), "transformer_layers_per_block": (1, 1, 1),
        "attention_head_dim": (1, 2, 3), "norm_num_groups": 8, "cross_attention_dim": 96,
        "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 6 * 8 + 48,
    },
    "mid": {
        "sample_size": 64, "block_out_channels": (96, 192, 384), "transformer_layers_per_block": (1, 2, 4),
        "attention_head_dim": (3, 6, 12), "norm_num_groups": 32, "cross_attention_dim": 512,
        "addition_time_embed_dim": 64, "projection_class_embeddings_input_dim": 6 * 64 + 256,
    },
    "sdxl": {
        "sample_size": 128, "block_out_channels": (320, 640, 1280), "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20), "norm_num_groups": 32, "cross_attention_dim": 2048,
        "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 6 * 256 + 1280,
    },
}  # fmt: skip
SDXL_BLOCKS: dict[str, Any] = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 2,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
}
SD15_UNET: dict[str, Any] = {
    "sample_size": 32,
    "block_out_channels": (16, 32, 64, 64),
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "layers_per_block": 2,
    "attention_head_dim": 2,
    "norm_num_groups": 8,
    "cross_attention_dim": 48,
}
IMAGE_ENCODERS: dict[str, dict[str, Any]] = {
    "miniature": {
        "image_size": 64, "patch_size": 8, "hidden_size": 48, "intermediate_size": 96,
        "num_hidden_layers": 3, "num_attention_heads": 4, "projection_dim": 32, "hidden_act": "gelu",
    },
    "world": {
        "image_size": 64, "patch_size": 8, "hidden_size": 96, "intermediate_size": 288,
        "num_hidden_layers": 5, "num_attention_heads": 3, "projection_dim": 64, "hidden_act": "gelu",
    },
    "mid": {
        "image_size": 112, "patch_size": 14, "hidden_size": 192, "intermediate_size": 768,
        "num_hidden_layers": 4, "num_attention_heads": 4, "projection_dim": 128, "hidden_act": "gelu",
    },
    "sdxl": {  # CLIP ViT-H/14, IP-Adapter's encoder
        "image_size": 224, "patch_size": 14, "hidden_size": 1280, "intermediate_size": 5120,
        "num_hidden_layers": 32, "num_attention_heads": 16, "projection_dim": 1024, "hidden_act": "gelu",
    },
}  # fmt: skip
# hidden size, intermediate size, layers, heads, projection, activation
TEXT_ENCODERS: dict[str, tuple[tuple[Any, ...], ...]] = {
    "miniature": ((32, 64, 2, 4, 32, "quick_gelu"), (32, 64, 2, 4, 32, "gelu")),
    "world": ((48, 128, 3, 3, 48, "quick_gelu"), (48, 128, 3, 3, 48, "gelu")),
    "mid": ((256, 1024, 4, 4, 256, "quick_gelu"), (256, 1024, 4, 4, 256, "gelu")),
    "sdxl": ((768, 3072, 12, 12, 768, "quick_gelu"), (1280, 5120, 32, 20, 1280, "gelu")),  # CLIP-L and OpenCLIP bigG
}
# Width and heads of ID-Patch's two resamplers; heads of 64 and 4 layers, as published.
ID_PATCH_RESAMPLERS = {"miniature": (128, 2), "world": (128, 2), "mid": (256, 4), "sdxl": (1280, 20)}
VAE_WIDTHS = {
    "miniature": (8, 16, 16, 32),
    "world": (16, 32, 32, 64),
    "mid": (32, 64, 128, 128),
    "sdxl": (128, 256, 512, 512),
}
CONDITION_WIDTHS = {
    "miniature": (8, 16, 32, 32),
    "world": (16, 32, 64, 64),
    "mid": (16, 32, 96, 256),
    "sdxl": (16, 32, 96, 256),
}


def method_config(method: str, branch_pooled_text: str | None) -> dict[str, Any]:
    """The keys of realisid_config.json that a method's checkpoint has besides those of a recipe."""
    text: dict[str, Any] = {"tokens": "text", "pooled": "per_row", "condition": "image"}
    openpose = {"name": "openpose", "style": "openpose-xinsir", **text}
    if method == "idpatch":
        return {"method": "idpatch", "sampler": "euler"}  # as `adopt` writes it for SDXL
    if method == "controlnet":
        return {"method": "controlnet", "branches": [openpose, {"name": "depth", **text}]}
    if method == "mixed":
        return {"branches": [*realisid_branches(branch_pooled_text or "zeros"), {**openpose, "end": 0.6}]}
    return {"branch_pooled_text": branch_pooled_text or "zeros"}


def component_configs(recipe: Recipe, vocabulary: int) -> dict[str, dict[str, Any]]:
    """Folder of the checkpoint → arguments of its class. Everything that holds weights, in writing order.

    vocabulary: number of tokens of the tokenizers; the full-size text encoders keep CLIP's own 49408.
    """
    sd15 = recipe.family == "sd15"
    levels = recipe.factor.bit_length()  # 3 for a factor of 4, 4 for 8: one more than the number of halvings
    unet = dict(SD15_UNET) if sd15 else {**SDXL_BLOCKS, **UNETS[recipe.preset]}
    unet.update(in_channels=4, out_channels=4)
    branch = {k: v for k, v in unet.items() if k not in ("sample_size", "out_channels", "up_block_types")}
    branch["conditioning_embedding_out_channels"] = CONDITION_WIDTHS[recipe.preset][:levels]
    vae_widths = VAE_WIDTHS[recipe.preset]
    vae = {
        "sample_size": unet["sample_size"] * recipe.factor,
        "block_out_channels": vae_widths if levels == 4 else (*vae_widths[:2], vae_widths[3]),
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "layers_per_block": 2 if recipe.preset == "sdxl" else 1,
        "norm_num_groups": 8 if recipe.preset in SMALL else 32,
        "mid_block_add_attention": recipe.preset != "world",
        "latent_channels": 4,
        "scaling_factor": 0.18215 if sd15 else 0.13025,
        "force_upcast": not sd15,
    }
    configs = {"unet": unet, "vae": vae}
    texts = ((48, 96, 2, 4, 48, "quick_gelu"),) if sd15 else TEXT_ENCODERS[recipe.preset]
    for number, (hidden, intermediate, layers, heads, projection, activation) in enumerate(texts):
        configs["text_encoder" if number == 0 else f"text_encoder_{number + 1}"] = {
            "vocab_size": 49408 if recipe.preset == "sdxl" else vocabulary,
            "hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers,
            "num_attention_heads": heads, "projection_dim": projection, "hidden_act": activation,
            "max_position_embeddings": 77,
            # As SDXL's files have it: 2 makes transformers take the highest id of a row, which is <|endoftext|>.
            "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1,
        }  # fmt: skip
    if recipe.realisid.id_input == "face_crop":
        configs["image_encoder"] = dict(IMAGE_ENCODERS[recipe.preset])
    for row in recipe.realisid.table:
        configs[f"controlnet_{row.name}"] = {**branch, "conditioning_channels": row.channels}
    if recipe.realisid.id_input == "face_crop":
        configs["id_projection"] = _projection(recipe, unet["cross_attention_dim"])
    if recipe.realisid.id_input == "aligned_face":
        side = recipe.realisid.patch_px or 0
        configs["id_projection"] = _of_embeddings(recipe, recipe.id_tokens or 16, unet["cross_attention_dim"])
        configs["id_patch_projection"] = _of_embeddings(recipe, 3, side**2)
    return configs


def _of_embeddings(recipe: Recipe, num_queries: int, output_dim: int) -> dict[str, Any]:
    """A resampler of ID-Patch, which diffusers' loader of IP-Adapter-plus reads."""
    dim, heads = ID_PATCH_RESAMPLERS[recipe.preset]
    return {
        "class": "resampler", "dim": dim, "depth": 4, "dim_head": 64, "heads": heads, "num_queries": num_queries,
        "embedding_dim": 512, "output_dim": output_dim, "ff_mult": 4,
    }  # fmt: skip


def _projection(recipe: Recipe, output_dim: int) -> dict[str, Any]:
    width = IMAGE_ENCODERS[recipe.preset]["hidden_size"]
    kind = recipe.projection or ("linear" if recipe.id_tokens in (None, recipe.image_tokens) else "resampler")
    if kind == "linear":
        return {"class": "linear", "input_dim": width, "output_dim": output_dim, "num_tokens": recipe.image_tokens}
    full = recipe.preset == "sdxl"  # IP-Adapter-plus for SDXL: 4 layers of 20 heads of 64
    return {
        "class": "resampler", "dim": width, "depth": 4 if full else 2, "dim_head": 64 if full else width // 4,
        "heads": 20 if full else 4, "num_queries": recipe.id_tokens or 16, "embedding_dim": width,
        "output_dim": output_dim, "ff_mult": 4,
    }  # fmt: skip


def scheduler_config(prediction: str, method: str = "realisid") -> dict[str, Any]:
    """SDXL's noise schedule for DDIM, which is SD 1.5's as well. Of methods that are adopted as `adopt` writes it."""
    return {
        "num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
        "clip_sample": False, "set_alpha_to_one": method in ("idpatch", "controlnet"), "steps_offset": 1,
        "timestep_spacing": "leading",
        "prediction_type": prediction,
    }  # fmt: skip


def preprocessor_config(size: int) -> dict[str, Any]:
    """`feature_extractor/preprocessor_config.json`: CLIP's own, at `size` pixels."""
    return {
        "image_processor_type": "CLIPImageProcessor", "crop_size": {"height": size, "width": size},
        "size": {"shortest_edge": size}, "do_center_crop": True, "do_convert_rgb": True, "do_normalize": True,
        "do_rescale": True, "do_resize": True, "resample": 3, "rescale_factor": 1 / 255,
        "image_mean": CLIP_MEAN, "image_std": CLIP_STD,
    }  # fmt: skip
