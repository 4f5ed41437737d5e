"""Everything of a batch that does not change over the steps: texts, row plans, noise, time and condition embeddings."""

from __future__ import annotations

import os
from collections.abc import Hashable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from ..backends import Backend, Tensor
from ..branches import tokens_input
from ..checks import own_array, whole
from ..errors import ShapeError
from ..manifest import Manifest
from ..persons.anchors import check_anchors
from ..persons.boxes import Grid, check_inside, snap_box
from ..persons.prepared import PreparedPerson
from ..request import OMITTED, Request
from .controls import branches_of, settings, with_images
from .ddim import DDIM, initial_noise
from .denoise import Batch, BranchTables
from .drafts import Draft, Plan, Texts
from .prompt import Prompts, TextEmbedding, TextEncoders
from .rows import (
    BranchRow,
    DecoderRow,
    EncoderRow,
    PictureRows,
    RowPlan,
    guidance_weights,
    in_window,
    plan_rows,
    steps_without_id,
)


class Prologue:
    """The stages before the loop. Those without a network come first and refuse impossible requests."""

    def __init__(self, manifest: Manifest, backend: Backend, share_rows: bool) -> None:
        self._manifest, self._backend, self._share_rows = manifest, backend, share_rows
        self._config, self._model, self.table = manifest.config, manifest.model, manifest.config.table
        self._ddim, self._constants = DDIM.of(manifest), manifest.constants
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

    def coefficients(self, num_inference_steps: int | None) -> NDArray[np.float64]:
        """(S, 2): A and B of every step; None: as many as the config says. Raises RequestError for an impossible S."""
        usual = self._config.num_inference_steps
        return self._ddim.coefficients(usual if num_inference_steps is None else num_inference_steps)

    def draft(self, request: Request, num_inference_steps: int, grid: Grid) -> Draft:
        """The request, checked before a face is searched. Raises RequestError, BoxError, ShapeError."""
        request = request.check()
        self._check_persons(len(request.persons))
        self._check_pictures(request.num_images, grid)
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
        self.plan([draft], num_inference_steps, grid)  # a request that is too large by itself fails alone
        return draft

    def groups(self, drafts: Mapping[int, Draft], num_inference_steps: int) -> list[dict[int, Draft]]:
        """Requests that may share the calls of a network, by their place, in the order of their first.

        Where ID tokens follow the text, the pictures of one call must have one number of tokens in every step: padding
        would change them. Elsewhere all requests are one group.
        """
        found: dict[Hashable, dict[int, Draft]] = {}
        for place, draft in drafts.items():
            key: Hashable = ()
            if self._config.unet_tokens == "text_and_id":
                switch = steps_without_id(num_inference_steps, self._ratio(draft.request), self._config.delay_rule)
                absent = switch if draft.request.persons and self._config.delayed_id == "absent" else 0
                key = len(draft.request.persons), absent
            found.setdefault(key, {})[place] = draft
        return list(found.values())

    def plan(self, drafts: Sequence[Draft], num_inference_steps: int, grid: Grid) -> Plan:
        """The rows of every step. Raises ShapeError for more pictures or rows than the engine was built for."""
        self._check_pictures(sum(draft.request.num_images for draft in drafts), grid)
        texts = Texts.distinct_of(draft.token_ids for draft in drafts)
        switches = [
            steps_without_id(num_inference_steps, self._ratio(draft.request), self._config.delay_rule)
            for draft in drafts
        ]
        known: dict[Hashable, RowPlan] = {}
        rows: list[RowPlan] = []
        for step in range(num_inference_steps):
            active = [self._active(draft, step, num_inference_steps) for draft in drafts]
            ids = [
                self._ids(draft, step < switch, evaluated)
                for switch, draft, evaluated in zip(switches, drafts, active, strict=True)
            ]
            key = tuple(active), tuple(ids)
            if key not in known:
                known[key] = self._rows(drafts, texts, active, ids)
                self._check_rows(known[key], grid)
            rows.append(known[key])
        plan = Plan(texts, rows)
        self._check_conditions(drafts, plan, grid)
        return plan

    def _check_persons(self, count: int) -> None:
        """Raises ShapeError if the IDs of so many persons are more tokens than the engine's networks take."""
        most = self._manifest.values["built_for"]["persons"]
        if self._config.unet_tokens == "text_and_id" and count > most:
            raise ShapeError(
                f"{count} {'persons were' if count > 1 else 'person was'} asked for in one picture, and this engine "
                f"was built for {most} (--persons). {self._manifest.rebuild()} --persons {count}"
            )

    def _check_conditions(self, drafts: Sequence[Draft], plan: Plan, grid: Grid) -> None:
        side = self._model.default_size
        for place, (branch, evaluated) in enumerate(zip(self.table, plan.evaluated, strict=True)):
            if evaluated:
                shown = [draft.request for draft in drafts if draft.settings[place].given]
                count = sum(len(request.persons) if branch.per == "person" else 1 for request in shown)
                size = (side, side) if branch.view == "face" else (grid.height, grid.width)
                shape = count, branch.channels, *size
                self._backend.check(f"{branch.name}_condition", {branch.condition_input: shape})

    def _active(self, draft: Draft, step: int, num_inference_steps: int) -> tuple[bool, ...]:
        """Whether each branch is evaluated for this request in this step. One of scale 0 is so only unshared."""
        return tuple(
            setting.given
            and (setting.scale != 0 or not self._share_rows)
            and in_window(step, num_inference_steps, setting.start, setting.end)
            for setting in draft.settings
        )

    def _ratio(self, request: Request) -> float | None:
        ratio = request.subject_conditioning_ratio
        return self._config.subject_conditioning_ratio if ratio is OMITTED else ratio

    def _ids(self, draft: Draft, delayed: bool, active: Sequence[bool]) -> tuple[bool, bool]:
        """Whether the UNet or an active branch brings the ID into this request's pictures, and whether rows of
        "text_and_id" lack ID tokens."""
        if not draft.request.persons:
            return False, False
        if delayed:
            return False, self._config.delayed_id == "absent"
        carried = [
            branch.tokens != "text" and evaluated and setting.scale != 0
            for branch, evaluated, setting in zip(self.table, active, draft.settings, strict=True)
        ]
        return self._config.unet_tokens != "text" or any(carried), False

    def _rows(
        self,
        drafts: Sequence[Draft],
        texts: Texts,
        active: Sequence[tuple[bool, ...]],
        ids: Sequence[tuple[bool, bool]],
    ) -> RowPlan:
        """ids: of `_ids`, for each request."""
        config, pictures, first = self._config, list[PictureRows](), 0
        for number, (draft, pair, evaluated, (with_id, absent)) in enumerate(
            zip(drafts, texts.of, active, ids, strict=True)
        ):
            request = draft.request
            weights = guidance_weights(
                config.guidance_scale if request.guidance_scale is None else request.guidance_scale,
                config.id_guidance_scale if request.id_guidance_scale is None else request.id_guidance_scale,
                with_id,
            )
            persons = tuple(range(first, first + len(request.persons)))
            pictures += [PictureRows(pair, persons, weights, evaluated, number, absent)] * request.num_images
            first += len(request.persons)
        return plan_rows(pictures, self.table, config.unet_tokens, self._share_rows)

    def _check_rows(self, plan: RowPlan, grid: Grid) -> None:
        check, model = self._backend.check, self._model

        def tokens(rows: Sequence[EncoderRow | DecoderRow | BranchRow]) -> tuple[int, int, int]:
            read = rows[0].tokens
            text = 0 if read.text is None else self._max_length
            return len(rows), text + len(read.ids) * model.num_id_tokens, model.cross_attention_dim

        check("unet_encoder", {"latents": (len(plan.encoder), model.latent_channels, *grid.size(0))})
        check("unet_decoder", {tokens_input(self._config.unet_tokens): tokens(plan.decoder)})
        for branch, rows in zip(self.table, plan.branches, strict=True):
            if rows.rows:
                check(f"{branch.name}_branch", {branch.tokens_input: tokens(rows.rows)})

    def _check_pictures(self, count: int, grid: Grid) -> None:
        if count:
            self._backend.check("unet_encoder", {"latents": (count, *self._latent_shape(grid))})

    def _latent_shape(self, grid: Grid) -> tuple[int, int, int]:
        return (self._model.latent_channels, *grid.size(0))

    def noise(self, draft: Draft, grid: Grid) -> NDArray[np.float32]:
        """(num_images, C, h, w) float32: z_T of its pictures; the caller's own latents where given."""
        if draft.latents is not None:
            return draft.latents
        shape = self._latent_shape(grid)
        return np.stack([initial_noise(draft.seed + j, shape) for j in range(draft.request.num_images)])

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
        coefficients: NDArray[np.float64],
        grid: Grid,
    ) -> Batch:
        """All that the loop reads. people: of all requests. unet_emb, branches: of `time_tables`, `branch_tables`."""
        noise = np.concatenate([self.noise(draft, grid) for draft in drafts])
        put = self._backend.put
        latents, step, of_steps = put(noise), put(np.zeros(len(noise), np.int32)), put(coefficients)
        prompt_embeds, id_tokens, token_rows = self.tokens(texts, people)
        return Batch(
            latents=latents,
            step=step,
            plans=plan.rows,
            coefficients=of_steps,
            prompt_embeds=prompt_embeds,
            unet_tokens=self._config.unet_tokens,
            unet_emb=unet_emb,
            table=self.table,
            branches=branches,
            id_tokens=id_tokens,
            token_rows=token_rows,
            boxes=self.face_cells(people),
        )

    def _emb(self, name: str, plan: Plan, grid: Grid, texts: Sequence[TextEmbedding], per_row: bool) -> Tensor:
        """(S, K, E), or (S, 1, E) without pooled text: a network's time + added embedding, all steps at once."""
        timesteps = self._ddim.timesteps(len(plan.rows)).astype(np.float32)
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
