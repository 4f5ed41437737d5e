"""The published ID-Patch, run from a clone of its repository: what its networks read, and its final latents.

Interface: bytedance/ID-Patch at 099ad14, `modules/inferencer.py`. Nothing of it is part of this project. A clone is
code, and this process runs it.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import sys
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from realisid_trt.errors import RequestError

from .reading import CONDITION, LATENTS, Picture, Reading, pooled_name, tokens_name

INFERENCER = Path("modules") / "inferencer.py"
PACKAGES = ("modules", "utils")  # names of a clone's packages; other modules may have them too
TYPES = ("Any", "Callable", "Dict", "List", "Optional", "Tuple", "Union")
REPOSITORY = "https://github.com/bytedance/ID-Patch"


def run_published(
    clone: Path, weights: Path, base: str, variant: str | None, device: str, precision: str, picture: Picture
) -> Reading:
    """The published pipeline's picture. Everything that was opened for it is released.

    clone:     of the repository. weights: the folder of id-patch.bin and ControlNetModel/. base: as from_pretrained
               takes it. variant: of its weight files; the published code takes the plain ones, None.
    device:    torch's name. precision: of all its modules.

    Raises RequestError if it cannot be imported, opened or run.
    """
    import torch

    reading = Reading()
    with _older_diffusers(), _inferencer(clone, variant) as kind:
        try:
            inferencer = kind(
                base_model_path=base,
                idp_model_path=str(weights),
                patch_size=picture.patch_px,
                torch_device=device,
                torch_dtype=getattr(torch, precision),
            )
        except Exception as error:  # of code that is not ours
            raise RequestError(
                f"the published inferencer could not open {weights} (expected id-patch.bin and ControlNetModel/) with "
                f"the base model {base}: {type(error).__name__}: {error}. Give --weights and --base."
            ) from error
        try:
            _generate(inferencer, picture, reading)
        except Exception as error:
            raise RequestError(
                f"the published pipeline failed: {type(error).__name__}: {error}. It was written for diffusers 0.30.3, "
                "and last run by us with 0.42.1."
            ) from error
    del inferencer
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return reading


def _generate(inferencer: Any, picture: Picture, reading: Reading) -> None:
    import torch

    with _read(inferencer.pipe, reading):
        inferencer.pipe = _FromLatents(inferencer.pipe, torch.from_numpy(picture.latents), reading)
        inferencer.generate(
            torch.from_numpy(picture.embeddings),
            torch.from_numpy(picture.noses),
            Image.fromarray(picture.drawing),
            prompt=picture.prompt,
            negative_prompt=picture.negative_prompt,
            guidance_scale=picture.guidance_scale,
            num_inference_steps=picture.steps,
            controlnet_conditioning_scale=picture.scale,
            id_injection_ratio=picture.ratio,
            seed=0,
        )


class _FromLatents:
    """The published pipeline, started from given latents and ended before its VAE."""

    def __init__(self, pipe: Any, latents: Any, reading: Reading) -> None:
        self._pipe, self._latents, self._reading = pipe, latents, reading

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pipe, name)

    def __call__(self, **given: Any) -> Any:
        latents = self._latents.to(given["prompt_embeds"])
        result = self._pipe(**{**given, "latents": latents, "output_type": "latent"})
        self._reading.keep(LATENTS, _numpy(result.images))
        return result


@contextlib.contextmanager
def _read(pipe: Any, reading: Reading) -> Iterator[None]:
    """A context in which calls of the pipeline's UNet and ControlNet are kept."""

    def before(reader: str, arguments: Sequence[Any], keywords: Mapping[str, Any]) -> None:
        tokens = keywords["encoder_hidden_states"]
        reading.keep(tokens_name(reader, tokens.shape[1]), _numpy(tokens))
        reading.keep(pooled_name(reader), _numpy(keywords["added_cond_kwargs"]["text_embeds"]))
        if reader == "ControlNet":
            reading.keep(CONDITION, _numpy(keywords["controlnet_cond"][0]))
        else:
            reading.timesteps.append(float(arguments[1] if len(arguments) > 1 else keywords["timestep"]))
            reading.tokens.append(int(tokens.shape[1]))

    modules = {"UNet": pipe.unet, "ControlNet": pipe.controlnet}
    hooks = [
        module.register_forward_pre_hook(
            lambda _, arguments, keywords, reader=reader: before(reader, arguments, keywords), with_kwargs=True
        )
        for reader, module in modules.items()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextlib.contextmanager
def _inferencer(clone: Path, variant: str | None) -> Iterator[Any]:
    """A context with the class IDPatchInferencer of a clone; afterwards Python finds no module there any more."""
    if not (clone / INFERENCER).is_file():
        raise RequestError(
            f"--published {clone} has no {INFERENCER}, expected a clone of ID-Patch: git clone {REPOSITORY}"
        )
    others = {name: module for name, module in sys.modules.items() if name.partition(".")[0] in PACKAGES}
    for name in others:
        del sys.modules[name]
    sys.path.insert(0, str(clone.absolute()))
    try:
        importlib.invalidate_caches()
        try:
            module = importlib.import_module("modules.inferencer")
            kind = module.IDPatchInferencer
            if variant is not None:
                pipeline = module.StableDiffusionXLIDPatchPipeline
                pipeline.from_pretrained = functools.partial(pipeline.from_pretrained, variant=variant)
        except Exception as error:  # of code that is not ours
            raise RequestError(
                f"{clone / INFERENCER} could not be imported: {type(error).__name__}: {error}. Install what it needs "
                f"beside this package, or check out the commit 099ad14 of {REPOSITORY}."
            ) from error
        yield kind
    finally:
        sys.path.remove(str(clone.absolute()))
        for name in [name for name in sys.modules if name.partition(".")[0] in PACKAGES]:
            del sys.modules[name]
        sys.modules.update(others)


@contextlib.contextmanager
def _older_diffusers() -> Iterator[None]:
    """A context in which two modules of diffusers have what they had, or did not need, in 0.30.3.

    The published pipeline takes names of `typing` from the module of the pipeline that it extends. The published
    inferencer converts projections by a bare `UNet2DConditionLoadersMixin`, which nowadays asks itself for a device.
    """
    import torch

    pipeline = importlib.import_module("diffusers.pipelines.controlnet.pipeline_controlnet_sd_xl")
    mixin = importlib.import_module("diffusers.loaders.unet").UNet2DConditionLoadersMixin
    values = [(pipeline, name, getattr(typing, name)) for name in TYPES]
    values += [(mixin, "device", torch.device("cpu")), (mixin, "dtype", torch.float32)]
    lacks = [(owner, name, value) for owner, name, value in values if not hasattr(owner, name)]
    for owner, name, value in lacks:
        setattr(owner, name, value)
    try:
        yield
    finally:
        for owner, name, _ in lacks:
            delattr(owner, name)


def _numpy(tensor: Any) -> NDArray[np.float32]:
    array: NDArray[np.float32] = tensor.detach().float().cpu().numpy()
    return array
