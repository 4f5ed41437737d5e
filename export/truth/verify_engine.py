"""The whole engine, run by the runtime, against the reference: a picture of all that its branches are shown."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from realisid_trt import Control, Engine, Person
from realisid_trt.backends import tensorrt
from realisid_trt.backends.onnxruntime import can_use_gpu
from realisid_trt.backends.tensorrt_flavours import FLAVOURS
from realisid_trt.config import RealisIDConfig
from realisid_trt.errors import ParityError
from realisid_trt.loop.noise import initial_noise
from realisid_trt.loop.rows import steps_without_id
from realisid_trt.loop.samplers import NoiseSchedule, table_of
from realisid_trt.manifest import Build, Manifest
from realisid_trt.persons.bodies import NUM_JOINTS
from realisid_trt.persons.mesh import NUM_LANDMARKS

from ..checkpoint import Checkpoint
from .half_reference import half_reference
from .proof import layers_by_type
from .reference import Reference, ReferenceControl, ReferencePerson
from .verify import rms_of
from .verify_plans import verify_plans

STEPS, RATIO = 4, 0.5  # steps without and with the ID
SEED = 0  # of the noise, also of what a sampler's steps add
PROMPT = "a photo of two people"
BOXES = (0.1, 0.2, 0.5, 0.6), (0.5, 0.3, 0.9, 0.7)  # in shares of the picture
NOSES = (0.3, 0.41), (0.96, 0.55)  # in shares of the picture; a patch at the second is cut by the border
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
            if not whole:
                continue
            ours, drawings = scene.by_engine(engine), scene.drawings(engine)
        for precision in {"float64", build.precision} - set(references):
            references[precision] = scene.by_reference(checkpoint, precision, drawings)
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
    """All that the branches of an engine are shown, at random, and the noise to start from.

    Two persons where a branch has rows of persons or the ID enters otherwise; one, or nobody, if the engine was built
    for no more.

    id_pixels: (N, 3, S, S) float32, of engines that encode a crop.
    persons:   N persons: where a branch has rows of persons, each with its box, a drawing of its face or landmarks, and
               a body; in engines that embed faces, with an embedding and its anchor.
    pictures:  for every branch that takes one, (C, H, W) float32 in [0, 1]; patches are painted on it.
    noise:     (1, C, h, w) float32.
    """

    config: RealisIDConfig
    id_pixels: NDArray[np.float32]
    persons: tuple[Person, ...]
    pictures: Mapping[str, NDArray[np.float32]]
    noise: NDArray[np.float32]

    @classmethod
    def of(cls, manifest: Manifest) -> Scene:
        model, table, rng = manifest.model, manifest.config.table, np.random.default_rng(0)
        side, image = model.default_size, model.image_size
        of_persons = [branch for branch in table if branch.per == "person"]
        needed = of_persons or manifest.config.unet_tokens != "text" or any(branch.reads_id for branch in table)
        boxes = BOXES[: manifest.values["built_for"]["persons"]] if needed else ()
        id_pixels = rng.standard_normal((len(boxes), 3, image, image)).astype(np.float32)
        faces = rng.random((len(boxes), 3, side, side)).astype(np.float32).round()
        pictures = {
            branch.name: rng.random((branch.channels, side, side)).astype(np.float32)
            for branch in table
            if branch.per == "picture"
        }
        # A face that is drawn into the whole picture is drawn by its landmarks, far enough apart for every style.
        by_landmarks = any(branch.draws_faces and branch.view == "picture" for branch in of_persons)
        persons = []
        for box, nose, face in zip(boxes, NOSES, faces, strict=False):
            given: dict[str, Any] = {}
            if of_persons:
                landmarks = rng.uniform(-0.5, 1.5, (NUM_LANDMARKS, 2))
                given = {"landmarks": landmarks} if by_landmarks else {"pose_image": face}
                given |= {"box": [side * x for x in box], "body": rng.uniform(0, side, (NUM_JOINTS, 2))}
            if model.face_encoder is not None:
                embedding = rng.standard_normal(model.face_encoder["output_dim"])
                if model.face_encoder["norm"] == "unit":
                    embedding /= np.linalg.norm(embedding)
                given |= {"embedding": embedding.astype(np.float32), "at": (side * nose[0], side * nose[1])}
            persons.append(Person(**given))
        noise = initial_noise(SEED, (1, model.latent_channels, model.sample_size, model.sample_size))
        return cls(manifest.config, id_pixels, tuple(persons), pictures, noise)

    @property
    def steps(self) -> int:
        return self.config.fixed_steps or STEPS

    def settings(
        self, control: type[Control] | type[ReferenceControl], pictures: Mapping[str, Any]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Arguments of `generate`: for a single step, in which every branch acts, and for STEPS steps, or as many as
        distilled weights know."""
        acting = {of.name: control(pictures.get(of.name), of.scale or 1.0, 0.0, 1.0) for of in self.config.table}
        usual = {name: control(picture) for name, picture in pictures.items()}
        delayed = steps_without_id(self.steps, RATIO, self.config.delay_rule)
        ratio = RATIO if delayed < self.steps else None  # of one or two steps none would have the ID
        return (
            {"controls": acting, "num_inference_steps": 1, "sampler": "ddim", "subject_conditioning_ratio": None},
            {"controls": usual, "num_inference_steps": self.steps, "subject_conditioning_ratio": ratio},
        )

    def by_engine(self, engine: Engine) -> Outcomes:
        backend, persons = engine.backend, list(self.persons)
        if engine.config.id_input == "face_crop":
            for number, pixels in enumerate(self.id_pixels):
                fed = {"id_pixels": backend.put(pixels[None], for_networks=True)}  # plans take one person at a time
                [tokens] = backend.get(backend.run("id_encoder", fed)["id_tokens"])
                persons[number] = replace(persons[number], id_tokens=tokens)
        given: dict[str, Any] = {"latents": self.noise, "seed": SEED, "output": "latents"}
        settings = self.settings(Control, self.pictures)
        return Outcomes(*(engine.generate(PROMPT, persons, **given, **each).latents for each in settings))

    def drawings(self, engine: Engine) -> dict[str, list[NDArray[np.float32]]]:
        """What the engine shows to its branches: name → (C, H, W), one for each person or one for the picture."""
        persons, model = list(self.persons), engine.model
        if engine.config.id_input == "face_crop":
            tokens = np.zeros((model.num_id_tokens, model.cross_attention_dim), np.float32)
            persons = [replace(person, id_tokens=tokens) for person in persons]
        return engine.conditions(PROMPT, persons, controls=self.settings(Control, self.pictures)[0]["controls"])

    def by_reference(
        self, checkpoint: Checkpoint, precision: str, drawings: Mapping[str, Sequence[NDArray[np.float32]]]
    ) -> Outcomes:
        """drawings: of the engine, of persons who give no drawing themselves."""
        of_persons = [branch.name for branch in self.config.table if branch.per == "person"]
        persons = [
            ReferencePerson(
                pose_image=None if person.pose_image is None else torch.from_numpy(person.pose_image),
                box=person.box,  # type: ignore[arg-type] # four floats
                id_pixels=torch.from_numpy(pixels),
                embedding=None if person.embedding is None else torch.tensor(person.embedding),
                anchor=person.at,
                drawings={name: torch.from_numpy(drawings[name][number]) for name in of_persons},
            )
            for number, (person, pixels) in enumerate(zip(self.persons, self.id_pixels, strict=True))
        ]
        pictures = {name: torch.from_numpy(picture) for name, picture in self.pictures.items()}
        settings = self.settings(ReferenceControl, pictures)
        opened: AbstractContextManager[Reference]
        if precision in PRECISIONS:
            opened = half_reference(checkpoint, PRECISIONS[precision])
        else:
            opened = nullcontext(Reference(checkpoint, getattr(torch, precision)))
        with opened as reference:
            noise = torch.from_numpy(self.noise)
            latents = (reference.generate(PROMPT, persons, noise, seed=SEED, **each) for each in settings)
            return Outcomes(*(each.double().numpy() for each in latents))


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

    # z' = A·z + B·noise_pred, Eq. (8)'s combination of all rows
    scale, shift = table_of("ddim", NoiseSchedule.of(manifest), 1).matrix[0, 0, :2]
    single = [(each.single - scale * scene.noise) / shift for each in (ours, plain, truth)]
    noise_pred = errors(*single, "the guided noise_pred of one step")
    return {
        "steps": scene.steps,
        **errors(ours.final, plain.final, truth.final, f"the final latents after {scene.steps} steps"),
        **{f"{name}_noise_pred": value for name, value in noise_pred.items()},
    }
