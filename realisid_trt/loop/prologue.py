"""Everything of a batch that does not change over the steps: texts, row plans, noise, time and condition embeddings."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..backends import Backend, Tensor
from ..checks import own_array, whole
from ..errors import ShapeError
from ..manifest import Manifest
from ..persons.boxes import Grid, check_inside, snap_box
from ..persons.conditions import location_mask
from ..persons.people import PreparedPerson
from ..request import OMITTED, Request
from .ddim import DDIM, initial_noise
from .prompt import Prompts, TextEmbedding, TextEncoders, TokenIds
from .rows import PictureRows, RowPlan, guidance_weights, plan_rows, steps_without_id


@dataclass(frozen=True)
class Texts:
    """The distinct texts of a batch, None for zeros; and the numbers of each request's negative prompt and prompt."""

    distinct: tuple[TokenIds | None, ...]
    of: tuple[tuple[int, int], ...]

    @classmethod
    def distinct_of(cls, pairs: Iterable[tuple[TokenIds | None, TokenIds]]) -> Texts:
        """pairs: the token ids of each request's negative prompt and prompt."""
        index: dict[TokenIds | None, int] = {}
        of = [
            (index.setdefault(negative, len(index)), index.setdefault(prompt, len(index))) for negative, prompt in pairs
        ]
        return cls(tuple(index), tuple(of))


@dataclass(frozen=True, eq=False)
class Draft:
    """A checked request.

    request:   with plain Python numbers. seed: the request's, or a random one.
    token_ids: of the negative prompt, None for zeros, and of the prompt.
    latents:   (num_images, C, h, w) float32 to start from, or None for noise.
    """

    request: Request
    seed: int
    token_ids: tuple[TokenIds | None, TokenIds]
    latents: NDArray[np.float32] | None

    @property
    def scales(self) -> list[tuple[float, float]]:
        """local_scale and global_scale of each picture."""
        return [(self.request.local_scale, self.request.global_scale)] * self.request.num_images


@dataclass(frozen=True)
class Plan:
    """The distinct texts of a batch, and the row plan of every step; equal plans are one object."""

    texts: Texts
    rows: list[RowPlan]

    @property
    def branches(self) -> tuple[str, ...]:
        """The branches that some step evaluates, of "local" and "global"."""
        evaluated = {
            "local": any(plan.local_branch.rows for plan in self.rows),
            "global": any(plan.global_branch.rows for plan in self.rows),
        }
        return tuple(name for name, runs in evaluated.items() if runs)


