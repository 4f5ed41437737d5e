"""The picture that every contender makes: its size, steps, noise, persons and control pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from realisid_trt import Control, Person
from realisid_trt.branches import Branch
from realisid_trt.config import RealisIDConfig
from realisid_trt.errors import RequestError
from realisid_trt.loop.noise import initial_noise
from realisid_trt.loop.rows import in_window, steps_without_id
from realisid_trt.loop.samplers import NoiseSchedule, table_of
from realisid_trt.manifest import Manifest, Model
from realisid_trt.persons.bodies import NUM_JOINTS
from realisid_trt.persons.mesh import NUM_LANDMARKS

from .options import Options, has_persons

FACE = 0.3  # side of a face box over the shorter side of the picture
WARM_STEPS = 4  # of a warm-up, so that pictures of different weights are found early


@dataclass(frozen=True, eq=False)
class Scene:
    """The picture of one measurement, for any number of random persons.

    height, width: px.
    steps:         of a picture; warm_steps: of a warm-up.
    switch:        number of evaluations of the networks before the first one with the ID.
    sampler:       of engines; baselines sample with DDIM.
    latents:       (1, C, h, w) float32, the noise.
    controls:      for branches that are shown one picture.
    """

    model: Model
    config: RealisIDConfig
    height: int
    width: int
    steps: int
    warm_steps: int
    switch: int
    latents: NDArray[np.float32]
    controls: Mapping[str, Control]
    seed: int
    sampler: str

    @classmethod
    def of(cls, options: Options, manifest: Manifest) -> Scene:
        """The scene of the options for this engine. Raises RequestError for an impossible size or number of steps."""
        model, config = manifest.model, manifest.config
        height, width = options.height or model.default_size, options.width or model.default_size
        multiple = model.vae_scale_factor * 2 ** (model.levels - 1)
        for name, side_px in (("height", height), ("width", width)):
            if side_px % multiple:
                raise RequestError(f"--{name} is {side_px}, expected a multiple of {multiple} px.")
        steps = options.steps or config.num_inference_steps
        table = table_of(options.sampler, NoiseSchedule.of(manifest), steps)
        delay = config.subject_conditioning_ratio, config.delay_rule
        shown = options.shown(config)
        acting = [branch for branch in config.table if branch in shown or branch.per == "person"]
        cells = model.latent_channels, height // model.vae_scale_factor, width // model.vae_scale_factor
        return cls(
            model,
            config,
            height,
            width,
            steps,
            warm_steps(steps, delay[0], [(branch.start, branch.end) for branch in acting], delay[1]),
            int((table.step_of < steps_without_id(steps, *delay)).sum()),
            initial_noise(options.seed, cells)[None],
            make_controls(shown, height, width, options.seed),
            options.seed,
            options.sampler,
        )

    def persons(self, count: int) -> list[Person]:
        """Random persons with all that the branches are shown of them."""
        persons = make_persons(self.model, count, self.height, self.width, self.seed)
        if self.config.id_input != "face_crop":
            persons = [replace(person, id_tokens=None) for person in persons]
        of_persons = [branch for branch in self.config.table if branch.per == "person"]
        rng = np.random.default_rng(self.seed)
        if any(branch.draws_faces and branch.view == "picture" for branch in of_persons):  # by their landmarks alone
            faces = rng.random((count, NUM_LANDMARKS, 2))
            persons = [replace(p, pose_image=None, landmarks=face) for p, face in zip(persons, faces, strict=True)]
        if any(branch.draws_bodies for branch in of_persons):
            bodies = rng.random((count, NUM_JOINTS, 2)) * (self.width, self.height)
            persons = [replace(p, body=body) for p, body in zip(persons, bodies, strict=True)]
        if self.model.face_encoder is not None:
            persons = [self._embedded(person, rng) for person in persons]
        return persons if of_persons else [replace(p, pose_image=None, box=None) for p in persons]

    def _embedded(self, person: Person, rng: np.random.Generator) -> Person:
        """The person with an embedding as the face encoder gives it, anchored at the centre of its box."""
        assert self.model.face_encoder is not None and person.box is not None
        embedding = rng.standard_normal(self.model.face_encoder["output_dim"])
        if self.model.face_encoder["norm"] == "unit":
            embedding /= np.linalg.norm(embedding)
        x0, y0, x1, y1 = person.box
        return replace(person, embedding=embedding.astype(np.float32), at=((x0 + x1) / 2, (y0 + y1) / 2))

    def given(self, count: int, steps: int) -> dict[str, Any]:
        """Arguments that `generate` of the engine and of the baselines both accept.

        count: of the persons; an engine whose branches show none gets none.
        """
        controls = {"controls": self.controls} if self.controls else {}
        persons = self.persons(count) if has_persons(self.config) else []
        return {"persons": persons, "latents": self.latents, "num_inference_steps": steps, **controls}


def warm_steps(
    steps: int, alpha: float | None, windows: Sequence[tuple[float, float]] = (), delay_rule: str = "inclusive"
) -> int:
    """The fewest steps, at least WARM_STEPS or all, with a picture's own phases: steps without and with the ID, inside
    and outside of each window."""

    def phases(count: int) -> set[tuple[bool, ...]]:
        without_id = steps_without_id(count, alpha, delay_rule)
        return {(i < without_id, *(in_window(i, count, *window) for window in windows)) for i in range(count)}

    return next(count for count in range(min(steps, WARM_STEPS), steps + 1) if phases(count) == phases(steps))


def make_controls(shown: Sequence[Branch], height: int, width: int, seed: int) -> dict[str, Control]:
    """A random picture for each of these branches."""
    rng = np.random.default_rng(seed)
    return {branch.name: Control(rng.random((branch.channels, height, width)).astype(np.float32)) for branch in shown}


def make_persons(model: Model, count: int, height: int, width: int, seed: int) -> list[Person]:
    """Persons in a row, each with the ID tokens and the drawing that a photo would give, at random."""
    rng = np.random.default_rng(seed)
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
