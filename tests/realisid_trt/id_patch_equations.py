"""ID-Patch's equations in plain torch, over diffusers' modules of a checkpoint folder.

Source: the paper's published pipeline and its `generate`, restated. Nothing of the runtime and of `export` is imported:
this is the judge of both. The sampler is the one of the folder, the loop is classifier-free guidance with two rows.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

PATCH_PX = 64


class IdPatchModels:
    """The modules of a checkpoint of SDXL's family, in one dtype."""

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
        from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

        self.dtype = dtype
        self.unet = UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=dtype).eval()
        self.controlnet = ControlNetModel.from_pretrained(folder / "controlnet_id_patch", torch_dtype=dtype).eval()
        self.factor = 2 ** (len(AutoencoderKL.load_config(folder / "vae")["block_out_channels"]) - 1)
        encoders = (CLIPTextModel, "text_encoder", "tokenizer"), (
            CLIPTextModelWithProjection, "text_encoder_2", "tokenizer_2",
        )  # fmt: skip
        self.texts = [
            (CLIPTokenizer.from_pretrained(folder / tokens), kind.from_pretrained(folder / name, dtype=dtype).eval())
            for kind, name, tokens in encoders
        ]
        self.prompt_proj = self._resampler(folder / "id_projection")
        self.patch_proj = self._resampler(folder / "id_patch_projection")
        self.scheduler_folder = folder / "scheduler"

    def _resampler(self, folder: Path) -> nn.Module:
        """diffusers' own module, through its own conversion of an IP-Adapter-plus state dict."""
        from safetensors.torch import load_file

        config = json.loads((folder / "config.json").read_text())
        assert (config["depth"], config["dim_head"], config["embedding_dim"]) == (4, 64, 512)
        weights = load_file(folder / "model.safetensors")
        module = self.unet._convert_ip_adapter_image_proj_to_diffusers(weights)
        return module.to(self.dtype).eval()

    def encode_text(self, prompt: str) -> tuple[Tensor, Tensor]:
        """(1, 77, D) of both encoders' last layer but one, side by side; pooled of the second."""
        hidden = []
        for tokenizer, encoder in self.texts:
            ids = tokenizer(prompt, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
            out = encoder(ids, output_hidden_states=True)
            hidden.append(out.hidden_states[-2])
        return torch.cat(hidden, dim=-1), out.text_embeds

    def scheduler(self, name: str) -> Any:
        import diffusers

        return getattr(diffusers, name).from_pretrained(self.scheduler_folder)


def paste(drawing: Tensor, patches: Tensor, noses: list[tuple[float, float]]) -> Tensor:
    """C = D + Σ_p paste(P_p; round(ν - 32)), pixel by pixel, cut at the border."""
    condition = drawing.clone()
    _, height, width = drawing.shape
    for patch, (x, y) in zip(patches, noses, strict=True):
        left, top = round(x - PATCH_PX / 2), round(y - PATCH_PX / 2)
        for row in range(PATCH_PX):
            for column in range(PATCH_PX):
                if 0 <= top + row < height and 0 <= left + column < width:
                    condition[:, top + row, left + column] += patch[:, row, column]
    return condition


@torch.no_grad()
def id_patch_latents(
    models: IdPatchModels,
    prompt: str,
    negative_prompt: str,
    embeddings: Tensor,
    noses: list[tuple[float, float]],
    drawing: Tensor,
    latents: Tensor,
    steps: int,
    ratio: float | None,
    guidance: float = 5.5,
    scale: float = 0.8,
    sampler: str = "DDIMScheduler",
) -> Tensor:
    """The final latents of one picture.

    embeddings: (N, 512), unit length. noses: px of the picture. drawing: (3, H, W) in [0, 1]. latents: (1, C, h, w).
    ratio:      ρ: step i < S·(1 - ρ) reads the text alone; None never does.
    """
    dtype, count = models.dtype, len(embeddings)
    (text, pooled), (negative, negative_pooled) = models.encode_text(prompt), models.encode_text(negative_prompt)
    height, width = drawing.shape[1:]
    condition = drawing.to(dtype)
    nobody_tokens, id_tokens = negative[:, :0], text[:, :0]
    if count:
        vectors = embeddings.to(dtype)[:, None]
        id_tokens = models.prompt_proj(vectors).flatten(0, 1)[None]
        nobody_tokens = models.prompt_proj(torch.zeros(1, 1, 512, dtype=dtype)).repeat(1, count, 1)
        patches = models.patch_proj(vectors).reshape(count, 3, PATCH_PX, PATCH_PX)
        condition = paste(condition, patches, noses)
    time_ids = torch.tensor([[height, width, 0, 0, height, width]], dtype=dtype).repeat(2, 1)
    added = {"text_embeds": torch.cat([negative_pooled, pooled]), "time_ids": time_ids}
    scheduler = models.scheduler(sampler)
    scheduler.set_timesteps(steps)
    latents = latents.to(dtype) * scheduler.init_noise_sigma
    for i, timestep in enumerate(scheduler.timesteps):
        if ratio is not None and i < steps * (1 - ratio):
            tokens = torch.cat([negative, text])
        else:
            tokens = torch.cat([torch.cat([negative, nobody_tokens], dim=1), torch.cat([text, id_tokens], dim=1)])
        both = scheduler.scale_model_input(torch.cat([latents] * 2), timestep)
        down, mid = models.controlnet(
            both, timestep, encoder_hidden_states=tokens, controlnet_cond=torch.stack([condition] * 2),
            conditioning_scale=scale, added_cond_kwargs=added, return_dict=False,
        )  # fmt: skip
        none, full = models.unet(
            both, timestep, encoder_hidden_states=tokens, added_cond_kwargs=added,
            down_block_additional_residuals=down, mid_block_additional_residual=mid, return_dict=False,
        )[0].chunk(2)  # fmt: skip
        latents = scheduler.step(none + guidance * (full - none), timestep, latents).prev_sample
    return latents