class Prologue:
    """The stages before the loop. Those without a network come first and refuse impossible requests."""

    def __init__(self, manifest: Manifest, backend: Backend, share_rows: bool) -> None:
        self._backend, self._share_rows = backend, share_rows
        self._config, self._model = manifest.config, manifest.model
        self._ddim = DDIM.of(manifest)
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

    def coefficients(self, num_inference_steps: int) -> NDArray[np.float64]:
        """(S, 2): A and B of every step. Raises RequestError for an impossible number of steps."""
        return self._ddim.coefficients(num_inference_steps)

    def draft(self, request: Request, num_inference_steps: int, grid: Grid) -> Draft:
        """The request, checked before a face is searched. Raises RequestError, BoxError, ShapeError."""
        request = request.check()
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
        draft = Draft(request, seed, (negative, self._prompts.encode(request.prompt)), latents)
        self.plan([draft], num_inference_steps, grid)  # a request that is too large by itself fails alone
        return draft

    def plan(self, drafts: Sequence[Draft], num_inference_steps: int, grid: Grid) -> Plan:
        """The rows of every step. Raises ShapeError for more pictures or rows than the engine was built for."""
        self._check_pictures(sum(draft.request.num_images for draft in drafts), grid)
        texts = Texts.distinct_of(draft.token_ids for draft in drafts)
        requests, known, rows = [draft.request for draft in drafts], dict[tuple[bool, ...], RowPlan](), list[RowPlan]()
        switches = [
            steps_without_id(
                num_inference_steps,
                self._config.subject_conditioning_ratio
                if request.subject_conditioning_ratio is OMITTED
                else request.subject_conditioning_ratio,
            )
            for request in requests
        ]
        for step in range(num_inference_steps):
            with_id = tuple(_has_id(r) and step >= switch for r, switch in zip(requests, switches, strict=True))
            if with_id not in known:
                known[with_id] = self._rows(requests, texts, with_id)
                self._check_rows(known[with_id], grid)
            rows.append(known[with_id])
        return Plan(texts, rows)

    def _rows(self, requests: Sequence[Request], texts: Texts, with_id: Sequence[bool]) -> RowPlan:
        config, pictures, first = self._config, list[PictureRows](), 0
        for request, pair, has_id in zip(requests, texts.of, with_id, strict=True):
            weights = guidance_weights(
                config.guidance_scale if request.guidance_scale is None else request.guidance_scale,
                config.id_guidance_scale if request.id_guidance_scale is None else request.id_guidance_scale,
                has_id,
            )
            persons = tuple(range(first, first + len(request.persons)))
            evaluated = request.local_scale != 0, request.global_scale != 0
            pictures += [PictureRows(pair, persons, weights, evaluated)] * request.num_images
            first += len(request.persons)
        return plan_rows(pictures, config.branch_pooled_text == "per_row", self._share_rows)

    def _check_rows(self, plan: RowPlan, grid: Grid) -> None:
        check, model = self._backend.check, self._model
        check("unet_encoder", {"latents": (len(plan.encoder), model.latent_channels, *grid.size(0))})
        check("unet_decoder", {"prompt_embeds": (len(plan.decoder), self._max_length, model.cross_attention_dim)})
        for name, branch in (("local_branch", plan.local_branch), ("global_branch", plan.global_branch)):
            if branch.rows:
                check(name, {"id_tokens": (len(branch.rows), model.num_id_tokens, model.cross_attention_dim)})

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

    def time_tables(
        self, num_inference_steps: int, grid: Grid, texts: Sequence[TextEmbedding], branches: Sequence[str]
    ) -> dict[str, Tensor]:
        """unet_emb, local_emb, global_emb: (S, K, E), each network's time + added embedding, all steps at once.

        branches: those that are evaluated, of "local" and "global"; the tables of others are None.
        """
        timesteps = self._ddim.timesteps(num_inference_steps).astype(np.float32)
        pooled = np.stack([text.pooled for text in texts])
        per_row = self._config.branch_pooled_text == "per_row"
        tables: dict[str, Tensor] = {"local_emb": None, "global_emb": None}
        for name in ("unet", *branches):
            rows = pooled if name == "unet" or per_row else np.zeros_like(pooled[:1])
            inputs = {"timestep": self._backend.put(np.repeat(timesteps, len(rows)))}
            if self._model.pooled_dim:
                time_ids = np.array([[grid.height, grid.width, 0, 0, grid.height, grid.width]], np.float32)
                inputs["pooled"] = self._backend.put(np.tile(rows, (len(timesteps), 1)), for_networks=True)
                inputs["time_ids"] = self._backend.put(time_ids.repeat(len(timesteps) * len(rows), axis=0))
            emb = self._backend.get(self._backend.run(f"{name}_time", inputs)["emb"])
            emb = emb.reshape(len(timesteps), len(rows), -1)
            tables[f"{name}_emb"] = self._backend.put(emb, for_networks=True)
        return tables

    def embed_conditions(
        self, people: Sequence[PreparedPerson], grid: Grid, branches: Sequence[str]
    ) -> dict[str, Tensor]:
        """local_condition and global_condition: Z(c_p&e) and Z(c_loc) of every person; None for a branch that is not
        evaluated."""
        conditions: dict[str, Tensor] = {"local_condition": None, "global_condition": None}
        run, put = self._backend.run, self._backend.put
        if "local" in branches:
            poses = np.stack([person.pose_image for person in people])
            inputs = {"pose_image": put(poses, for_networks=True)}
            conditions["local_condition"] = run("local_condition", inputs)["condition"]
        if "global" in branches:
            masks = np.stack([location_mask(person.face_box.px, grid.height, grid.width) for person in people])
            inputs = {"location_mask": put(masks, for_networks=True)}
            conditions["global_condition"] = run("global_condition", inputs)["condition"]
        return conditions

    def face_cells(self, people: Sequence[PreparedPerson]) -> NDArray[np.int32]:
        """(P, L, 4): every person's face in cells of every level."""
        levels = range(self._model.levels)
        return np.array([[person.face_box.cells(level) for level in levels] for person in people], np.int32)


def _has_id(request: Request) -> bool:
    """Whether a branch carries the ID into the picture."""
    return bool(request.persons) and (request.local_scale != 0 or request.global_scale != 0)
