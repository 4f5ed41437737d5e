"""The contenders of a measurement, engines and baselines: each makes one picture and times its stages."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from realisid_trt import Engine
from realisid_trt.branches import Branch
from realisid_trt.errors import RealisIDError, RequestError
from realisid_trt.manifest import Manifest
from realisid_trt.persons.conditions import id_pixels, pose_image
from realisid_trt.persons.faces import FaceFinder
from realisid_trt.persons.faces.face_encoder import FaceEncoder
from realisid_trt.persons.photo import load_photo

from .measure import Run, differences, spread, timed
from .options import BASELINES, COMPILED, Options
from .scene import Scene

if TYPE_CHECKING:
    from export.checkpoint import Checkpoint

    from .baseline import Baseline

Progress = Callable[[int, int], object]


def loop_parts(table: Sequence[Branch]) -> tuple[str, ...]:
    """The networks of a step: the engine's, and the baselines'."""
    branches, nets = (f"{branch.name}_branch" for branch in table), (f"controlnet_{branch.name}" for branch in table)
    return (*branches, "unet_encoder", "unet_decoder", *nets, "unet")


@dataclass(frozen=True, eq=False)
class Contender:
    """An engine or a baseline.

    generate: of either. counter: the object whose `usage` counts its rows. parts: the networks of a step.
    by_step:  whether the counter starts anew with every step; else it counts on over a picture.
    """

    generate: Callable[..., Any]
    counter: Any
    parts: Sequence[str]
    by_step: bool = False

    def run(self, prompt: str, progress: Progress, **arguments: Any) -> Run:
        """One picture, timed. arguments: of `generate`, such as engines and baselines both accept."""
        snapshots: list[dict[str, int]] = []

        def note(done: int, total: int) -> None:
            snapshots.append(dict(self.counter.usage.rows))
            progress(done, total)

        result, total_ms, cores = timed(lambda: self.generate(prompt, progress=note, **arguments))
        if self.by_step:
            steps = [{name: rows for name, rows in step.items() if name in self.parts} for step in snapshots]
        else:
            steps = differences(snapshots, self.parts)
        return Run(total_ms, result.timings, result.step_ms, result.rows, steps, result.latents, cores)


def of_engine(engine: Engine, scene: Scene) -> Contender:
    options = {"height": scene.height, "width": scene.width, "sampler": scene.sampler, "output": "np"}
    generate = partial(engine.generate, **options)
    return Contender(generate, engine.backend, loop_parts(engine.config.table), by_step=True)


def backends_of(options: Options, manifest: Manifest) -> dict[str, str]:
    """Contender → backend: {"engine": …} if one backend was requested, else {"engine:NAME": …} for each."""
    if len(options.backend) == 1 and options.backend != ("all",):
        return {"engine": options.backend[0]}
    built = dict.fromkeys(build.backend for build in manifest.builds.values())
    return {f"engine:{name}": name for name in (built if options.backend == ("all",) else options.backend)}


def open_engines(options: Options, manifest: Manifest, device: str) -> tuple[dict[str, Engine], dict[str, str]]:
    """The engines by contender; and, with --backend all, the reason why each other backend is left out.

    Beside a baseline all engines compute in one precision: in half, if any does. Raises the error of an engine that was
    requested by name, and RequestError if none is left.
    """
    engines: dict[str, Engine] = {}
    left_out: dict[str, str] = {}
    every = options.backend == ("all",)
    for name, backend in backends_of(options, manifest).items():
        try:
            engines[name] = open_engine(options, backend, device)
        except (RealisIDError, ImportError, OSError) as error:  # a package may lack its libraries
            if not every:
                raise
            left_out[backend] = str(error)
    if not engines:
        reasons = " ".join(f"{backend}: {reason}" for backend, reason in left_out.items())
        raise RequestError(f"--backend all: none of the engine's backends can be opened on {device}. {reasons}")
    if options.baselines:
        precisions = {name: engine.backend.precision for name, engine in engines.items()}
        half = next((found for found in precisions.values() if found != "float32"), "float32")
        for name, precision in precisions.items():
            if precision == half:
                continue
            reason = f"it computes in {precision} and another in {half}, but baselines compute in one precision"
            if not every:
                raise RequestError(f"{name}: {reason}. Measure it by itself, or give --baseline none.")
            left_out[engines.pop(name).backend.name] = reason
    return engines, left_out


def open_engine(options: Options, backend: str, device: str) -> Engine:
    return Engine.load(options.engine, backend=backend, device=device, cuda_graph=options.cuda_graph or None)


def open_baselines(
    options: Options,
    names: Sequence[str],
    checkpoint: Checkpoint,
    scene: Scene,
    device: str,
    precision: str,
    threads: int,
    stack: contextlib.ExitStack,
) -> tuple[dict[str, Contender], Baseline]:
    """The baselines, on one set of weights and in the engine's precision; and the pipeline that they are.

    For an engine without identities they are diffusers' own pipeline, for one whose UNet reads the text and the IDs
    ID-Patch's, else the one in naive.py.

    stack: contexts that must stay open while they run. Raises RequestError if torch cannot use the device.
    """
    import torch

    from .compiled import compiled, every_shape
    from .torch_device import beside, settings

    where = beside(device)
    stack.enter_context(settings(threads, precision))
    pipeline = baseline_of(checkpoint)(checkpoint, device=where, dtype=getattr(torch, precision))
    if options.memory_format == "auto":
        pipeline.use_faster_format(**scene.given(1, 2))
    else:
        pipeline.use_format(options.memory_format)
    if set(names) & set(COMPILED):
        stack.enter_context(every_shape())
    contenders, parts = {}, loop_parts(checkpoint.config.table)
    for name in names:
        own = compiled(pipeline, options.compiler) if name in COMPILED else pipeline
        contenders[name] = Contender(partial(own.generate, **BASELINES[name]), own, parts)
    return contenders, pipeline


def baseline_of(checkpoint: Checkpoint) -> type[Baseline]:
    """The pipeline that an engine of this checkpoint is compared with."""
    from .diffusers_pipeline import DiffusersPipeline, can_run
    from .id_patch_pipeline import IdPatchPipeline
    from .naive import NaivePipeline

    if checkpoint.config.unet_tokens == "text_and_id":
        return IdPatchPipeline
    return DiffusersPipeline if can_run(checkpoint.config, checkpoint.has_added_conditions) else NaivePipeline


def measured_as_warm(names: Mapping[str, Any]) -> contextlib.AbstractContextManager[None]:
    """A context for measured rounds of these contenders, in which nothing is compiled."""
    if not set(names) & set(COMPILED):
        return contextlib.nullcontext()
    from .compiled import nothing_new

    return nothing_new()


def photo_stages(engine: Engine, photo: Path, runs: int) -> dict[str, dict[str, float]]:
    """Milliseconds of the stages that run once per new photo; the first run is not counted. Raises PhotoError."""
    finder = FaceFinder.load(engine.manifest.path / "faces", files=engine.manifest.files_in("faces"))
    encoder = FaceEncoder.of(engine.manifest)
    taken: dict[str, list[float]] = {}

    def stage(name: str, make: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        made = make()
        taken.setdefault(name, []).append((time.perf_counter() - start) * 1e3)
        return made

    def encode(name: str, values: Any) -> list[Any]:
        fed = {name: engine.backend.put(values, for_networks=True)}
        return [engine.backend.get(output) for output in engine.backend.run("id_encoder", fed).values()]

    model, config = engine.model, engine.config
    for _ in range(runs + 1):
        loaded = stage("decode", partial(load_photo, photo))
        face = stage("detect+landmarks", partial(finder.find, loaded))
        if encoder is not None:
            aligned = stage("align", partial(encoder.alignment, loaded, face))
            embedding = stage("face_encoder", partial(encoder.embed, aligned))
            stage("id_encoder", partial(encode, "embedding", embedding[None, None]))
            continue
        crop, _ = stage("crop", partial(finder.crop, loaded, face, model.image_size, config.face_margin))

        def tokens(crop: Any = crop) -> list[Any]:
            return encode("id_pixels", id_pixels(crop, model.image_mean, model.image_std)[None])

        stage("id_encoder", tokens)
        stage("pose_image", partial(pose_image, face.landmarks, model.default_size, config.pose_style))
    return {name: spread(times[1:]) for name, times in taken.items()}
