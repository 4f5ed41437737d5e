"""Ways to spoil a good checkpoint. Each must be refused, with these pieces of the sentence that helps."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

UNET = "diffusion_pytorch_model.safetensors"
Tensors = dict[str, torch.Tensor]


def put(path: Path, content: str | bytes) -> None:
    path.unlink(missing_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def edit(path: Path, **changes: Any) -> None:
    """Sets keys of a JSON file; ... removes one."""
    values = {**json.loads(path.read_text()), **changes}
    put(path, json.dumps({key: value for key, value in values.items() if value is not ...}))


def config(part: str, **changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit(folder / part / "config.json", **changes)


def index(folder: Path, weight_map: dict[str, str]) -> None:
    put(folder / "unet" / f"{UNET}.index.json", json.dumps({"metadata": {}, "weight_map": weight_map}))


def null_id(folder: Path, **tensors: torch.Tensor) -> None:
    save_file(tensors, folder / "null_id.safetensors")


# name → (what is done to a good checkpoint, pieces of the error)
BAD_CHECKPOINTS: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "no model_index": (lambda p: (p / "model_index.json").unlink(), ("model_index.json is missing", "Copy it from")),
    "no realisid_config": (lambda p: (p / "realisid_config.json").unlink(), ("realisid_config.json is missing",)),
    "unknown key": (
        lambda p: edit(p / "realisid_config.json", overlapp="sum"),
        ("realisid_config.json: unknown key overlapp", "Known keys: method, branches, branch_pooled_text"),
    ),
    "no branch_pooled_text": (
        lambda p: edit(p / "realisid_config.json", branch_pooled_text=...),
        ("branch_pooled_text is missing and has no default",),
    ),
    "box_snap": (
        lambda p: edit(p / "realisid_config.json", box_snap=8),
        ("box_snap is 8, expected 4 or 16 px", "leave the key out for f"),
    ),
    "an infinite scale": (
        lambda p: edit(p / "realisid_config.json", guidance_scale=float("inf")),
        ("realisid_config.json: guidance_scale is inf, expected a finite number. Correct the file.",),
    ),
    "a scale that is no number": (
        lambda p: edit(p / "realisid_config.json", id_guidance_scale=float("nan")),
        ("realisid_config.json: id_guidance_scale is nan, expected a finite number",),
    ),
    "half a step": (
        lambda p: edit(p / "realisid_config.json", num_inference_steps=12.5),
        ("num_inference_steps is 12.5, expected a whole number of at least 1",),
    ),
    "true pixels": (
        lambda p: edit(p / "realisid_config.json", box_snap=True),
        ("box_snap is True, expected a whole number of pixels",),
    ),
    "not JSON": (lambda p: put(p / "unet" / "config.json", "{"), ("unet/config.json cannot be read as JSON",)),
    "a list": (lambda p: put(p / "vae" / "config.json", "[]"), ("holds a list, expected a JSON object",)),
    "no branch": (
        lambda p: shutil.rmtree(p / "controlnet_global"),
        ("controlnet_global is missing. realisid_config.json makes it a part of the checkpoint",),
    ),
    "no unet and no base": (
        lambda p: shutil.rmtree(p / "unet"),
        ("unet is missing", 'names no "base_model"', "or name the base model (a folder or a hub id)"),
    ),
    "base that is nothing": (
        lambda p: (shutil.rmtree(p / "unet"), edit(p / "model_index.json", base_model="../nowhere")),
        ("the base model ../nowhere is not a folder", "not the id of a hub model", "--base-model"),
    ),
    "base of a stranger": (
        lambda p: (shutil.rmtree(p / "unet"), edit(p / "model_index.json", base_model="~no-such-user/base")),
        ("the base model ~no-such-user/base is not a folder", "--base-model"),
    ),
    "base without the part": (
        lambda p: ((p / "unet").rename(p / "away"), edit(p / "model_index.json", base_model="away")),
        ("unet is neither in", "nor in the base model away", "name another base model"),
    ),
    "no config": (lambda p: (p / "vae" / "config.json").unlink(), ("vae/config.json is missing: it describes vae",)),
    "no weights": (
        lambda p: (p / "vae" / UNET).unlink(),
        ("vae holds no weights, expected diffusion_pytorch_model.safetensors or",),
    ),
    "a pickled projection": (
        lambda p: (p / "id_projection" / "model.safetensors").rename(p / "id_projection" / "ip-adapter.bin"),
        ("id_projection holds ip-adapter.bin and no safetensors", "Pickles are refused", "weights_only=True"),
    ),
    "cut off": (
        lambda p: put(p / "unet" / UNET, (p / "unet" / UNET).read_bytes()[:-100]),
        ("bytes, expected", "it was cut off or altered. Copy it again"),
    ),
    "no safetensors inside": (
        lambda p: put(p / "unet" / UNET, b"PK\x03\x04" + bytes(100)),
        ("is not a safetensors file", "Copy it again, or convert it"),
    ),
    "git-lfs pointer": (
        lambda p: put(p / "unet" / UNET, "version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
        ("is a git-lfs pointer", "git lfs pull"),
    ),
    "single and index": (
        lambda p: put(p / "unet" / f"{UNET}.index.json", "{}"),
        (f"holds both {UNET} and {UNET}.index.json", "Remove the one that is out of date"),
    ),
    "a shard too few": (
        lambda p: ((p / "unet" / UNET).unlink(), index(p, {"conv_in.bias": "a-00001-of-00002.safetensors"})),
        ("names 1 shards, of which a-00001-of-00002.safetensors is missing", "beside the index"),
    ),
    "a shard no disk can hold": (
        lambda p: ((p / "unet" / UNET).unlink(), index(p, {"conv_in.bias": "a" * 300})),
        ("a cannot be read (File name too long)", "copy it again"),
    ),
    "a shard outside": (
        lambda p: ((p / "unet" / UNET).rename(p / UNET), index(p, {"conv_in.bias": f"../{UNET}"})),
        (f"of which {UNET} is missing",),
    ),
    "an index of other shards": (
        lambda p: (
            (p / "unet" / UNET).rename(p / "unet" / "a.safetensors"),
            index(p, {"conv_in.bias": "a.safetensors"}),
        ),
        ("and its shards disagree about", "tensors: add_embedding.linear_1.bias (a.safetensors)"),
    ),
    "another class": (
        config("controlnet_local", _class_name="ControlNetUnionModel"),
        ("names the class ControlNetUnionModel, expected ControlNetModel",),
    ),
    "another encoder": (
        config("image_encoder", architectures=["SiglipVisionModel"]),
        ("names the class SiglipVisionModel, expected CLIPVisionModelWithProjection or CLIPVisionModel",),
    ),
    "a class that is a number": (
        config("text_encoder", architectures=5),
        ("a config.json has a value of an impossible kind (TypeError",),
    ),
    "heads": (
        config("text_encoder", num_attention_heads=5),
        (
            "text_encoder/config.json is not a config of CLIPTextModel: ",
            "not a multiple of the number of attention heads",
        ),
    ),
    "VAE factor": (
        lambda p: edit(p / "vae" / "config.json", block_out_channels=[8, 16, 16, 32]),
        ("controlnet_local/config.json: conditioning_embedding_out_channels is [8, 16, 32]", "shrink 8-fold"),
    ),
    "condition embedding": (
        config("controlnet_global", conditioning_embedding_out_channels=[8, 16, 32, 32]),
        ("controlnet_global/config.json: conditioning_embedding_out_channels", "3 numbers", "shrink 4-fold"),
    ),
    "branches swapped": (
        lambda p: (
            (p / "controlnet_local").rename(p / "x"),
            (p / "controlnet_global").rename(p / "controlnet_local"),
            (p / "x").rename(p / "controlnet_global"),
        ),
        ("controlnet_local/config.json: conditioning_channels is 1, expected 3", "are not swapped"),
    ),
    "blocks": (
        config("controlnet_local", block_out_channels=[16, 32, 48]),
        ("controlnet_local gives 10 residuals", "48@2", "64@2", "take the base model"),
    ),
    "layers": (
        config("controlnet_global", layers_per_block=1),
        ("controlnet_global gives 7 residuals 16@0 16@0 16@1", "the UNet takes 10", "must be the UNet's"),
    ),
    "levels": (
        config("controlnet_local", block_out_channels=[16, 32], down_block_types=["DownBlock2D"] * 2),
        ("controlnet_local gives 7 residuals", "the UNet takes 10"),
    ),
    "branch width": (
        config("controlnet_local", cross_attention_dim=48),
        ("controlnet_local/config.json: cross_attention_dim is 48, expected 64, the UNet's",),
    ),
    "branch added conditions": (
        config("controlnet_local", addition_embed_type=None),
        ("controlnet_local/config.json: addition_embed_type is None, expected 'text_time', the UNet's",),
    ),
    "branch channel order": (
        config("controlnet_local", controlnet_conditioning_channel_order="bgr"),
        ("controlnet_conditioning_channel_order is 'bgr', expected 'rgb'",),
    ),
    "projection output": (
        config("id_projection", output_dim=48),
        ("id_projection/config.json: output_dim is 48, expected 64, the branches' cross_attention_dim",),
    ),
    "projection input": (
        config("id_projection", input_dim=32),
        ("input_dim is 32, expected 48, the image encoder's hidden_size",),
    ),
    "projection tokens": (config("id_projection", num_tokens=64), ("num_tokens is 64, expected 65: (64 / 8)² + 1",)),
    "projection class": (config("id_projection", **{"class": "mlp"}), ("class is 'mlp', expected \"linear\" or",)),
    "projection key": (config("id_projection", tokens=65), ("unknown tokens. Keys of class",)),
    "projection gap": (config("id_projection", input_dim=...), ("missing input_dim. Keys of class",)),
    "projection number": (config("id_projection", input_dim="48"), ("input_dim is '48', expected a positive number",)),
    "text width": (
        config("text_encoder", hidden_size=48),
        ("text_encoder + text_encoder_2 give 48 + 32 = 80 features a token", "cross_attention_dim is 64"),
    ),
    "pooled width": (config("text_encoder_2", projection_dim=48), ("projection_dim is 48, expected 32",)),
    "text length": (
        config("text_encoder", max_position_embeddings=64),
        ("max_position_embeddings [64, 77], expected one number",),
    ),
    "no second text encoder": (lambda p: shutil.rmtree(p / "text_encoder_2"), ("text_encoder_2 is missing",)),
    "no tokenizer": (lambda p: (p / "tokenizer_2" / "vocab.json").unlink(), ("tokenizer_2/vocab.json is missing",)),
    "no merges": (lambda p: (p / "tokenizer" / "merges.txt").unlink(), ("tokenizer/merges.txt is missing",)),
    "too many tokens": (
        config("text_encoder", vocab_size=500),
        ("has 1013 tokens, its text encoder 500 embeddings",),
    ),
    "no sample_size": (
        config("unet", sample_size=...),
        ("unet/config.json: sample_size is None, expected the side of the square latents", "add it to the file"),
    ),
    "odd sample_size": (config("unet", sample_size=30), ("sample_size is 30", "a multiple of 4")),
    "wide sample_size": (config("unet", sample_size=[32, 64]), ("sample_size is [32, 64]", "the square latents")),
    "inpainting": (config("unet", in_channels=9), ("in_channels is 9, expected 4, its out_channels", "Inpainting")),
    "another UNet": (
        config("unet", addition_embed_type="text_image"),
        ("addition_embed_type is 'text_image', expected None or 'text_time'",),
    ),
    "another block": (
        config("unet", down_block_types=["DownBlock2D", "KDownBlock2D", "CrossAttnDownBlock2D"]),
        ("down_block_types is", "expected only DownBlock2D and CrossAttnDownBlock2D"),
    ),
    "latent channels": (config("vae", latent_channels=16), ("latent_channels is 16, expected 4, the UNet's",)),
    "nonsense": (config("vae", block_out_channels=8), ("a config.json has a value of an impossible kind",)),
    "scaling of 0": (
        config("vae", scaling_factor=0),
        ("vae/config.json: scaling_factor is 0, expected a number above 0",),
    ),
    "no scaling": (config("vae", scaling_factor=None), ("scaling_factor is None, expected a number above 0",)),
    "scaling in words": (
        config("vae", scaling_factor="0.13"),
        ("scaling_factor is '0.13', expected a number above 0",),
    ),
    "scaling without end": (config("vae", scaling_factor=float("inf")), ("scaling_factor is inf",)),
    "shift": (config("vae", shift_factor="0"), ("shift_factor is '0', expected a number, or none",)),
    "means": (
        config("vae", latents_mean=[0, 0, 0], latents_std=[1] * 4),
        ("latents_mean is [0, 0, 0], expected 4 numbers",),
    ),
    "deviations": (
        config("vae", latents_mean=[0] * 4, latents_std=[1, 1, 1, 0]),
        ("latents_std is [1, 1, 1, 0], expected 4 numbers above 0, one for each latent channel",),
    ),
    "means alone": (
        config("vae", latents_mean=[0] * 4),
        ("latents_std is None, expected 4 numbers: latents_mean is given",),
    ),
    "deviations alone": (config("vae", latents_std=[1] * 4), ("latents_mean is None, expected 4 numbers",)),
    "no mean": (
        lambda p: edit(p / "feature_extractor" / "preprocessor_config.json", image_mean=...),
        ("image_mean is None, expected three numbers",),
    ),
    "a mean that is no number": (
        lambda p: edit(p / "feature_extractor" / "preprocessor_config.json", image_mean=[0.5, 0.5, float("nan")]),
        ("image_mean is [0.5, 0.5, nan], expected three numbers",),
    ),
    "no spread": (
        lambda p: edit(p / "feature_extractor" / "preprocessor_config.json", image_std=[0.5, 0, 0.5]),
        ("image_std is [0.5, 0, 0.5], expected numbers above 0",),
    ),
    "crop size": (
        lambda p: edit(p / "feature_extractor" / "preprocessor_config.json", crop_size={"height": 224, "width": 224}),
        ("expected 64 px, the image encoder's image_size",),
    ),
    "null ID without file": (
        lambda p: edit(p / "realisid_config.json", null_id="file"),
        ('null_id.safetensors is missing, and realisid_config.json says null_id "file"', "shape (65, 64)"),
    ),
    "null ID of another shape": (
        lambda p: (edit(p / "realisid_config.json", null_id="file"), null_id(p, null_id_tokens=torch.zeros(77, 64))),
        ("holds {'null_id_tokens': (77, 64)}, expected the one key null_id_tokens of shape (65, 64)",),
    ),
    "null ID under another key": (
        lambda p: (edit(p / "realisid_config.json", null_id="file"), null_id(p, tokens=torch.zeros(65, 64))),
        ("holds {'tokens': (65, 64)}, expected the one key null_id_tokens",),
    ),
}

# name → (part, what is done to its weights, pieces of the error of check_weights and of the loader)
BAD_WEIGHTS: dict[str, tuple[str, Callable[[Tensors], object], tuple[str, ...]]] = {
    "missing": ("unet", lambda w: w.pop("conv_in.bias"), ("1 missing (conv_in.bias)", "UNet2DConditionModel")),
    "surplus": ("vae", lambda w: w.update(extra=torch.zeros(2)), ("1 unexpected (extra)", "AutoencoderKL")),
    "shape": (
        "controlnet_global",
        lambda w: w.update({"conv_in.bias": torch.zeros(3)}),
        ("1 of another shape (conv_in.bias: (3,) in the file, (16,) expected)",),
    ),
    "many": (
        "controlnet_local",
        lambda w: [w.pop(key) for key in list(w) if key.startswith("mid_block.")],
        ("missing (mid_block.attentions.0.norm.bias, ", ", …)"),
    ),
    "text": (
        "text_encoder_2",
        lambda w: w.update(renamed=w.pop("text_projection.weight")),
        ("1 missing (text_projection.weight)", "1 unexpected (renamed)"),
    ),
    "projection": (
        "id_projection",
        lambda w: w.update({"norm.gamma": w.pop("norm.weight")}),
        ("1 missing (norm.weight)", "1 unexpected (norm.gamma)"),
    ),
}
