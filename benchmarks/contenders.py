"""The pipelines that are measured against each other, each as "make one picture and say how long what took"."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from realisid_trt import Engine, Person
from realisid_trt.conditions import id_pixels, pose_image
from realisid_trt.errors import CheckpointError, RequestError
from realisid_trt.faces import FaceFinder
from realisid_trt.manifest import Manifest
from realisid_trt.photo import load_photo

from .measure import Run, differences, relative_rms, spread, timed

if TYPE_CHECKING:
    from export.checkpoint import Checkpoint

Progress = Callable[[int, int], object]
# The networks of a step: the engine's, and the baselines'.
LOOP = (
    "local_branch", "global_branch", "unet_encoder", "unet_decoder",
    "controlnet_local", "controlnet_global", "unet",
)  # fmt: skip
SAME = 2.0**-11.5  # relative RMS: half of float32's digits
FACE = 0.3  # side of a face box over the shorter side of the picture


def make_persons(engine: Engine, count: int, height: int, width: int, seed: int) -> list[Person]:
    """Persons in a row, each with the ID tokens and the drawing that a photo would give, at random."""
    model, rng = engine.model, np.random.default_rng(seed)
    least = model.vae_scale_factor * 2 ** (model.levels - 1)
    side = max(least, min(FACE * min(height, width), 0.9 * width / max(count, 1)))
    persons = []
    for index in range(count):
        x, y = (index + 0.5) / count * width, 0.4 * height
        persons.append(
            Person(
                id_tokens=rng.standard_normal((model.num_id_tokens, model.cross_attention_dim)).astype(np.float32),
                pose_image=rng.random((3, model.default_size, model.default_size)).astype(np.float32).round(),
                box=(x - side / 2, y - side / 2, x + side / 2, y + side / 2),
            )
        )
    return persons


@dataclass(frozen=True, eq=False)
class Contender:
    """The engine or a baseline. generate: of either; counter: the object whose `usage` counts its rows."""

    generate: Callable[..., Any]
    counter: Any

    def run(self, prompt: str, progress: Progress, **arguments: Any) -> Run:
        """One picture, timed. arguments: those that `generate` of both understands."""
        snapshots: list[dict[str, int]] = []

        def note(done: int, total: int) -> None:
            snapshots.append(dict(self.counter.usage.rows))
            progress(done, total)

        result, total_ms, cores = timed(lambda: self.generate(prompt, progress=note, **arguments))
        steps = differences(snapshots, LOOP)
        return Run(total_ms, result.timings, result.step_ms, result.rows, steps, result.latents, cores)


def open_original(
    manifest: Manifest, path: Path | None, base_model: str | None = None, variant: str | None = None
) -> Checkpoint:
    """The checkpoint that an engine was built from; what is None is as it was then. Raises CheckpointError."""
    from export.checkpoint import Checkpoint  # torch, which an engine by itself does without
    from export.origins import recall

    given = {"path": path, "base_model": base_model, "variant": variant}
    origin: dict[str, Any] = recall(manifest.values) | {key: value for key, value in given.items() if value is not None}
    if "path" not in origin:
        raise CheckpointError(
            f"Where the checkpoint of {manifest.path} lies is not known on this machine, and a baseline needs its "
            "weights. Give --checkpoint CKPT, or --baseline none."
        )
    checkpoint = Checkpoint.open(**origin)
    check_same_weights(manifest, checkpoint)
    return checkpoint


def check_same_arithmetic(device: str, precision: str) -> None:
    """Raises RequestError unless an engine there computes as the baselines do: in float32 on the CPU."""
    if not device.startswith("cpu") or precision != "float32":
        raise RequestError(
            f"the baselines compute float32 on the CPU, this engine {precision} on {device}: no ratio between the two "
            "means anything. Measure the engine alone with --baseline none, or give --device cpu."
        )


def check_same_weights(manifest: Manifest, checkpoint: Checkpoint) -> None:
    """Raises CheckpointError unless the engine was built from these very weights and this configuration."""
    listed = manifest.values
    different = [
        key for key, value in checkpoint.config.to_dict().items() if listed["realisid_config"].get(key, value) != value
    ]
    different += [name for name, key in listed["checkpoint"].items() if checkpoint.weights_key(name) != key]
    if different:
        raise CheckpointError(
            f"{manifest.path} was not built from {checkpoint.path}: {', '.join(different)} differ. A speed ratio "
            "between two models says nothing. Give the checkpoint that the engine was built from, or build it again."
        )


def check_same_picture(engine: Run, baseline: Run) -> float:
    """The relative RMS difference of the final latents.

    Raises CheckpointError if fewer than half of float32's digits agree: then it is not the same work.
    """
    difference = relative_rms(engine.latents, baseline.latents)
    if not difference <= SAME:
        raise CheckpointError(
            f"engine and baseline make different pictures: their final latents differ by {difference:.1e} (relative "
            f"RMS), where float32 arithmetic leaves less than {SAME:.1e}. The engine was built from other weights: "
            "give the checkpoint that it was built from, or build it again."
        )
    return difference


def photo_stages(engine: Engine, photo: Path, runs: int) -> dict[str, dict[str, float]]:
    """What happens once per new photo, stage by stage; the first run of each is not counted. Raises PhotoError."""
    finder = FaceFinder.load(engine.manifest.path / "faces", files=engine.manifest.files_in("faces"))
    model, backend, taken = engine.model, engine.backend, []
    for _ in range(runs + 1):
        times = [time.perf_counter()]
        loaded = load_photo(photo)
        times.append(time.perf_counter())
        face = finder.find(loaded)
        times.append(time.perf_counter())
        crop, _ = finder.crop(loaded, face, model.image_size, engine.config.face_margin)
        times.append(time.perf_counter())
        pixels = id_pixels(crop, model.image_mean, model.image_std)
        backend.get(backend.run("id_encoder", {"id_pixels": backend.put(pixels[None], for_networks=True)})["id_tokens"])
        times.append(time.perf_counter())
        pose_image(face.landmarks, model.default_size, engine.config.pose_style)
        times.append(time.perf_counter())
        taken.append(np.diff(times) * 1e3)
    stages = ("decode", "detect+landmarks", "crop", "id_encoder", "pose_image")
    return {stage: spread([float(ms[index]) for ms in taken[1:]]) for index, stage in enumerate(stages)}
