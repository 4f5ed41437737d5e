"""One picture on both sides of a comparison: its inputs, and what the networks read while it is made."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from realisid_trt import Control, Engine, Person
from realisid_trt.branches import Branch


@dataclass(frozen=True, eq=False)
class Picture:
    """One picture, as both sides make it.

    embeddings: (N, 512) float32. noses: (N, 2) float64 x, y px; multiples of 8, which bfloat16 holds.
    drawing:    (H, W, 3) uint8 RGB. latents: (1, C, h, w) float32.
    scale:      of the residuals. ratio: the first (1 - ratio)·S steps have no ID tokens.
    """

    prompt: str
    negative_prompt: str
    embeddings: NDArray[np.float32]
    noses: NDArray[np.float64]
    drawing: NDArray[np.uint8]
    latents: NDArray[np.float32]
    steps: int
    guidance_scale: float
    scale: float
    ratio: float
    patch_px: int


@dataclass(eq=False)
class Reading:
    """What the networks of one side read in a picture, and what came out.

    arrays:    name → float32 array: tokens (2, ·, D), by their number; pooled text (2, P); condition (3, H, W); final
               latents (1, C, h, w). The first of two rows is that of the negative prompt.
    timesteps: of every step.
    tokens:    of the UNet, their number in every step.
    """

    arrays: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    timesteps: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)

    def keep(self, name: str, array: Any) -> None:
        """Keeps the first array of this name."""
        if name not in self.arrays:
            self.arrays[name] = np.array(array, np.float32)


def tokens_name(reader: str, number: int) -> str:
    """The name of the tokens that "UNet" or "ControlNet" reads."""
    return f"{number} tokens of the {reader}"


def pooled_name(reader: str) -> str:
    """The name of the pooled text that "UNet" or "ControlNet" reads."""
    return f"pooled text of the {reader}"


CONDITION, LATENTS = "condition", "final latents"


def run_engine(engine: Engine, picture: Picture, branch: Branch, fed: Mapping[str, Any] | None = None) -> Reading:
    """The engine's picture. fed: arrays of a Reading that its networks read in the place of their own."""
    persons = [
        Person(embedding=embedding, at=(float(x), float(y)))
        for embedding, (x, y) in zip(picture.embeddings, picture.noses, strict=True)
    ]
    drawing = picture.drawing.transpose(2, 0, 1).astype(np.float32) / np.float32(255)
    reading = Reading()
    with _read(engine.backend, branch, reading, fed or {}):
        result = engine.generate(
            picture.prompt,
            persons,
            negative_prompt=picture.negative_prompt,
            latents=picture.latents,
            guidance_scale=picture.guidance_scale,
            subject_conditioning_ratio=picture.ratio,
            controls={branch.name: Control(drawing, scale=picture.scale)},
            num_inference_steps=picture.steps,
            height=drawing.shape[1],
            width=drawing.shape[2],
            output="latents",
        )
    reading.keep(LATENTS, result.latents)
    return reading


@contextlib.contextmanager
def _read(backend: Any, branch: Branch, reading: Reading, fed: Mapping[str, Any]) -> Iterator[None]:
    """A context in which the inputs of the engine's networks are kept, after those in `fed` took their places."""
    networks = {"unet": "UNet", branch.name: "ControlNet"}
    run_network = backend.run

    def run(name: str, inputs: Mapping[str, Any]) -> Any:
        stem, _, part = name.rpartition("_")
        inputs, reader = dict(inputs), networks.get(stem)
        if reader is not None and part in ("encoder", "decoder", "branch"):
            number = inputs["tokens"].shape[1]
            shown(inputs, "tokens", tokens_name(reader, number), 1)
            if part == "encoder":
                reading.tokens.append(number)
        elif reader is not None and part == "time":
            timesteps = backend.get(inputs["timestep"])[::2]  # of two rows
            shown(inputs, "pooled", pooled_name(reader), len(timesteps))
            if stem == "unet":
                reading.timesteps += [float(value) for value in timesteps]
        elif reader is not None and part == "condition":
            shown(inputs, branch.condition_input, CONDITION, 0)
        return run_network(name, inputs)

    def shown(inputs: dict[str, Any], port: str, name: str, repeats: int) -> None:
        """repeats: how often the two rows stand in this input; 0: it has one row, that of the picture."""
        if name in fed:
            array = fed[name] if repeats else fed[name][None]
            array = np.tile(array, (max(repeats, 1),) + (1,) * (array.ndim - 1))
            inputs[port] = backend.put(np.ascontiguousarray(array), for_networks=True)
        array = np.asarray(backend.get(inputs[port]), np.float32)
        reading.keep(name, array[:2] if repeats else array[0])

    backend.run = run
    try:
        yield
    finally:
        del backend.run  # the method of its class again
