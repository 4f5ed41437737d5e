"""The pipelines that are measured against each other, each as "make one picture and say how long what took"."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from realisid_trt import Engine, Person
from realisid_trt.conditions import id_pixels
from realisid_trt.errors import CheckpointError
from realisid_trt.faces import FaceFinder
from realisid_trt.manifest import Manifest
from realisid_trt.photo import load_photo

from .measure import Run, differences, relative_rms, spread, timed

if TYPE_CHECKING:
    from export.checkpoint import Checkpoint

    from .naive import NaivePipeline

Progress = Callable[[int, int], object]
ENGINE_LOOP = ("local_branch", "global_branch", "unet_encoder", "unet_decoder")
NAIVE_LOOP = ("controlnet_local", "controlnet_global", "unet")
EPSILON = {"float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}
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


def contenders(
    names: Sequence[str],
    engine: Engine,
    pipeline: NaivePipeline | None,
    prompt: str,
    arguments: Mapping[str, Any],
    progress: Progress,
) -> dict[str, Callable[[int], Run]]:
    """Name → callable of a round's number that makes one picture. arguments: what `generate` of both understands.

    Every round has a prompt of its own: the engine remembers prompts, and a baseline does not.
    """
    found: dict[str, Callable[[int], Run]] = {}
    for name in names:
        if name == "engine":
            found[name] = partial(run_engine, engine, prompt, arguments, progress)
        else:
            assert pipeline is not None
            found[name] = partial(run_naive, pipeline, prompt, {**arguments, "delay": name == "naive"}, progress)
    return found


def run_engine(engine: Engine, prompt: str, arguments: Mapping[str, Any], progress: Progress, take: int) -> Run:
    """One picture by the engine; the rows are those that its backend counted. arguments: of `Engine.generate`."""
    snapshots: list[dict[str, int]] = []

    def note(done: int, total: int) -> None:
        snapshots.append(dict(engine.backend.usage.rows))
        progress(done, total)

    height, width = (cells * engine.model.vae_scale_factor for cells in arguments["latents"].shape[-2:])
    options = {"height": height, "width": width, "output": "np", "progress": note, **arguments}
    result, total_ms, elsewhere = timed(lambda: engine.generate(f"{prompt}, {take}", **options))
    steps = differences(snapshots, ENGINE_LOOP)
    return Run(total_ms, result.timings, result.step_ms, result.rows, steps, result.latents, elsewhere)


def run_naive(pipeline: NaivePipeline, prompt: str, arguments: Mapping[str, Any], progress: Progress, take: int) -> Run:
    """One picture by the baseline; the rows are counted where its modules are called."""
    snapshots: list[dict[str, int]] = []

    def note(done: int, total: int) -> None:
        snapshots.append(dict(pipeline.usage.rows))
        progress(done, total)

    options = {"progress": note, **arguments}
    result, total_ms, elsewhere = timed(lambda: pipeline.generate(f"{prompt}, {take}", **options))
    steps = differences(snapshots, NAIVE_LOOP)
    return Run(total_ms, result.timings, result.step_ms, result.rows, steps, result.latents, elsewhere)


def open_original(manifest: Manifest, path: Path | None) -> Checkpoint:
    """The checkpoint that an engine was built from; path: where it lies now. Raises CheckpointError."""
    from export.checkpoint import Checkpoint  # torch, which an engine by itself does without
    from export.origins import recall

    origin = recall(manifest.values)
    if path is None and "path" not in origin:
        raise CheckpointError(
            f"Where the checkpoint of {manifest.path} lies is not known on this machine, and a baseline needs its "
            "weights. Give --checkpoint CKPT, or --baseline none."
        )
    origin |= {"path": str(path)} if path is not None else {}
    checkpoint = Checkpoint.open(**origin)  # type: ignore[arg-type]
    check_same_weights(manifest, checkpoint)
    return checkpoint


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


def check_same_picture(engine: Run, baseline: Run, precision: str) -> float:
    """The relative RMS difference of the final latents.

    Raises CheckpointError if fewer than half of the digits of `precision` agree: then it is not the same work.
    """
    difference = relative_rms(engine.latents, baseline.latents)
    bound = EPSILON[precision] ** 0.5
    if not difference <= bound:
        raise CheckpointError(
            f"engine and baseline make different pictures: their final latents differ by {difference:.1e} (relative "
            f"RMS), where {precision} arithmetic leaves less than {bound:.1e}. The engine was built from other "
            "weights: give the checkpoint that it was built from, or build it again."
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
        taken.append(np.diff(times) * 1e3)
    stages = ("decode", "detect+landmarks", "crop", "id_encoder")
    return {stage: spread([float(ms[index]) for ms in taken[1:]]) for index, stage in enumerate(stages)}
