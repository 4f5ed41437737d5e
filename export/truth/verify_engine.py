"""The whole engine, run by the runtime, against the reference: a picture of two persons."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from realisid_trt import Control, Engine, Person
from realisid_trt.backends import tensorrt
from realisid_trt.backends.onnxruntime import can_use_gpu
from realisid_trt.backends.tensorrt_flavours import FLAVOURS
from realisid_trt.errors import ParityError
from realisid_trt.loop.ddim import DDIM, initial_noise
from realisid_trt.manifest import Build, Manifest

from ..checkpoint import Checkpoint
from .half_reference import half_reference
from .proof import layers_by_type
from .reference import Reference, ReferenceControl, ReferencePerson
from .verify import rms_of
from .verify_plans import verify_plans

STEPS, RATIO = 4, 0.5  # steps without and with the ID
PROMPT = "a photo of two people"
BOXES = (0.1, 0.2, 0.5, 0.6), (0.5, 0.3, 0.9, 0.7)  # in shares of the picture
WORST_RATIO = 4.0  # times the error of the reference in the same precision
PRECISIONS = {"float16": torch.float16, "bfloat16": torch.bfloat16}

Report = Callable[[str], None]


def verify_engine(
    path: Path,
    checkpoint: Checkpoint,
    report: Report = lambda line: None,
    whole: bool = True,
    bisect: bool = False,
) -> dict[str, dict[str, Any]]:
    """The errors of every build that can run here, and of plain torch in its precision, by build.

    report: called with a line for each build that cannot run here, with the reason.
    whole:  False compares plans one by one, and not the engine as a whole: for checkpoints that are too large for the
            reference.
    bisect: the error of a plan names the first node that differs.

    Raises ParityError if a build's error is more than WORST_RATIO times that of plain torch.
    """
    manifest = Manifest.read(path)
    scene = Scene.of(manifest)
    references: dict[str, Outcomes] = {}
    found: dict[str, dict[str, Any]] = {}
    for build in manifest.builds.values():
        if problem := cannot_run(manifest, build):
            report(f"{build.id} was not compared with the reference: {problem}")
            continue
        has_plans = build.backend in FLAVOURS
        if not whole and not has_plans:
            continue
        figures = found[build.id] = {"backend": build.backend}
        with Engine.load(path, backend=build.backend, device=build.device) as engine:
            if has_plans:
                parities = verify_plans(path, checkpoint, build.id, engine.backend, bisect)
                figures["networks"] = {name: asdict(parity) for name, parity in parities.items()}
                read_back = engine.backend.runner.inspected  # type: ignore[attr-defined]
                figures["scratch_bytes"] = engine.backend.runner.scratch_bytes()  # type: ignore[attr-defined]
                figures["layers"] = {name: layers_by_type(read_back(name)) for name in parities}
            ours = scene.by_engine(engine) if whole else None
        if ours is None:
            continue
        for precision in {"float64", build.precision} - set(references):
            references[precision] = scene.by_reference(checkpoint, precision)
        figures |= _judge(build, manifest, scene, ours, references[build.precision], references["float64"])
    return found


def cannot_run(manifest: Manifest, build: Build) -> str | None:
    """Why a build cannot be run on this machine, or None."""
    if build.device == "cpu":
        return None
    if build.backend == "onnxruntime":
        return None if can_use_gpu() else "ONNX Runtime can use no GPU here"
    return tensorrt.cannot_run(build.backend, manifest, build.device)


@dataclass(frozen=True, eq=False)
class Outcomes:
    """Latents (1, C, h, w) float64 after a single step, with all its rows, and after STEPS."""

    single: np.ndarray
    final: np.ndarray


@dataclass(frozen=True, eq=False)
class Scene:
    """Two persons of random pixels and drawings where a branch has rows of persons, a random picture for every branch
    that takes one, and the noise to start from."""

    id_pixels: np.ndarray
    drawings: np.ndarray
    boxes: tuple[tuple[float, float, float, float], ...]
    pictures: Mapping[str, np.ndarray]
    noise: np.ndarray

    @classmethod
    def of(cls, manifest: Manifest) -> Scene:
        model, rng = manifest.model, np.random.default_rng(0)
        side, image = model.default_size, model.image_size
        count = 2 if any(branch.per == "person" for branch in manifest.config.table) else 0
        return cls(
            rng.standard_normal((count, 3, image, image)).astype(np.float32),
            rng.random((count, 3, side, side)).astype(np.float32).round(),
            tuple(tuple(side * share for share in box) for box in BOXES[:count]),  # type: ignore[misc]
            {
                branch.name: rng.random((branch.channels, side, side)).astype(np.float32)
                for branch in manifest.config.table
                if branch.per == "picture"
            },
            initial_noise(0, (1, model.latent_channels, model.sample_size, model.sample_size)),
        )

    @cached_property
    def settings(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """The settings of the single step, and of STEPS steps."""
        return (
            {"num_inference_steps": 1, "subject_conditioning_ratio": None},
            {"num_inference_steps": STEPS, "subject_conditioning_ratio": RATIO},
        )

    def by_engine(self, engine: Engine) -> Outcomes:
        backend, persons = engine.backend, []
        for pixels, box, drawing in zip(self.id_pixels, self.boxes, self.drawings, strict=True):
            given: dict[str, Any] = {"box": box, "pose_image": drawing}
            if engine.config.id_input != "none":
                fed = {"id_pixels": backend.put(pixels[None], for_networks=True)}  # plans take one person at a time
                [given["id_tokens"]] = backend.get(backend.run("id_encoder", fed)["id_tokens"])
            persons.append(Person(**given))
        controls = {name: Control(picture) for name, picture in self.pictures.items()}
        given = {"latents": self.noise, "output": "latents", "controls": controls}
        return Outcomes(*(engine.generate(PROMPT, persons, **given, **each).latents for each in self.settings))

    def by_reference(self, checkpoint: Checkpoint, precision: str) -> Outcomes:
        persons = [
            ReferencePerson(pose_image=torch.from_numpy(drawing), box=box, id_pixels=torch.from_numpy(pixels))
            for pixels, drawing, box in zip(self.id_pixels, self.drawings, self.boxes, strict=True)
        ]
        controls = {name: ReferenceControl(torch.from_numpy(picture)) for name, picture in self.pictures.items()}
        opened: AbstractContextManager[Reference]
        if precision in PRECISIONS:
            opened = half_reference(checkpoint, PRECISIONS[precision])
        else:
            opened = nullcontext(Reference(checkpoint, getattr(torch, precision)))
        with opened as reference:
            noise = torch.from_numpy(self.noise)
            return Outcomes(
                *(
                    reference.generate(PROMPT, persons, noise, controls=controls, **each).double().numpy()
                    for each in self.settings
                )
            )


def _judge(
    build: Build, manifest: Manifest, scene: Scene, ours: Outcomes, plain: Outcomes, truth: Outcomes
) -> dict[str, Any]:
    """The figures for the manifest. Raises ParityError."""

    def errors(mine: np.ndarray, theirs: np.ndarray, true: np.ndarray, what: str) -> Mapping[str, float]:
        rms, rms_torch = (rms_of(latents - true) / rms_of(true) for latents in (mine, theirs))
        if not rms <= WORST_RATIO * rms_torch:
            raise ParityError(
                f"the whole engine, run by {build.id}, has an error of {rms:.2e} in {what}; the reference in "
                f"{build.precision} has {rms_torch:.2e}, and at most {WORST_RATIO:g} times that is accepted. Every "
                "network passed by itself, so report this as a bug of the runtime, with these figures."
            )
        return {"rms": rms, "rms_torch": rms_torch, "ratio": rms / rms_torch}

    [(scale, shift)] = DDIM.of(manifest).coefficients(1)  # z' = A·z + B·noise_pred, Eq. (8)'s combination of all rows
    single = [(each.single - scale * scene.noise) / shift for each in (ours, plain, truth)]
    noise_pred = errors(*single, "the guided noise_pred of one step")
    return {
        "steps": STEPS,
        **errors(ours.final, plain.final, truth.final, f"the final latents after {STEPS} steps"),
        **{f"{name}_noise_pred": value for name, value in noise_pred.items()},
    }
