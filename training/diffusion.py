"""The target of a denoising network: the noise that was added to the latents, or the velocity.

z_t = √ᾱ_t·z + √(1−ᾱ_t)·ε        target: ε, or v = √ᾱ_t·ε − √(1−ᾱ_t)·z under v-prediction
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from export.checkpoint import Checkpoint
from realisid_trt.errors import CheckpointError


class Diffusion:
    """The noise schedule of a checkpoint. alphas: (T,) float32, ᾱ_t = alphas_cumprod."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        """Raises CheckpointError for a network that predicts clean latents."""
        scheduler = checkpoint.load_scheduler()
        prediction: str = scheduler.config.prediction_type
        if prediction == "sample":
            raise CheckpointError(
                f"{checkpoint.path}: scheduler/scheduler_config.json says prediction_type sample. Networks that "
                "predict the clean latents were distilled to a single step, and training asks for noise levels that "
                "they do not know. Train on the model that it was distilled from."
            )
        self.alphas: Tensor = scheduler.alphas_cumprod.float()
        self.velocity: bool = prediction == "v_prediction"

    def draw(self, rng: np.random.Generator, shape: tuple[int, ...]) -> dict[str, Tensor]:
        """Noise of that shape and a uniform timestep, of one example."""
        noise = torch.from_numpy(rng.standard_normal(shape, np.float32))
        return {"noise": noise, "timestep": torch.tensor(int(rng.integers(len(self.alphas))))}

    def noisy(self, latents: Tensor, noise: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """z_t and the target, of (B, C, h, w) latents and noise and (B,) timesteps."""
        alpha = self.alphas.to(latents.device)[timestep].view(-1, 1, 1, 1)
        signal, sigma = alpha.sqrt(), (1 - alpha).sqrt()
        target = signal * noise - sigma * latents if self.velocity else noise
        return signal * latents + sigma * noise, target

    def original(self, prediction: Tensor, noisy: Tensor, timestep: Tensor) -> Tensor:
        """pred_original_sample: the z that a prediction implies."""
        alpha = self.alphas.to(noisy.device)[timestep].view(-1, 1, 1, 1)
        signal, sigma = alpha.sqrt(), (1 - alpha).sqrt()
        if self.velocity:
            return signal * noisy - sigma * prediction
        return (noisy - sigma * prediction) / signal


def plain_attention_on(device: torch.device, *modules: Any) -> None:
    """On a CPU, attention by matrix products: the backward pass of torch's fused kernel takes ten times as long there.

    Measured with torch 2.13 on two cores: it was half of a whole training step of the miniature.
    """
    if device.type == "cpu":
        from diffusers.models.attention_processor import AttnProcessor

        for module in modules:
            if hasattr(module, "set_attn_processor"):  # of diffusers
                module.set_attn_processor(AttnProcessor())
            else:  # of transformers
                module.set_attn_implementation("eager")


def mean_square(prediction: Tensor, target: Tensor) -> Tensor:
    """(B, C, h, w) squared error in float32."""
    return (prediction.float() - target.float()).pow(2)


def seldom(rng: np.random.Generator, share: float) -> Tensor:
    """True in that share of the cases."""
    return torch.tensor(bool(rng.random() < share))
