"""The makers of pictures: an engine with any options, or the world itself for the truth and its ceiling."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from export.checkpoint import Checkpoint
from realisid_trt import Engine, Person, Request
from realisid_trt.backends import open_backend
from realisid_trt.manifest import Manifest
from realisid_trt.persons.faces import FaceFinder
from realisid_trt.persons.identity import Identity

from .cases import Case, Casting

Rgb = NDArray[np.uint8]


class Contender(Protocol):
    """Makes one (S, S, 3) uint8 picture per case."""

    def make(self, cases: Sequence[Case], name: str) -> Rgb: ...


class Truth:
    """The world's own pictures; with a VAE, encoded and decoded: the result of a perfect denoiser."""

    def __init__(self, checkpoint: Checkpoint | None = None) -> None:
        self.vae: Any = None if checkpoint is None else checkpoint.load_vae()

    @torch.no_grad()
    def make(self, cases: Sequence[Case], name: str) -> Rgb:
        pictures = np.stack([case.picture.rgb for case in cases])
        if self.vae is None:
            return pictures
        made = []
        for first in range(0, len(pictures), 16):
            pixels = torch.from_numpy(pictures[first : first + 16]).permute(0, 3, 1, 2).float() / 127.5 - 1
            decoded = self.vae.decode(self.vae.encode(pixels).latent_dist.mean).sample
            made.append(((decoded.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy())
        return np.concatenate(made)


class SomebodyElse:
    """The world's own pictures of other people in other poses, at the same boxes."""

    def __init__(self, casting: Casting) -> None:
        self.casting = casting

    def make(self, cases: Sequence[Case], name: str) -> Rgb:
        return np.stack([self.casting.somebody_else(case).rgb for case in cases])


def load_engine(path: Path, backend: str, device: str | None, changes: Mapping[str, Any]) -> Engine:
    """The engine with changed values of realisid_config.json, for keys that only the runtime reads.

    A user changes them in the checkpoint and builds again, and that build reuses every network. backend, device: as of
    `Engine.load`.
    """
    manifest = Manifest.read(path)
    manifest.check_files()
    config = {**manifest.values["realisid_config"], **changes}
    changed = Manifest(manifest.path, {**manifest.values, "realisid_config": config})
    return Engine(changed, open_backend(backend, changed, device), FaceFinder.load(manifest.path / "faces"))


class EngineContender:
    """An engine, called as a user calls it. options: of every Request; steps, sampler: None takes the engine's."""

    def __init__(
        self,
        engine: Engine,
        steps: int | None = None,
        batch: int = 4,
        options: Mapping[str, Any] | None = None,
        sampler: str | None = None,
    ) -> None:
        self.engine, self.batch, self.options = engine, batch, dict(options or {})
        self.common: dict[str, Any] = {"num_inference_steps": steps, "sampler": sampler, "output": "np"}

    def make(self, cases: Sequence[Case], name: str) -> Rgb:
        made: list[Rgb] = []
        with tqdm(total=len(cases), desc=name) as bar:
            for first in range(0, len(cases), self.batch):
                some = cases[first : first + self.batch]
                requests = [self._request(case) for case in some]
                results = self.engine.generate_batch(requests, **self.common)
                made += [(result.images[0] * 255).round().astype(np.uint8) for result in results]
                bar.update(len(some))
        return np.stack(made)

    def _request(self, case: Case) -> Request:
        persons = [
            Person(self._identity(crop), box=tuple(box), landmarks=points)
            for crop, box, points in zip(case.crops, case.picture.boxes, case.picture.landmarks, strict=True)
        ]
        return Request(prompt=case.scene.caption, persons=persons, seed=case.seed, **self.options)

    def _identity(self, crop: Rgb) -> Identity:
        """The identity of an ID crop. Box and landmarks of the photo are not used: every request gives its own."""
        side = float(crop.shape[0])
        return self.engine.embed(crop, box=(0, 0, side, side), landmarks=np.full((478, 2), 0.5), crop=crop)
