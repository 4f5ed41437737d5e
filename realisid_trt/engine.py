"""Read this first: an engine directory, loaded; and the line of the data from request to picture."""

from __future__ import annotations

import os
import secrets
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .backends import Backend, open_backend
from .denoise import LOOP, denoise
from .errors import RequestError
from .faces import FaceFinder
from .identity import Identity
from .manifest import Manifest
from .people import Conditions, People
from .picture import check_finite, decode, to_pil
from .prologue import Prologue
from .request import OMITTED, Omitted, Person, Photo, PlacedPerson, Request, Result
from .stopwatch import Stopwatch

Progress = Callable[[int, int], object]


class Engine:
    """A RealisID checkpoint, built and loaded. Make one with `Engine.load`.

    An engine may be used from several threads; it makes one batch at a time.
    """

    def __init__(self, manifest: Manifest, backend: Backend, finder: FaceFinder, share_rows: bool = True) -> None:
        self.manifest, self.backend = manifest, backend
        self.config, self.model = manifest.config, manifest.model
        self._people = People(backend, finder, self.model, self.config)
        self._prologue = Prologue(manifest, backend, share_rows)
        self._lock = threading.Lock()

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        backend: str = "auto",
        device: str | None = None,
        *,
        share_rows: bool = True,
        face_landmarker: str | os.PathLike[str] | None = None,
    ) -> Engine:
        """The engine at `path`, its manifest and every file verified first.

        backend:         "auto" takes the first that was built and is installed.
        device:          the backend's name of a device; "cpu" or "cpu:N" threads for ONNX Runtime.
        share_rows:      False evaluates three full rows for every picture, as a naive pipeline does. For measurements.
        face_landmarker: MediaPipe's face_landmarker.task, used through the mediapipe package if that is installed.

        Raises EngineMissing, EngineDamaged, EngineMismatch or BackendError, with the command that mends it.
        """
        manifest = Manifest.read(path)
        manifest.check_files()
        opened = open_backend(backend, manifest, device)
        task = Path(face_landmarker) if face_landmarker is not None else None
        return cls(manifest, opened, FaceFinder.load(manifest.path / "faces", landmarker_task=task), share_rows)

    def embed(
        self,
        photo: Photo,
        *,
        face: int | None = None,
        box: Sequence[float] | None = None,
        landmarks: NDArray[Any] | None = None,
    ) -> Identity:
        """The identity in a photo, to be stored, or passed in place of the photo.

        face:      which face, counted from the left; None takes the only or the clearly largest one.
        box:       x0, y0, x1, y1 of the face in pixels of the photo, instead of detecting it.
        landmarks: (478, 2) in [0, 1] of the squared box, instead of finding them.

        Raises PhotoError.
        """
        with self._lock:
            return self._people.embed(photo, face, box, landmarks)

    def generate(
        self,
        prompt: str,
        persons: Sequence[Person] = (),
        *,
        negative_prompt: str | None = None,
        num_images: int = 1,
        seed: int | None = None,
        latents: NDArray[Any] | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        id_guidance_scale: float | None = None,
        subject_conditioning_ratio: float | None | Omitted = OMITTED,
        local_scale: float = 1.0,
        global_scale: float = 1.0,
        height: int | None = None,
        width: int | None = None,
        output: str = "pil",
        progress: Progress | None = None,
    ) -> Result:
        """Pictures of the given persons. See `Request` for the arguments, `generate_batch` for the rest."""
        request = Request(
            prompt=prompt,
            persons=persons,
            negative_prompt=negative_prompt,
            num_images=num_images,
            seed=seed,
            latents=latents,
            guidance_scale=guidance_scale,
            id_guidance_scale=id_guidance_scale,
            subject_conditioning_ratio=subject_conditioning_ratio,
            local_scale=local_scale,
            global_scale=global_scale,
        )
        [result] = self.generate_batch(
            [request],
            num_inference_steps=num_inference_steps,
            height=height,
            width=width,
            output=output,
            progress=progress,
        )
        return result

    def generate_batch(
        self,
        requests: Sequence[Request],
        *,
        num_inference_steps: int | None = None,
        height: int | None = None,
        width: int | None = None,
        output: str = "pil",
        progress: Progress | None = None,
    ) -> list[Result]:
        """One Result per request, all made in one pass.

        num_inference_steps: S, common to the batch.
        height, width:       of the pictures, px; common to the batch. Multiples of f·2^(L-1).
        output:              "pil", "np" ((H, W, 3) float32 in [0, 1]) or "latents" (no VAE).
        progress:            called after each step with (steps done, steps in all).

        Raises RequestError, BoxError, ShapeError or PhotoError before any step, NumericsError after the last.
        """
        if output not in ("pil", "np", "latents"):
            raise RequestError(f'output is {output!r}, expected "pil", "np" or "latents".')
        if not requests or not all(isinstance(request, Request) for request in requests):
            raise RequestError("requests is empty or not a list of Request. Write [Request('…', [Person(…)]), …].")
        for request in requests:
            request.check()
        steps = self.config.num_inference_steps if num_inference_steps is None else num_inference_steps
        grid = self._prologue.grid(height, width)
        seeds = [secrets.randbelow(2**32) if request.seed is None else request.seed for request in requests]
        with self._lock:
            self.backend.reset_usage()
            watch = Stopwatch()
            with watch("persons"):
                people = [
                    self._people.conditions(person, grid, alone=len(request.persons) == 1, name=f"person {i + 1}")
                    for request in requests
                    for i, person in enumerate(request.persons)
                ]
            batch = self._prologue.batch(requests, people, seeds, steps, grid, watch)
            with watch("denoise"):
                step_ms = denoise(self.backend, batch, progress)
                latents = self.backend.get(batch.latents)
            check_finite(latents, "the final latents")
            with watch("vae"):
                pictures = [] if output == "latents" else list(decode(self.backend, latents))
            images = [to_pil(picture) for picture in pictures] if output == "pil" else pictures
            usage = self.backend.usage
            timings = watch.ms | {f"denoise.{name}": usage.ms[name] for name in LOOP if name in usage.ms}
            return self._results(requests, seeds, images, latents, people, timings, step_ms)

    def _results(
        self,
        requests: Sequence[Request],
        seeds: Sequence[int],
        images: Sequence[Any],
        latents: NDArray[np.float32],
        people: Sequence[Conditions],
        timings: dict[str, float],
        step_ms: Sequence[float],
    ) -> list[Result]:
        results, picture, person = [], 0, 0
        for request, seed in zip(requests, seeds, strict=True):
            own = slice(picture, picture + request.num_images)
            placed = people[person : person + len(request.persons)]
            results.append(
                Result(
                    images=list(images[own]),
                    latents=latents[own],
                    seed=seed,
                    persons=tuple(PlacedPerson(p.face_box.px, p.mask_source, p.notes) for p in placed),
                    timings=timings,
                    step_ms=tuple(step_ms),
                    rows=dict(self.backend.usage.rows),
                    backend=f"{self.backend.name} on {self.backend.device}",
                )
            )
            picture, person = own.stop, person + len(request.persons)
        return results
