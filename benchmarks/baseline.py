"""What the baselines share: the checkpoint's own modules on one device, and the clock that measures them.

On a GPU they compute as the engine does: networks in the engine's precision, the VAE in float32, and a loop that does
not wait for the GPU. Times are measured between events on torch's stream and read when the picture is finished;
`progress` is called one step late, as with the engine.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from export.checkpoint import Checkpoint
from export.checkpoint.vae import from_latents

from .torch_device import Clock, ClockedUsage

Progress = Callable[[int, int], object]
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


@dataclass(frozen=True, eq=False)
class BaselineResult:
    """latents (1, C, h, w) float32; image (H, W, 3) float32 in [0, 1], or None; the rest as in the engine's Result."""

    latents: NDArray[np.float32]
    image: NDArray[np.float32] | None
    timings: dict[str, float]
    step_ms: tuple[float, ...]
    rows: dict[str, int]


class Baseline:
    """The modules, and what every baseline does with them. A child has `generate`."""

    generate: Callable[..., BaselineResult]
    TRIAL: ClassVar[dict[str, Any]] = {"decode": False}  # options of the pictures that compare the formats

    def __init__(
        self,
        checkpoint: Checkpoint,
        memory_format: str = "contiguous",
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Loads the weights. memory_format: of the convolutions, "contiguous" or "channels_last".

        dtype: of the networks; the VAE is float32 in any case, since SDXL's overflows float16.
        """
        self.checkpoint, self.config = checkpoint, checkpoint.config
        self.device, self.dtype = torch.device(device), dtype
        self.unet: Any = checkpoint.load_unet(dtype).to(self.device)
        self.vae: Any = checkpoint.load_vae().to(self.device)
        self.controlnets: dict[str, Any] = {
            branch.name: checkpoint.load_controlnet(branch.name, dtype).to(self.device) for branch in self.config.table
        }
        names = checkpoint.text_encoder_names
        self.text_encoders = {name: checkpoint.load_text_encoder(name, dtype).to(self.device) for name in names}
        self.tokenizers = {name: checkpoint.load_tokenizer(name) for name in names}
        self.scheduler = checkpoint.load_scheduler()
        self.null_id_tokens = torch.empty(0)
        if self.config.id_input != "none":  # computed now: no picture is timed or weighed with the image encoder
            self.null_id_tokens = checkpoint.null_id_tokens().to(self.device, dtype)
        self.clock = Clock(self.device)
        self.usage = ClockedUsage(self.clock)
        self.use_format(memory_format)

    def with_networks(self, unet: Any, controlnets: Mapping[str, Any]) -> Self:
        """The same baseline with other networks of the loop."""
        other = copy.copy(self)
        other.unet, other.controlnets = unet, dict(controlnets)
        return other

    def use_format(self, memory_format: str) -> None:
        """Lays the convolutions' weights out in this format, in place."""
        self.memory_format, self._format = memory_format, FORMATS[memory_format]
        for module in (self.unet, self.vae, *self.controlnets.values()):
            module.to(memory_format=self._format)

    def use_faster_format(self, **picture: Any) -> None:
        """Chooses the format in which a step of this picture is faster, by the better of its steps.

        picture: arguments of `generate` without the prompt.
        """

        def step_ms(memory_format: str) -> float:
            self.use_format(memory_format)
            return min(self.generate("", **picture, **self.TRIAL).step_ms)

        self.use_format(min(FORMATS, key=step_ms))

    def encode_prompt(self, prompt: str | None) -> tuple[Tensor, Tensor | None]:
        """prompt_embeds (1, 77, D), pooled (1, P) or None. None is the absent negative prompt."""
        c = self.checkpoint
        if prompt is None and self.config.force_zeros_for_empty_prompt:
            options: dict[str, Any] = {"device": self.device, "dtype": self.dtype}
            pooled = torch.zeros(1, c.pooled_dim, **options) if c.has_added_conditions else None
            return torch.zeros(1, c.max_length, c.cross_attention_dim, **options), pooled
        hidden_states, pooled = [], None
        for name, encoder in self.text_encoders.items():
            tokens = self.tokenizers[name](
                prompt or "", padding="max_length", max_length=c.max_length, truncation=True, return_tensors="pt"
            )
            with self.usage.measure(name, 1):
                out = encoder(tokens.input_ids.to(self.device), output_hidden_states=c.has_added_conditions)
            hidden_states.append(out.hidden_states[-2] if c.has_added_conditions else out[0])
            pooled = out[0] if c.has_added_conditions else None
        return torch.cat(hidden_states, dim=-1), pooled

    def _placed(self, arrays: Any, dtype: torch.dtype) -> Tensor:
        """An array, or a list of them as one, on the device."""
        return torch.from_numpy(np.array(arrays, np.float32)).to(self.device, dtype)

    def _decoded(self, latents: Tensor) -> NDArray[np.float32]:
        """latents (1, C, h, w) float32 → image (H, W, 3)."""
        decoded = self.vae.decode(from_latents(latents, self.vae.config), return_dict=False)[0]
        image: NDArray[np.float32] = (decoded[0].permute(1, 2, 0) / 2 + 0.5).clamp(0, 1).contiguous().cpu().numpy()
        return image
