"""Everything of a batch that does not change over the steps: texts, row plans, noise, time and condition embeddings."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
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
from .denoise import Batch, BranchTables
from .drafts import Draft, Plan, Texts
from .noise import initial_noise, step_noise
from .planning import Planner
from .prompt import Prompts, TextEmbedding, TextEncoders
from .sampler_tables import Table
from .samplers import NoiseSchedule, Sampler, table_of


class Prologue:
    """The stages before the loop. Those without a network come first and refuse impossible requests."""

    def __init__(self, manifest: Manifest, backend: Backend, share_rows: bool) -> None:
        self._manifest, self._backend = manifest, backend
        self.planner = Planner(manifest, backend, share_rows)
        self._config, self._model, self.table = manifest.config, manifest.model, manifest.config.table
        self._schedule, self._constants = NoiseSchedule.of(manifest), manifest.constants
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

    # With networks

    def embed_texts(self, texts: Texts) -> list[TextEmbedding]:
        """The embeddings of the distinct texts."""
        model = self._model
        zeros = TextEmbedding.zeros(self._max_length, model.cross_attention_dim, model.pooled_dim)
        return [zeros if ids is None else self._encoders.embed(ids) for ids in texts.distinct]

    def time_tables(self, plan: Plan, grid: Grid, texts: Sequence[TextEmbedding]) -> tuple[Tensor, list[Tensor | None]]:
        """(S, K, E) or (S, 1, E): time + added embedding of the UNet, and of every branch; None for one that no step
        evaluates."""
        branches = [
            self._emb(branch.name, plan, grid, texts, branch.pooled == "per_row") if evaluated else None
            for branch, evaluated in zip(self.table, plan.evaluated, strict=True)
        ]
        return self._emb("unet", plan, grid, texts, per_row=True), branches

    def embed_conditions(
        self, shown: Sequence[Mapping[str, list[NDArray[np.float32]]]], persons: Sequence[int], plan: Plan
    ) -> list[tuple[Tensor, NDArray[np.int32]] | None]:
        """`condition` and `condition_of` of every branch's BranchTables; None for one that no step evaluates.

        shown: the drawings of each request, by the branch's name. persons: how many each request has.
        """
        found: list[tuple[Tensor, NDArray[np.int32]] | None] = []
        for branch, evaluated in zip(self.table, plan.evaluated, strict=True):
            if not evaluated:
                found.append(None)
                continue
            drawings = np.stack([drawing for each in shown for drawing in each.get(branch.name, ())])
            fed = {branch.condition_input: self._backend.put(drawings, for_networks=True)}
            condition = self._backend.run(f"{branch.name}_condition", fed)["condition"]
            subjects = persons if branch.per == "person" else [1] * len(shown)
            drawn = np.repeat([branch.name in each for each in shown], subjects)
            found.append((condition, np.where(drawn, np.cumsum(drawn) - 1, -1).astype(np.int32)))
        return found

    def branch_tables(
        self,
        drafts: Sequence[Draft],
        embs: Sequence[Tensor | None],
        conditions: Sequence[tuple[Tensor, NDArray[np.int32]] | None],
    ) -> list[BranchTables | None]:
        """What every branch of a batch reads. embs: of `time_tables`. conditions: of `embed_conditions`."""
        found: list[BranchTables | None] = []
        for place, (emb, condition) in enumerate(zip(embs, conditions, strict=True)):
            scales = [draft.settings[place].scale for draft in drafts for _ in range(draft.request.num_images)]
            found.append(condition and BranchTables(emb, *condition, np.array(scales, np.float32)))
        return found

    def batch(
        self,
        drafts: Sequence[Draft],
        people: Sequence[PreparedPerson],
        plan: Plan,
        texts: Sequence[TextEmbedding],
        unet_emb: Tensor,
        branches: list[BranchTables | None],
        grid: Grid,
    ) -> Batch:
        """All that the loop reads. people: of all requests. unet_emb, branches: of `time_tables`, `branch_tables`."""
        noise = np.concatenate([self.noise(draft, plan.sampler, grid) for draft in drafts])
        stepped = self.stepped(noise, plan.sampler)
        prompt_embeds, id_tokens, token_rows = self.tokens(texts, people)
        return Batch(
            **stepped,
            step_noise=self._step_noise(drafts, plan.sampler, grid),
            plans=plan.rows,
            prompt_embeds=prompt_embeds,
            unet_tokens=self._config.unet_tokens,
            unet_emb=unet_emb,
            table=self.table,
            branches=branches,
            id_tokens=id_tokens,
            token_rows=token_rows,
            boxes=self.face_cells(people),
        )

    def stepped(self, latents: NDArray[np.float32], sampler: Table) -> dict[str, Tensor | None]:
        """`latents`, `step`, `matrix`, `histories` and `noise` of a Batch, before the first step.

        latents: (B, C, h, w). Histories that the sampler does not keep and noise that it does not draw are None.
        """
        put, (count, *shape), kept = self._backend.put, latents.shape, sampler.histories
        return {
            "latents": put(latents),
            "step": put(np.zeros(count, np.int32)),
            "matrix": put(sampler.matrix),
            "histories": put(np.zeros((count, kept, *shape), np.float32)) if kept else None,
            "noise": put(np.zeros((count, *shape), np.float32)) if sampler.draws.any() else None,
        }

    def _step_noise(
        self, drafts: Sequence[Draft], sampler: Table, grid: Grid
    ) -> Callable[[int], NDArray[np.float32] | None]:
        """`step_noise` of a Batch: every picture's is drawn from its seed."""
        draws, rows, shape = sampler.draws, sampler.row_of, self._latent_shape(grid)
        seeds = [draft.seed + j for draft in drafts for j in range(draft.request.num_images)]
        return lambda at: np.stack([step_noise(seed, rows[at], shape) for seed in seeds]) if draws[at] else None

    def _emb(self, name: str, plan: Plan, grid: Grid, texts: Sequence[TextEmbedding], per_row: bool) -> Tensor:
        """(S, K, E), or (S, 1, E) without pooled text: a network's time + added embedding, all steps at once."""
        timesteps = plan.sampler.timesteps.astype(np.float32)
        pooled = np.stack([text.pooled for text in texts])
        rows = pooled if per_row else np.zeros_like(pooled[:1])
        inputs = {"timestep": self._backend.put(np.repeat(timesteps, len(rows)))}
        if self._model.pooled_dim:
            time_ids = np.array([[grid.height, grid.width, 0, 0, grid.height, grid.width]], np.float32)
            inputs["pooled"] = self._backend.put(np.tile(rows, (len(timesteps), 1)), for_networks=True)
            inputs["time_ids"] = self._backend.put(time_ids.repeat(len(timesteps) * len(rows), axis=0))
        emb = self._backend.get(self._backend.run(f"{name}_time", inputs)["emb"])
        return self._backend.put(emb.reshape(len(timesteps), len(rows), -1), for_networks=True)

    def tokens(
        self, texts: Sequence[TextEmbedding], people: Sequence[PreparedPerson]
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """`prompt_embeds`, `id_tokens` and `token_rows` of a Batch."""
        put, prompt_embeds = self._backend.put, np.stack([text.prompt_embeds for text in texts])
        text_tokens = put(prompt_embeds, for_networks=True)
        if self._config.id_input == "none":
            return text_tokens, None, None
        given = [person.id_tokens for person in people if person.id_tokens is not None]
        ids = np.stack([self._constants["null_id_tokens"], *given])
        id_tokens = put(ids, for_networks=True)
        if self._config.unet_tokens == "text":
            return text_tokens, id_tokens, None
        width = self._model.cross_attention_dim
        rows = np.concatenate([prompt_embeds.reshape(-1, width), ids.reshape(-1, width)])
        return text_tokens, id_tokens, put(rows, for_networks=True)

    def face_cells(self, people: Sequence[PreparedPerson]) -> NDArray[np.int32]:
        """(P, L, 4): every person's face in cells of every level; zeros where no branch needs it."""
        levels = range(self._model.levels)
        cells = [
            [person.face_box.cells(level) if person.face_box else (0, 0, 0, 0) for level in levels] for person in people
        ]
        return np.array(cells, np.int32).reshape(-1, self._model.levels, 4)

    @staticmethod
    def by_request(pictures: NDArray[np.float32], drafts: Mapping[int, Draft]) -> dict[int, NDArray[np.float32]]:
        """The pictures of each request of a batch. drafts: by the request's place."""
        ends = np.cumsum([draft.request.num_images for draft in drafts.values()])
        return dict(zip(drafts, np.split(pictures, ends[:-1]), strict=True))
