"""The whole engine, run by the runtime, against the reference: final latents of a picture of two persons."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from realisid_trt import Engine, Person
from realisid_trt.ddim import initial_noise
from realisid_trt.errors import ParityError

from .checkpoint import Checkpoint
from .reference import Reference, ReferencePerson

STEPS, RATIO = 4, 0.5  # with and without the ID
WORST_RATIO = 4.0  # times the error of the reference in float32


def verify_engine(path: Path, checkpoint: Checkpoint) -> dict[str, Any]:
    """The engine's and the float32 reference's RMS error against the float64 reference, relative to the latents' RMS.

    Raises ParityError if the engine errs more than WORST_RATIO times what plain torch errs.
    """
    engine = Engine.load(path)
    model, side = engine.model, engine.model.default_size
    rng = np.random.default_rng(0)
    pixels = rng.standard_normal((2, 3, model.image_size, model.image_size)).astype(np.float32)
    drawings = rng.random((2, 3, side, side)).astype(np.float32).round()
    boxes = [(0.1 * side, 0.2 * side, 0.5 * side, 0.6 * side), (0.5 * side, 0.3 * side, 0.9 * side, 0.7 * side)]
    cells = side // model.vae_scale_factor
    latents = initial_noise(0, (1, model.latent_channels, cells, cells))
    settings: dict[str, Any] = {"num_inference_steps": STEPS, "subject_conditioning_ratio": RATIO}

    tokens = engine.backend.run("id_encoder", {"id_pixels": engine.backend.put(pixels)})["id_tokens"]
    persons = [Person(id_tokens=t, box=box, pose_image=d) for t, box, d in zip(tokens, boxes, drawings, strict=True)]
    ours = engine.generate("a photo of two people", persons, latents=latents, output="latents", **settings).latents

    def reference(dtype: torch.dtype) -> np.ndarray:
        people = [
            ReferencePerson(pose_image=torch.from_numpy(drawing), box=box, id_pixels=torch.from_numpy(image))
            for image, drawing, box in zip(pixels, drawings, boxes, strict=True)
        ]
        z = Reference(checkpoint, dtype).generate(
            "a photo of two people", people, torch.from_numpy(latents), **settings
        )
        return z.double().numpy()

    truth = reference(torch.float64)
    scale = float(np.sqrt(np.mean(truth**2)))
    rms, rms_torch = (float(np.sqrt(np.mean((z - truth) ** 2))) / scale for z in (ours, reference(torch.float32)))
    if not rms <= WORST_RATIO * rms_torch:
        raise ParityError(
            f"the whole engine errs {rms:.2e} in the final latents after {STEPS} steps, the reference in float32 errs "
            f"{rms_torch:.2e}; at most {WORST_RATIO:g} times that is accepted. Every network passed by itself, so "
            "report this as a bug of the runtime, with these figures."
        )
    return {
        "backend": engine.backend.name,
        "steps": STEPS,
        "rms": rms,
        "rms_torch": rms_torch,
        "ratio": rms / rms_torch,
    }
