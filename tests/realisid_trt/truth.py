"""The same picture from the engine and from the reference: persons, settings, errors."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from export.checkpoint import Checkpoint
from export.truth.half_reference import half_reference
from export.truth.reference import Reference, ReferencePerson
from export.truth.verify import rms_of
from realisid_trt import Engine, Person, Sampler
from realisid_trt.loop.noise import initial_noise

PROMPT, NEGATIVE = "a photo of friends at the beach", "blurry, dark"

# x0, y0 as fractions of width and height, the side as a fraction of the longer edge; 1/7 is the paper's hardest face.
PLACES: dict[str, list[tuple[float, float, float]]] = {
    "nobody": [],
    "one": [(0.1, 0.15, 0.5)],
    "small": [(0.5, 0.4, 1 / 7)],
    "apart": [(0.02, 0.1, 0.38), (0.55, 0.3, 0.4)],
    "overlapping": [(0.1, 0.1, 0.5), (0.35, 0.3, 0.45)],
    "crowd": [(0.05, 0.05, 0.45), (0.3, 0.3, 0.5), (0.6, 0.1, 1 / 7)],
}


def latent_errors(
    ours: np.ndarray,
    checkpoint: Checkpoint,
    persons: Sequence[ReferencePerson],
    noise: np.ndarray,
    prompt: str,
    precision: torch.dtype = torch.float32,
    **settings: Any,
) -> tuple[float, float]:
    """RMS error of final latents, and of the plain reference's, against the float64 reference's; relative to its RMS.

    precision: of the plain reference's networks. settings: of `Reference.generate`.
    """

    def latents(reference: Reference) -> np.ndarray:
        return reference.generate(prompt, persons, torch.from_numpy(noise), **settings).double().numpy()

    truth = latents(Reference(checkpoint, torch.float64))
    if precision == torch.float32:
        plain = latents(Reference(checkpoint, torch.float32))
    else:
        with half_reference(checkpoint, precision) as reference:
            plain = latents(reference)
    return rms_of(ours - truth) / rms_of(truth), rms_of(plain - truth) / rms_of(truth)


def checkpoint_with(path: Path, scheduler: dict[str, Any] | None = None, **config: Any) -> Checkpoint:
    """The checkpoint under another configuration: the reference's counterpart of the fixture `with_config`."""
    checkpoint = Checkpoint.open(path)
    if config.get("sampler") is not None:
        config["sampler"] = Sampler.of(config["sampler"])
    return dataclasses.replace(
        checkpoint,
        config=dataclasses.replace(checkpoint.config, **config),
        scheduler_config={**checkpoint.scheduler_config, **(scheduler or {})},
    )


@dataclasses.dataclass(frozen=True, eq=False)
class Scene:
    """Persons made of random pixels and drawings, and the noise to start from."""

    boxes: list[tuple[float, float, float, float]]
    id_pixels: np.ndarray
    pose_images: np.ndarray
    latents: np.ndarray

    @classmethod
    def make(cls, engine: Engine, place: str, height: int, width: int, seed: int = 0) -> Scene:
        model, count = engine.model, len(PLACES[place])
        rng = np.random.default_rng(seed)
        edge, side = max(height, width), model.default_size
        shape = (1, model.latent_channels, height // model.vae_scale_factor, width // model.vae_scale_factor)
        return cls(
            [(width * x, height * y, width * x + edge * s, height * y + edge * s) for x, y, s in PLACES[place]],
            rng.standard_normal((count, 3, model.image_size, model.image_size), dtype=np.float32),
            (rng.random((count, 3, side, side)) > 0.8).astype(np.float32),
            initial_noise(seed, shape),
        )

    def persons(self, engine: Engine) -> list[Person]:
        if not self.boxes:
            return []
        put, get = engine.backend.put, engine.backend.get
        tokens = get(engine.backend.run("id_encoder", {"id_pixels": put(self.id_pixels)})["id_tokens"])
        return [
            Person(id_tokens=t, box=box, pose_image=drawing)
            for t, box, drawing in zip(tokens, self.boxes, self.pose_images, strict=True)
        ]

    def reference_persons(self) -> list[ReferencePerson]:
        return [
            ReferencePerson(pose_image=torch.from_numpy(drawing), box=box, id_pixels=torch.from_numpy(pixels))
            for pixels, box, drawing in zip(self.id_pixels, self.boxes, self.pose_images, strict=True)
        ]


def errors(
    engine: Engine, checkpoint: Checkpoint, scene: Scene, precision: torch.dtype = torch.float32, **settings: Any
) -> tuple[float, float]:
    """RMS error of the engine's and of the plain reference's final latents against float64, relative to their RMS."""
    f = engine.model.vae_scale_factor
    height, width = (f * cells for cells in scene.latents.shape[2:])
    ours = engine.generate(
        PROMPT,
        scene.persons(engine),
        negative_prompt=NEGATIVE,
        latents=scene.latents,
        output="latents",
        height=height,
        width=width,
        **settings,
    ).latents
    persons = scene.reference_persons()
    settings = {"negative_prompt": NEGATIVE, **settings}
    return latent_errors(ours, checkpoint, persons, scene.latents, PROMPT, precision, **settings)


def people(engine: Engine, count: int, seed: int = 0) -> list[Person]:
    """`count` persons of random ID and pose on a row of boxes."""
    rng, model, side = np.random.default_rng(seed), engine.model, engine.model.default_size
    return [
        Person(
            id_tokens=rng.standard_normal((model.num_id_tokens, model.cross_attention_dim)),
            box=(side * i / 10, side * i / 12, side * (i / 10 + 0.4), side * (i / 12 + 0.4)),
            pose_image=(rng.random((3, side, side)) > 0.8).astype(np.float32),
        )
        for i in range(count)
    ]
