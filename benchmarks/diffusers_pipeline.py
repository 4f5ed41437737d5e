"""diffusers' own ControlNet pipeline, called as its documentation does: the baseline of an engine without identities.

The pipeline makes the loop: two guidance rows in one batch for the UNet and every ControlNet in every step, which it
runs outside their windows too, with scale 0. The text is encoded before it and the picture decoded after it, so that
these stages can be timed; its latents are in the precision of the networks. Hooks and its callback read the clock.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray

from realisid_trt import Control
from realisid_trt.config import RealisIDConfig
from realisid_trt.errors import RequestError
from realisid_trt.persons.person import Person

from .baseline import Baseline, BaselineResult, Progress
from .torch_device import ClockedUsage


def can_run(config: RealisIDConfig, has_pooled: bool) -> bool:
    """Whether diffusers' pipelines do what this table says: ControlNets that read what the UNet reads.

    has_pooled: whether the base model has pooled text. Without it (SD 1.5), a row's `pooled` means nothing.
    """
    return config.id_input == "none" and all(
        branch.per == "picture" and (branch.pooled == "per_row" or not has_pooled) for branch in config.table
    )


class DiffusersPipeline(Baseline):
    """StableDiffusionXLControlNetPipeline, or StableDiffusionControlNetPipeline, on the checkpoint's own modules."""

    _unet_end: Any = None  # the marker after the UNet's last call

    def with_networks(self, unet: Any, controlnets: Mapping[str, Any]) -> Self:
        other = super().with_networks(unet, controlnets)
        other.__dict__.pop("_opened", None)
        return other

    @torch.inference_mode()
    def generate(
        self,
        prompt: str,
        persons: Sequence[Person],
        latents: NDArray[np.float32],
        *,
        negative_prompt: str | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        controls: Mapping[str, Control] | None = None,
        decode: bool = True,
        progress: Progress | None = None,
    ) -> BaselineResult:
        """One picture, from the latents (1, C, h, w).

        controls: as in a Request; images are (C, H, W) floats at the picture's size. Raises RequestError for persons.
        """
        if persons:
            raise RequestError("diffusers' pipeline cannot show given persons: leave persons out.")
        self.usage, watch, c = ClockedUsage(self.clock), ClockedUsage(self.clock), self.checkpoint
        steps = self.config.num_inference_steps if num_inference_steps is None else num_inference_steps
        with watch.measure("text"):
            (text, pooled), (negative, negative_pooled) = (
                self.encode_prompt(each) for each in (prompt, negative_prompt)
            )
        given: dict[str, Any] = {"prompt_embeds": text, "negative_prompt_embeds": negative}
        if c.has_added_conditions:
            given |= {"pooled_prompt_embeds": pooled, "negative_pooled_prompt_embeds": negative_pooled}
        shown = {name: control for name, control in (controls or {}).items() if control.image is not None}
        called, stamps = self.clock.stamp(), list[Any]()

        def ended(pipeline: Any, step: int, timestep: Any, tensors: Any) -> dict[str, Any]:
            stamps.append(self.clock.stamp())
            self.usage.add_between("guidance", 1, self._unet_end, stamps[-1])
            if progress is not None:
                self.clock.wait_for(stamps[-2])
                progress(step + 1, steps)
            return {}

        with self._measured(list(shown), stamps):
            final = self._pipeline(list(shown))(
                **given,
                **self._conditioning(shown),
                latents=self._placed(latents, self.dtype).contiguous(memory_format=self._format),
                height=latents.shape[-2] * c.vae_scale_factor,
                width=latents.shape[-1] * c.vae_scale_factor,
                num_inference_steps=steps,
                guidance_scale=self.config.guidance_scale if guidance_scale is None else guidance_scale,
                callback_on_step_end=ended,
                callback_on_step_end_tensor_inputs=[],
                output_type="latent",
            ).images.float()
        watch.add_between("conditions", 0, called, stamps[0])
        watch.add_between("denoise", 0, stamps[0], stamps[-1])
        image = None
        if decode:
            with watch.measure("vae"), self.usage.measure("vae", 1):
                image = self._decoded(final)
        parts = (*(f"controlnet_{name}" for name in self.controlnets), "unet", "guidance")
        timings = watch.ms | {f"denoise.{name}": self.usage.ms[name] for name in parts if name in self.usage.ms}
        step_ms = tuple(self.clock.elapsed_ms(stamps))
        return BaselineResult(final.contiguous().cpu().numpy(), image, timings, step_ms, dict(self.usage.rows))

    def _conditioning(self, shown: Mapping[str, Control]) -> dict[str, Any]:
        """The pipeline's arguments for its ControlNets: lists for several, none for none."""
        if not shown:
            return {}
        rows = {branch.name: branch for branch in self.config.table}

        def value(name: str, key: str) -> float:
            asked = getattr(shown[name], key)
            return float(getattr(rows[name], key) if asked is None else asked)

        images = [self._placed([control.image], self.dtype) for control in shown.values()]
        scales, starts, ends = ([value(name, key) for name in shown] for key in ("scale", "start", "end"))
        alone = len(shown) == 1
        return {
            "image": images[0] if alone else images,
            "controlnet_conditioning_scale": scales[0] if alone else scales,
            "control_guidance_start": starts,
            "control_guidance_end": ends,
        }

    def _pipeline(self, names: Sequence[str]) -> Any:
        """diffusers' pipeline with these ControlNets; the one for text alone without any. Opened once."""
        opened: dict[tuple[str, ...], Any] = self.__dict__.setdefault("_opened", {})
        if tuple(names) not in opened:
            opened[tuple(names)] = self._open([self.controlnets[name] for name in names])
        return opened[tuple(names)]

    def _open(self, nets: Sequence[Any]) -> Any:
        import diffusers

        kind = "StableDiffusionXL" if self.checkpoint.has_added_conditions else "StableDiffusion"
        parts: dict[str, Any] = {"vae": self.vae, "unet": self.unet, "scheduler": self.scheduler}
        for name, encoder in self.text_encoders.items():
            parts |= {name: encoder, name.replace("text_encoder", "tokenizer"): self.tokenizers[name]}
        if nets:
            parts["controlnet"] = nets[0] if len(nets) == 1 else diffusers.MultiControlNetModel(nets)
        if self.checkpoint.has_added_conditions:
            parts["add_watermarker"] = False
        else:
            parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        pipeline = getattr(diffusers, f"{kind}{'ControlNet' if nets else ''}Pipeline")(**parts)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    @contextlib.contextmanager
    def _measured(self, names: Sequence[str], stamps: list[Any]) -> Iterator[None]:
        """A context in which calls of the UNet and these ControlNets are measured; the first begins the first step."""
        begun: dict[str, Any] = {}

        def before(name: str, arguments: Sequence[Any], keywords: Mapping[str, Any]) -> None:
            begun[name] = self.clock.stamp()
            if not stamps:
                stamps.append(begun[name])

        def after(name: str, arguments: Sequence[Any], keywords: Mapping[str, Any]) -> None:
            rows, end = len(arguments[0] if arguments else keywords["sample"]), self.clock.stamp()
            self.usage.add_between(name, rows, begun[name], end)
            if name == "unet":
                self._unet_end = end

        hooks = []
        for name, module in {"unet": self.unet, **{f"controlnet_{n}": self.controlnets[n] for n in names}}.items():
            hooks += [
                module.register_forward_pre_hook(
                    lambda _, arguments, keywords, name=name: before(name, arguments, keywords), with_kwargs=True
                ),
                module.register_forward_hook(
                    lambda _, arguments, keywords, output, name=name: after(name, arguments, keywords),
                    with_kwargs=True,
                ),
            ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
