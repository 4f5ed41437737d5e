"""What does not change over the steps of a request: texts, row plan, noise, time and condition embeddings."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..backends import Backend, Tensor
from ..checks import own_array, whole
from ..errors import ShapeError
from ..manifest import Manifest
from ..persons.anchors import check_anchors
from ..persons.boxes import Grid, check_inside, snap_box
from ..persons.prepared import PreparedPerson
from ..request import Request
from .controls import branches_of, settings, with_images
from .drafts import Draft
from .noise import initial_noise
from .outcomes import Stopwatch
from .planning import Planner
from .prompt import Prompts, TextEmbedding, TextEncoders
from .sampler_tables import Table
from .samplers import NoiseSchedule, Sampler, table_of
from .work import Work


class Prologue:
    """The stages before the loop. Those without a network come first and refuse impossible requests."""

    def __init__(self, manifest: Manifest, backend: Backend, share_rows: bool) -> None:
        self._manifest, self._backend = manifest, backend
        self.planner = Planner(manifest, backend, share_rows)
        self._config, self._model, self.table = manifest.config, manifest.model, manifest.config.table
        self._schedule = NoiseSchedule.of(manifest)
        self._prompts = Prompts(manifest.path, self._model.tokenizers)
        self._encoders = TextEncoders(backend, tuple(self._model.tokenizers), self._model.pooled_dim)
        self._max_length = next(iter(self._model.tokenizers.values())).max_length

    # Without networks

    def grid(self, height: int | None, width: int | None) -> Grid:
        """The grid of pictures of this size. Raises ShapeError for a size the engine does not make."""
        model = self._model
        sides = self._side("height", height), self._side("width", width)
        snap = self._config.box_snap or model.vae_scale_factor
        grid = Grid(*sides, model.vae_scale_factor, model.levels, snap)
        self._backend.check("unet_encoder", {"latents": (1, model.latent_channels, *grid.size(0))})
        return grid

    def _side(self, name: str, asked: int | None) -> int:
        model = self._model
        multiple = model.vae_scale_factor << (model.levels - 1)
        side = model.default_size if asked is None else whole(asked)
        if side is None or side < 1 or side % multiple:
            raise ShapeError(
                f"{name} is {asked!r}, expected a multiple of {multiple} px, one cell at the coarsest level."
            )
        return side

    def sampler_table(self, sampler: str | Mapping[str, Any] | Sampler | None, steps: int | None) -> Table:
        """The sampler of a batch, as numbers.

        sampler: None takes the config's. steps: None takes as many as the sampler lists timesteps, else the config's.

        Raises RequestError for an unknown sampler, or a number of steps that it does not have.
        """
        chosen = self._config.default_sampler if sampler is None else Sampler.of(sampler)
        if steps is None:
            steps = len(chosen.timesteps) if chosen.timesteps else self._config.num_inference_steps
        return table_of(chosen, self._schedule, steps)

    def draft(self, request: Request, sampler: Table, grid: Grid) -> Draft:
        """The request, checked before a face is searched. Raises RequestError, BoxError, ShapeError."""
        request = request.check()
        self._check_persons(len(request.persons))
        self.planner.check_pictures(request.num_images, grid)
        for person in request.persons:
            if person.box is not None:
                snap_box(person.box, grid)
                check_inside(person.box, grid)
        latents = request.latents
        if latents is not None:
            latents = own_array(latents, (request.num_images, *self._latent_shape(grid)), "latents")
        seed = int.from_bytes(os.urandom(4)) if request.seed is None else request.seed
        negative_prompt = request.negative_prompt
        if negative_prompt is None and not self._config.force_zeros_for_empty_prompt:
            negative_prompt = ""
        negative = None if negative_prompt is None else self._prompts.encode(negative_prompt, "negative_prompt")
        token_ids = negative, self._prompts.encode(request.prompt)
        given = settings(request, self.table, grid)
        check_anchors(request.persons, branches_of(self.table, given), with_images(self.table, given), grid)
        draft = Draft(request, seed, token_ids, latents, given)
        self.planner.plan([draft], sampler, grid)  # a request that is too large by itself fails alone
        return draft

    def _check_persons(self, count: int) -> None:
        """Raises ShapeError if the IDs of so many persons are more tokens than the engine's networks take."""
        most = self._manifest.values["built_for"]["persons"]
        if self._config.unet_tokens == "text_and_id" and count > most:
            raise ShapeError(
                f"{count} {'persons were' if count > 1 else 'person was'} asked for in one picture, and this engine "
                f"was built for {most} (--persons). {self._manifest.rebuild()} --persons {count}"
            )

    def _latent_shape(self, grid: Grid) -> tuple[int, int, int]:
        return (self._model.latent_channels, *grid.size(0))

    def noise(self, draft: Draft, sampler: Table, grid: Grid) -> NDArray[np.float32]:
        """(num_images, C, h, w) float32: z_T of its pictures, from the caller's own latents where given."""
        drawn, shape = draft.latents, self._latent_shape(grid)
        if drawn is None:
            drawn = np.stack([initial_noise(draft.seed + j, shape) for j in range(draft.request.num_images)])
        return drawn if sampler.init == 1 else np.float32(sampler.init) * drawn

    def work(self, draft: Draft, sampler: Table, grid: Grid, watch: Stopwatch) -> Work:
        """A work before the first stage that runs networks. watch: of the stages so far."""
        return Work(
            seed=draft.seed,
            pictures=draft.request.num_images,
            grid=grid,
            plan=self.planner.plan([draft], sampler, grid),
            scales=[setting.scale for setting in draft.settings],
            notes=draft.notes + self.planner.notes(draft, sampler),
            watch=watch,
        )

    # With networks

    def place_persons(self, work: Work, people: Sequence[PreparedPerson]) -> None:
        """The places of a work's persons, and their ID tokens."""
        work.persons, work.boxes = tuple(person.placed for person in people), self._face_cells(people)
        if self._config.id_input != "none":
            given = [person.id_tokens for person in people if person.id_tokens is not None]
            shape = 0, self._model.num_id_tokens, self._model.cross_attention_dim
            work.id_tokens = np.stack(given) if given else np.zeros(shape, np.float32)

    def embed_texts(self, work: Work) -> None:
        """The embeddings of its distinct texts."""
        model = self._model
        zeros = TextEmbedding.zeros(self._max_length, model.cross_attention_dim, model.pooled_dim)
        work.texts = [zeros if ids is None else self._encoders.embed(ids) for ids in work.plan.texts.distinct]

    def embed_times(self, work: Work) -> None:
        """Time + added embedding of the UNet, and of every branch that some step evaluates."""
        work.unet_emb = self._emb("unet", work, per_row=True)
        work.branch_embs = [
            self._emb(branch.name, work, branch.pooled == "per_row") if evaluated else None
            for branch, evaluated in zip(self.table, work.plan.evaluated, strict=True)
        ]

    def embed_conditions(self, work: Work, shown: Mapping[str, list[NDArray[np.float32]]]) -> None:
        """Z(c) of every branch that some step evaluates. shown: the drawings of each, by its name."""
        for branch, evaluated in zip(self.table, work.plan.evaluated, strict=True):
            if not evaluated:
                work.conditions.append(None)
                continue
            fed = self._backend.put(np.stack(shown[branch.name]), for_networks=True)
            found = self._backend.run(f"{branch.name}_condition", {branch.condition_input: fed})
            work.conditions.append(self._backend.keep(found["condition"]))

    def place_latents(self, work: Work, latents: NDArray[np.float32], previews: bool) -> None:
        """What the steps update. latents: (B, C, h, w) at the first step. previews: whether they predict the clean ones
        too."""

        def kept(array: NDArray[np.float32]) -> Tensor:
            return self._backend.keep(self._backend.put(array))

        (count, *shape), histories = latents.shape, work.plan.sampler.histories
        work.latents = kept(latents)
        if histories:
            work.histories = kept(np.zeros((count, histories, *shape), np.float32))
        if previews:
            work.preview = kept(np.zeros(latents.shape, np.float32))

    def _emb(self, name: str, work: Work, per_row: bool) -> NDArray[np.float32]:
        """(S, K, E), or (S, 1, E) without pooled text: a network's time + added embedding, all steps at once."""
        timesteps, grid = work.plan.sampler.timesteps.astype(np.float32), work.grid
        pooled = np.stack([text.pooled for text in work.texts])
        rows = pooled if per_row else np.zeros_like(pooled[:1])
        inputs = {"timestep": self._backend.put(np.repeat(timesteps, len(rows)))}
        if self._model.pooled_dim:
            time_ids = np.array([[grid.height, grid.width, 0, 0, grid.height, grid.width]], np.float32)
            inputs["pooled"] = self._backend.put(np.tile(rows, (len(timesteps), 1)), for_networks=True)
            inputs["time_ids"] = self._backend.put(time_ids.repeat(len(timesteps) * len(rows), axis=0))
        emb = self._backend.get(self._backend.run(f"{name}_time", inputs)["emb"])
        return emb.reshape(len(timesteps), len(rows), -1)

    def _face_cells(self, people: Sequence[PreparedPerson]) -> NDArray[np.int32]:
        """(N, L, 4): every person's face in cells of every level; zeros where no branch needs it."""
        levels = range(self._model.levels)
        cells = [
            [person.face_box.cells(level) if person.face_box else (0, 0, 0, 0) for level in levels] for person in people
        ]
        return np.array(cells, np.int32).reshape(-1, self._model.levels, 4)
