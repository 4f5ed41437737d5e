"""Read this first: an engine directory, loaded; and the line of the data from request to picture."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .backends import Backend, open_backend
from .checks import check_finite
from .denoise import LOOP, Batch, denoise
from .errors import BackendError, EngineMismatch, RequestError
from .faces import FaceFinder
from .identity import Identity
from .manifest import Manifest
from .people import People, PreparedPerson
from .photo import Photo
from .picture import decode, to_pil
from .prologue import Prologue
from .request import OMITTED, Omitted, Person, PlacedPerson, Request, Result
from .stopwatch import Stopwatch

Progress = Callable[[int, int], object]


class Engine:
    """A RealisID checkpoint, built and loaded. Make one with `Engine.load`.

    An engine may be used from several threads; it makes one batch at a time. It gives back what it holds when it is
    closed, `with Engine.load(…) as engine`, or when nobody holds it any more.
    """

    def __init__(self, manifest: Manifest, backend: Backend, finder: FaceFinder, share_rows: bool = True) -> None:
        self.manifest, self.backend = manifest, backend
        self.config, self.model = manifest.config, manifest.model
        self._null_id_tokens = manifest.constants["null_id_tokens"]
        self._people = People(backend, finder, self.model, self.config)
        self._prologue = Prologue(manifest, backend, share_rows)
        self._lock, self._user, self._closed = threading.Lock(), 0, False

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        backend: str = "auto",
        device: str | None = None,
        *,
        networks: Collection[str] | None = None,
        share_rows: bool = True,
        cuda_graph: bool | None = None,
        face_landmarker: str | os.PathLike[str] | None = None,
    ) -> Engine:
        """The engine at `path`: its manifest and every file verified, its networks opened.

        backend:         "auto" takes the first that was built and is installed.
        device:          "cpu", "cpu:N" for N threads, "cuda" or "cuda:N" for the GPU of that number. None: a GPU if the
                         engine was built for one (--fp16) and one can be used here, else the CPU.
        networks:        open only these; None opens all. ("id_encoder",) is enough for `embed`.
        share_rows:      False evaluates three full rows for every picture, as a naive pipeline does. For measurements
                         with ONNX Runtime: TensorRT's plans are built for shared rows.
        cuda_graph:      True: a step on a GPU is captured as a CUDA graph and replayed; where that is refused, a
                         warning says so. None: where the backend is known to gain by it, which none is yet.
        face_landmarker: MediaPipe's face_landmarker.task, used through the mediapipe package if that is installed.

        Raises EngineMissing, EngineDamaged, EngineMismatch or BackendError, with the command that mends it.
        """
        manifest = Manifest.read(path)
        manifest.check_files()
        opened = open_backend(backend, manifest, device, networks, cuda_graph)
        finder = FaceFinder.load(
            manifest.path / "faces",
            face_landmarker=None if face_landmarker is None else Path(face_landmarker),
            files=manifest.files_in("faces"),
        )
        engine = cls(manifest, opened, finder, share_rows)
        if Manifest.read(path).values != manifest.values:
            engine.close()
            raise EngineMismatch(f"{path} was built anew while it was loaded. Load it again.")
        return engine

    def warm_up(self, persons: int = 1, **options: Any) -> None:
        """Makes such a batch twice and throws it away: what compiles, plans memory or captures at first does it now.

        persons: how many; nobody in particular. options: of `generate`, such as num_images, height and width.
        """
        model = self.model
        side, least = model.default_size, model.vae_scale_factor << (model.levels - 1)
        nobody = Person(
            id_tokens=np.zeros((model.num_id_tokens, model.cross_attention_dim), np.float32),
            pose_image=np.zeros((3, side, side), np.float32),
            box=(0, 0, 2 * least, 2 * least),
        )
        for _ in range(2):
            self.generate("", [nobody] * persons, **options)

    def unload(self) -> None:
        """Gives back the weights of what does not run in every step: text and ID encoders, time, conditions, the VAE.

        They are loaded again when they are needed. For a GPU that holds the loop's networks and little more.
        """
        with self._alone():
            if self._closed:
                return
            self.backend.unload([name for name in self.manifest.values["networks"] if name not in LOOP])

    def close(self) -> None:
        """Waits for the batch that is being made, then gives back the networks and their memory. May be repeated."""
        with self._alone():
            self._closed = True
            self.backend.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def embed(
        self,
        photo: Photo,
        *,
        face: int | None = None,
        box: Sequence[float] | None = None,
        landmarks: NDArray[Any] | None = None,
        crop: Photo | None = None,
    ) -> Identity:
        """The identity in a photo, to be stored, or passed in place of the photo.

        face:      which face, counted from the left; None takes the only or the clearly largest one.
        box:       x0, y0, x1, y1 of the face in pixels of the upright photo, instead of detecting it.
        landmarks: (478, 2) in [0, 1] of the squared box, instead of finding them.
        crop:      the squared face with its background zeroed, instead of cutting it out.

        Raises PhotoError.
        """
        with self._use():
            return self._people.embed(photo, face, box, landmarks, crop)

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
        if not isinstance(requests, Sequence) or not requests or not all(isinstance(r, Request) for r in requests):
            raise RequestError("requests is empty or not a list of Request. Write [Request('…', [Person(…)]), …].")
        for request in requests:
            request.check()
        steps = self.config.num_inference_steps if num_inference_steps is None else num_inference_steps
        seeds = [int.from_bytes(os.urandom(4)) if request.seed is None else request.seed for request in requests]

        prologue, put = self._prologue, self.backend.put
        coefficients = prologue.coefficients(steps)
        grid = prologue.grid(height, width)
        prologue.check_boxes(requests, grid)
        texts = prologue.texts(requests)
        plans = prologue.plans(requests, texts, steps, grid)
        noise = prologue.noise(requests, seeds, grid)

        watch = Stopwatch()
        with self._use():
            with watch("persons"):
                people = [
                    self._people.prepare(person, grid, alone=len(request.persons) == 1, name=f"person {i + 1}")
                    for request in requests
                    for i, person in enumerate(request.persons)
                ]
            with watch("text"):
                embedded = prologue.embed_texts(texts)
            self.backend.rewind()  # whether people and texts were known or not, all that follows lies at the same place
            with watch("time"):
                time_tables = prologue.time_tables(steps, grid, embedded, with_branches=bool(people))
            with watch("conditions"):
                conditions = prologue.embed_conditions(people, grid)
            scales = [
                (request.local_scale, request.global_scale) for request in requests for _ in range(request.num_images)
            ]
            batch = Batch(
                latents=put(noise),
                step=put(np.zeros(len(noise), np.int32)),
                plans=plans,
                coefficients=put(coefficients),
                prompt_embeds=put(np.stack([text.prompt_embeds for text in embedded]), for_networks=True),
                id_tokens=put(np.stack([self._null_id_tokens, *(p.id_tokens for p in people)]), for_networks=True),
                boxes=prologue.face_cells(people),
                scales=np.array(scales, np.float32),
                **time_tables,
                **conditions,
            )
            with watch("denoise"):
                step_ms = denoise(self.backend, batch, progress)
                finite = self.backend.all_finite(batch.latents)
                latents = self.backend.get(batch.latents)
            if not finite:
                check_finite(latents, "the final latents")
            with watch("vae"):
                pictures = [] if output == "latents" else list(decode(self.backend, latents))
            images = [to_pil(picture) for picture in pictures] if output == "pil" else pictures
            return self._results(requests, seeds, images, latents, people, self._timings(watch), step_ms)

    @contextmanager
    def _use(self) -> Iterator[None]:
        """One request on the backend."""
        with self._alone():
            if self._closed:
                raise BackendError("this engine was closed. Load it again: Engine.load(…).")
            self.backend.begin()
            yield

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """One user at a time. A progress callback that calls its own engine would wait for itself for ever."""
        if self._user == threading.get_ident():
            raise RequestError("a progress callback used the engine that calls it. Let it take notes and act later.")
        with self._lock:
            self._user = threading.get_ident()
            try:
                yield
            finally:
                self._user = 0

    def _timings(self, watch: Stopwatch) -> dict[str, float]:
        """Milliseconds of every stage; behind "denoise", of what ran in its steps."""
        usage, timings = self.backend.usage, dict[str, float]()
        for stage, ms in watch.ms.items():
            timings[stage] = ms
            if stage == "denoise":
                timings |= {f"denoise.{name}": usage.ms[name] for name in LOOP if name in usage.ms}
        return timings

    def _results(
        self,
        requests: Sequence[Request],
        seeds: Sequence[int],
        images: Sequence[Any],
        latents: NDArray[np.float32],
        people: Sequence[PreparedPerson],
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
                    backend=f"{self.backend.name} on {self.backend.device}, {self.backend.precision}",
                )
            )
            picture, person = own.stop, person + len(request.persons)
        return results
