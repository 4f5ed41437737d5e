"""Read this first: a loaded engine directory, and the path of the data from request to picture."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Unpack, cast, overload

import numpy as np
from numpy.typing import NDArray

from .backends import Backend, open_backend
from .checks import device_name
from .errors import BackendError, EngineError, EngineMismatch, RealisIDError, RequestError
from .loop.begin import Beginning
from .loop.controls import blanks, with_patches
from .loop.denoise import loop_networks
from .loop.finish import Ending
from .loop.outcomes import Outcomes, Stopwatch, part_of
from .loop.passes import Passes
from .loop.prologue import Prologue
from .loop.samplers import Sampler
from .loop.stages import MEMORY, Stages
from .loop.turns import Turns
from .loop.work import Work
from .manifest import Manifest
from .persons.faces import FaceFinder
from .persons.faces.face_encoder import FaceEncoder
from .persons.identity import Identity
from .persons.people import People
from .persons.person import Person, placeholder
from .persons.photo import Photo
from .request import (
    BatchOptions,
    Control,
    GenerateOptions,
    Progress,
    Request,
    Result,
    check_batch,
    check_output,
    check_request,
    spelled_out,
)


class Engine:
    """A checkpoint, built and loaded. Make one with `Engine.load`.

    Several threads may share an engine; it makes one batch at a time. It frees its networks and memory when it is
    closed (`with Engine.load(…) as engine`) or garbage-collected.
    """

    def __init__(
        self, manifest: Manifest, backend: Backend, finder: FaceFinder, share_rows: bool = True, memory: str = "normal"
    ) -> None:
        self.manifest, self.backend = manifest, backend
        self.config, self.model = manifest.config, manifest.model
        self._loop_networks = loop_networks(self.config.table)
        self._people = People(backend, finder, self.model, self.config, FaceEncoder.of(manifest))
        self._prologue = Prologue(manifest, backend, share_rows)
        self._stages = stages = Stages(manifest, backend, memory)
        null_id_tokens = manifest.constants.get("null_id_tokens")
        self._passes = passes = Passes(self.config, backend, self._prologue.planner, null_id_tokens)
        self._beginning = Beginning(manifest, backend, self._people, self._prologue, stages, passes)
        self._ending = Ending(manifest, backend, passes, stages, self.model.sample_size if memory == "low" else None)
        self._turns = Turns(backend)

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
        memory: str = "normal",
        face_landmarker: str | os.PathLike[str] | None = None,
    ) -> Engine:
        """The engine at `path`: its manifest and every file that it opens verified, its networks opened unless memory
        is "low".

        An engine is code that this machine runs. Load only engines that you built or whose source you trust.

        backend:         "auto" takes the first that was built and is installed.
        device:          "cpu", "cpu:N" for N threads, "cuda" or "cuda:N" for the GPU of that number. None: a GPU if the
                         engine was built for one (--fp16) and one can be used here, else the CPU.
        networks:        open only these; None opens all. ("id_encoder",) is enough for `embed`.
        share_rows:      False evaluates three full rows for every picture, as a naive pipeline does. For measurements
                         with ONNX Runtime: TensorRT's plans are built for shared rows.
        cuda_graph:      True: capture a step on a GPU as a CUDA graph and replay it; a warning is given if the capture
                         is refused. None: only where the backend is known to gain from it, at present nowhere.
        memory:          "low": only the networks of the current stage are loaded, and a picture larger than those the
                         model was trained on is decoded in tiles. Slower, and such a picture differs a little.
        face_landmarker: MediaPipe's face_landmarker.task, used through the mediapipe package if that is installed.

        Raises RequestError for impossible arguments; EngineMissing, EngineDamaged, EngineMismatch or
        BackendError, with the command that helps.
        """
        if not isinstance(path, (str, os.PathLike)):
            raise RequestError(f'path is {path!r}, expected the path of an engine directory: "engines/miniature".')
        if not isinstance(backend, str):
            raise RequestError(f'backend is {backend!r}, expected a name, or "auto".')
        device = device_name(device)
        if face_landmarker is not None and not isinstance(face_landmarker, (str, os.PathLike)):
            raise RequestError(f"face_landmarker is {face_landmarker!r}, expected the path of a face_landmarker.task.")
        if memory not in MEMORY:
            raise RequestError(f'memory is {memory!r}, expected "normal" or "low".')
        manifest = Manifest.read(path)
        opened = open_backend(backend, manifest, device, networks, cuda_graph, preload=memory == "normal")
        try:
            finder = FaceFinder.load(
                manifest.path / "faces",
                face_landmarker=None if face_landmarker is None else Path(face_landmarker),
                files=manifest.files_in("faces"),
            )
            engine = cls(manifest, opened, finder, share_rows, memory)
            if Manifest.read(path).values != manifest.values:
                raise EngineMismatch(f"{path} was rebuilt while it was being loaded. Load it again.")
        except BaseException:
            opened.close()
            raise
        return engine

    def warm_up(self, persons: int = 1, **options: Unpack[GenerateOptions]) -> None:
        """Compiles kernels and plans memory before the first request: makes such a batch twice and discards it.

        persons: number of placeholder persons. options: of `generate`, such as num_images, height and width. Branches
        that take a picture are shown a black one, unless controls are given.
        """
        model, grid = self.model, self._prologue.grid(options.get("height"), options.get("width"))
        tokens = None if self.config.id_input == "none" else (model.num_id_tokens, model.cross_attention_dim)
        embedding_dim = model.face_encoder["output_dim"] if model.face_encoder else None
        people = [placeholder(2 * grid.multiple, tokens, embedding_dim)] * persons
        options.setdefault("controls", blanks(self.config.table, grid))
        for _ in range(2):
            self.generate("", people, **options)

    def unload(self) -> None:
        """Frees the weights of networks that do not run in every step: text and ID encoders, time, conditions, the VAE.

        They are loaded again when they are needed. For a GPU with memory for the loop's networks and little more.
        """
        with self._turns.alone():
            if self._turns.is_closed:
                return
            with self.backend.turn():
                networks = self.manifest.values["networks"]
                self.backend.unload([name for name in networks if name not in self._loop_networks])

    def __reduce__(self) -> Any:
        raise RequestError(
            "an engine cannot be copied or sent to another process: its networks are open in this one. Load it there: "
            f"Engine.load({str(self.manifest.path)!r})."
        )

    def close(self) -> None:
        """Waits for the running batch, then frees the networks and their memory. May be repeated."""
        with self._turns.alone():
            self._turns.is_closed = True
            self._passes.clear()
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
        """The identity in a photo. It can be stored, or passed in place of the photo.

        face:      which face, counted from the left; None takes the only or the clearly largest one.
        box:       x0, y0, x1, y1 of the face in pixels of the upright photo, instead of detecting it.
        landmarks: (478, 2) in [0, 1] of the squared box, instead of finding them.
        crop:      the squared face with its background zeroed, or the face aligned for a face encoder, of your own.

        Raises PhotoError.
        """
        self._turns.check_free()
        if self.config.id_input == "none":
            raise RequestError("this engine has no identities: its checkpoint's id_input is none. Load another one.")
        found = self._people.look(photo, face, box, landmarks, crop)  # without the lock: a batch may be running
        if isinstance(found, Identity):
            return found
        with self._turns.use():
            self._stages.begin("persons")
            self.backend.start_request()
            return self._people.encode(found)

    def conditions(
        self,
        prompt: str,
        persons: Sequence[Person] = (),
        *,
        controls: Mapping[str, Control] | None = None,
        height: int | None = None,
        width: int | None = None,
    ) -> dict[str, list[NDArray[np.float32]]]:
        """What `generate` would show to every branch: name → its drawings, (C, H, W) in [0, 1], one for each person or
        one for the picture. Branches without a drawing are left out. Patches leave [0, 1]; only they need a network.

        Raises as `generate`.
        """
        self._turns.check_free()
        request, grid = Request(prompt, persons, controls=controls), self._prologue.grid(height, width)
        draft = self._prologue.draft(request, self._prologue.sampler_table(None, None), grid)
        seen = self._beginning.see(draft, grid)
        if not seen.people or not any(branch.condition == "id_patches" for branch in self.config.table):
            return seen.drawings
        with self._turns.use():
            self._stages.begin("persons")
            self.backend.start_request()
            people = self._people.prepare_all(seen.people)
        return with_patches(self.config.table, seen.drawings, people)

    def generate(self, prompt: str, persons: Sequence[Person] = (), **options: Unpack[GenerateOptions]) -> Result:
        """Pictures of the prompt and the given persons.

        negative_prompt, num_images, seed, latents, guidance_scale, id_guidance_scale, subject_conditioning_ratio,
        guidance_interval, controls, local_scale, global_scale: see `Request`.
        num_inference_steps, sampler, height, width, output, progress: see `generate_batch`, for what is raised too.
        """
        if unknown := sorted(options.keys() - GenerateOptions.__optional_keys__):
            raise TypeError(f"Engine.generate() got an unexpected keyword argument {unknown[0]!r}")
        given = dict[str, Any](options)
        common = {name: given.pop(name) for name in BatchOptions.__optional_keys__ & given.keys()}
        [result] = self.generate_batch([Request(prompt, persons, **given)], **cast(BatchOptions, common))
        return result

    @overload
    def generate_batch(
        self, requests: Sequence[Request], *, errors: Literal["raise"] = "raise", **options: Unpack[BatchOptions]
    ) -> list[Result]: ...

    @overload
    def generate_batch(
        self, requests: Sequence[Request], *, errors: Literal["return"], **options: Unpack[BatchOptions]
    ) -> list[Result | RealisIDError]: ...

    def generate_batch(
        self,
        requests: Sequence[Request],
        *,
        num_inference_steps: int | None = None,
        sampler: str | Mapping[str, Any] | Sampler | None = None,
        height: int | None = None,
        width: int | None = None,
        output: str = "pil",
        progress: Progress | None = None,
        errors: Literal["raise", "return"] = "raise",
    ) -> Sequence[Result | RealisIDError]:
        """One Result per request, all made in one pass; where ID tokens follow the text, in one pass for each number of
        persons and of steps without ID.

        num_inference_steps: S, common to the batch. None: the config's, or one for each of the sampler's timesteps.
        sampler:             a name or a `Sampler`, common to the batch. None: the config's.
        height, width:       of the pictures, px; common to the batch. Multiples of f·2^(L-1).
        output:              "pil", "np" ((H, W, 3) float32 in [0, 1]) or "latents" (no VAE).
        progress:            called after each step with (steps done, steps in all), of all passes; a step with two
                             evaluations of the networks, as Heun's, is two.
        errors:              "raise": an error of any request is raised; its `request` is the number of that request.
                             "return": the error takes the place of the request's Result, and the others are made.

        Raises RequestError, BoxError, ShapeError or PhotoError before any step, NumericsError after the last. An error
        of the whole batch is raised with "return" too.
        """
        check_batch(requests, output, errors)
        self._turns.check_free()
        prologue, planner = self._prologue, self._prologue.planner
        table, grid = prologue.sampler_table(sampler, num_inference_steps), prologue.grid(height, width)
        outcomes, watch = Outcomes(len(requests), keep=errors == "return"), Stopwatch()
        drafts = outcomes.each(dict(enumerate(requests)), lambda r: prologue.draft(r, table, grid))
        for group in planner.groups(drafts, table):
            planner.plan(list(group.values()), table, grid)  # what is too large is refused before a face is searched
        with watch("persons"):  # without the lock: another batch may be running
            seen = outcomes.each(drafts, lambda draft: self._beginning.see(draft, grid))
        with self._turns.use():
            works = self._beginning.works(drafts, seen, table, grid, outcomes, watch)
            try:
                groups = planner.groups({place: drafts[place] for place in works}, table)
                for number, group in enumerate(groups):
                    told = progress and part_of(progress, number, len(groups))
                    self._take_all_steps([works[place] for place in group], told)
                return outcomes.in_order(outcomes.each(works, lambda work: self._ending.result(work, output)))
            finally:
                for work in works.values():
                    self._passes.drop(work)

    def _take_all_steps(self, works: Sequence[Work], progress: Progress | None) -> None:
        self._stages.begin("denoise")
        for done in range(works[0].steps):
            self._passes.step(works)
            if progress is not None:
                with self.backend.outside():
                    progress(done + 1, works[0].steps)

    # One step at a time

    def begin(
        self,
        request: Request,
        *,
        num_inference_steps: int | None = None,
        sampler: str | Mapping[str, Any] | Sampler | None = None,
        height: int | None = None,
        width: int | None = None,
        previews: bool = False,
    ) -> Work:
        """A request up to its first step, for programs that decide before every step who takes it.

        Works may differ in everything: steps, sampler, size, persons. `step` them in any company and order, then
        `finish` each, or `drop` it: until then it keeps memory on the device. Use one thread.

        num_inference_steps, sampler, height, width: as for `generate_batch`.
        previews: whether `preview` will be asked for.

        Raises as `generate`.
        """
        self._turns.check_free()
        check_request(request)
        table, grid = self._prologue.sampler_table(sampler, num_inference_steps), self._prologue.grid(height, width)
        draft, outcomes, watch = self._prologue.draft(request, table, grid), Outcomes(1, keep=False), Stopwatch()
        with watch("persons"):
            seen = self._beginning.see(draft, grid)
        with self._turns.use():
            return self._beginning.works({0: draft}, {0: seen}, table, grid, outcomes, watch, previews)[0]

    def step(self, works: Sequence[Work]) -> None:
        """One step of each of these works: one evaluation of the networks. A work that is done stays as it is.

        Works of one size run together, as many as the engine was built for; where ID tokens follow the text, works of
        one number of tokens. The call may return before the step is done, but not before the step before it is.

        Raises BackendError: the works that ran together are lost. RequestError for a work that was finished or dropped.
        """
        self._turns.check_free()
        with self._turns.use():
            given = self._passes.checked(works)
            self._stages.begin("denoise")
            try:
                self._passes.step([work for work in given if not work.is_done])
            except EngineError as error:  # a build replaced networks that were not loaded
                raise BackendError(str(error)) from error

    def preview(self, work: Work, output: str = "pil") -> list[Any]:
        """The pictures of a work that was begun with previews, as they are predicted after its last step.

        output: as for `generate_batch`. "latents" gives one (C, h, w) array a picture, and costs next to nothing; the
        others run the VAE, as `finish` does.

        Raises RequestError before the first step, NumericsError.
        """
        self._turns.check_free()
        check_output(output)
        with self._turns.use():
            self._passes.checked([work])[0].check_preview()
            return self._ending.preview(work, output)

    def finish(self, work: Work, output: str = "pil") -> Result:
        """The pictures of a work that took all its steps. The work ends, whatever comes of it.

        output: as for `generate_batch`.

        Raises RequestError if steps are left; then the work goes on. NumericsError.
        """
        self._turns.check_free()
        check_output(output)
        with self._turns.use():
            self._passes.checked([work])[0].check_done()
            try:
                return self._ending.result(work, output)
            finally:
                self._passes.drop(work)

    def drop(self, work: Work) -> None:
        """Ends a work without its pictures and frees its memory. Others that ran with it are not touched. May be
        repeated."""
        with self._turns.alone():
            if not self._turns.is_closed:
                with self.backend.turn():
                    self._passes.drop(work)


Engine.generate.__signature__ = spelled_out(Engine.generate, Engine.generate_batch)  # type: ignore[attr-defined]
