"""The whole engine, run by the runtime, against the reference: final latents of a picture of two persons."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from realisid_trt import Engine, Person
from realisid_trt.ddim import initial_noise
from realisid_trt.errors import ParityError

from .checkpoint import Checkpoint
from .reference import Reference, ReferencePerson
from .verify import rms_of

STEPS, RATIO = 4, 0.5  # with and without the ID
PROMPT = "a photo of two people"
WORST_RATIO = 4.0  # times the error of the reference in float32


def latent_errors(
    ours: np.ndarray,
    checkpoint: Checkpoint,
    persons: Sequence[ReferencePerson],
    noise: np.ndarray,
    prompt: str,
    **settings: Any,
) -> tuple[float, float]:
    """RMS error of final latents, and of the float32 reference's, against the float64 reference's; relative to its RMS.

    settings: of `Reference.generate`.
    """

    def reference(dtype: torch.dtype) -> np.ndarray:
        z = Reference(checkpoint, dtype).generate(prompt, persons, torch.from_numpy(noise), **settings)
        return z.double().numpy()

    truth = reference(torch.float64)
    plain = reference(torch.float32)
    return rms_of(ours - truth) / rms_of(truth), rms_of(plain - truth) / rms_of(truth)


def verify_engine(path: Path, checkpoint: Checkpoint) -> dict[str, Any]:
    """The errors of the engine and of plain torch after a few steps.

    Raises ParityError if the engine errs more than WORST_RATIO times what plain torch errs.
    """
    engine = Engine.load(path)
    model, side = engine.model, engine.model.default_size
    rng = np.random.default_rng(0)
    pixels = rng.standard_normal((2, 3, model.image_size, model.image_size)).astype(np.float32)
    drawings = rng.random((2, 3, side, side)).astype(np.float32).round()
    boxes = [(0.1 * side, 0.2 * side, 0.5 * side, 0.6 * side), (0.5 * side, 0.3 * side, 0.9 * side, 0.7 * side)]
    noise = initial_noise(0, (1, model.latent_channels, model.sample_size, model.sample_size))
    settings: dict[str, Any] = {"num_inference_steps": STEPS, "subject_conditioning_ratio": RATIO}

    put, get = engine.backend.put, engine.backend.get
    tokens = get(engine.backend.run("id_encoder", {"id_pixels": put(pixels, for_networks=True)})["id_tokens"])
    persons = [Person(id_tokens=t, box=box, pose_image=d) for t, box, d in zip(tokens, boxes, drawings, strict=True)]
    ours = engine.generate(PROMPT, persons, latents=noise, output="latents", **settings).latents
    people = [
        ReferencePerson(pose_image=torch.from_numpy(drawing), box=box, id_pixels=torch.from_numpy(image))
        for image, drawing, box in zip(pixels, drawings, boxes, strict=True)
    ]
    rms, rms_torch = latent_errors(ours, checkpoint, people, noise, PROMPT, **settings)
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
