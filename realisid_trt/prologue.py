"""Everything of a batch that does not change over the steps: texts, row plans, noise, time and condition embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .backends import Backend, Tensor
from .boxes import Grid, snap_box
from .checks import is_whole, own_array
from .conditions import location_mask
from .ddim import initial_noise
from .errors import ShapeError
from .manifest import Manifest
from .people import PreparedPerson
from .prompt import Prompts, TextEmbedding, TextEncoders, TokenIds
from .request import OMITTED, Request
from .rows import PictureRows, RowPlan, guidance_weights, plan_rows, steps_without_id


@dataclass(frozen=True)
class Texts:
    """The distinct texts of a batch, None for zeros; and of each request its negative prompt and prompt among them."""

    distinct: tuple[TokenIds | None, ...]
    of: tuple[tuple[int, int], ...]


class Prologue:
    """The stages before the loop. Those without a network come first and refuse what cannot be made."""

    def __init__(self, manifest: Manifest, backend: Backend, share_rows: bool) -> None:
        self._backend, self._share_rows = backend, share_rows
        self._config, self._model = manifest.config, manifest.model
        self._ddim = manifest.ddim
        self._prompts = Prompts(manifest.path, self._model.tokenizers)
        self._encoders = TextEncoders(backend, tuple(self._model.tokenizers), self._model.pooled_dim)
        self._max_length = next(iter(self._model.tokenizers.values())).max_length

    # Without networks

    def grid(self, height: int | None, width: int | None) -> Grid:
        """The grid of pictures of this size. Raises ShapeError for a size the engine does not make."""
        model = self._model
        height, width = (model.default_size if side is None else side for side in (height, width))
        snap = self._config.box_snap or model.vae_scale_factor
        grid = Grid(height, width, model.vae_scale_factor, model.levels, snap)
        for name, side in (("height", height), ("width", width)):
            if not is_whole(side) or side < 1 or side % grid.multiple:
                raise ShapeError(
                    f"{name} is {side!r}, expected a multiple of {grid.multiple} px, one cell at the coarsest level."
                )
        self._backend.check("unet_encoder", {"latents": (1, model.latent_channels, *grid.size(0))})
        return grid

    def coefficients(self, num_inference_steps: int) -> NDArray[np.float64]:
        """(S, 2): A and B of every step. Raises RequestError for an impossible number of steps."""
        return self._ddim.coefficients(num_inference_steps)

    def texts(self, requests: Sequence[Request]) -> Texts:
        """Token ids of every prompt. Raises RequestError for what is no text."""
        index: dict[TokenIds | None, int] = {}
        of = []
        for request in requests:
            negative_prompt = request.negative_prompt
            if negative_prompt is None and not self._config.force_zeros_for_empty_prompt:
                negative_prompt = ""
            negative = None if negative_prompt is None else self._prompts.encode(negative_prompt, "negative_prompt")
            prompt = self._prompts.encode(request.prompt)
            of.append((index.setdefault(negative, len(index)), index.setdefault(prompt, len(index))))
        return Texts(tuple(index), tuple(of))

    def plans(self, requests: Sequence[Request], texts: Texts, num_inference_steps: int, grid: Grid) -> list[RowPlan]:
        """The row plan of every step; equal plans are one object. Raises ShapeError for more rows than were built."""
        config, known = self._config, dict[tuple[bool, ...], RowPlan]()
        switches = [
            steps_without_id(
                num_inference_steps,
                config.subject_conditioning_ratio
                if request.subject_conditioning_ratio is OMITTED
                else request.subject_conditioning_ratio,
            )
            for request in requests
        ]
        plans = []
        for step in range(num_inference_steps):
            with_id = tuple(bool(r.persons) and step >= switch for r, switch in zip(requests, switches, strict=True))
            if with_id not in known:
                known[with_id] = self._plan(requests, texts, with_id)
                self._check_rows(known[with_id], grid)
            plans.append(known[with_id])
        return plans

    def _plan(self, requests: Sequence[Request], texts: Texts, with_id: Sequence[bool]) -> RowPlan:
        config, pictures, first = self._config, list[PictureRows](), 0
        for request, pair, has_id in zip(requests, texts.of, with_id, strict=True):
            weights = guidance_weights(
                config.guidance_scale if request.guidance_scale is None else request.guidance_scale,
                config.id_guidance_scale if request.id_guidance_scale is None else request.id_guidance_scale,
                has_id,
            )
            persons = tuple(range(first, first + len(request.persons)))
            pictures += [PictureRows(pair, persons, weights)] * request.num_images
            first += len(request.persons)
        return plan_rows(pictures, config.branch_pooled_text == "per_row", self._share_rows)

    def _check_rows(self, plan: RowPlan, grid: Grid) -> None:
        check, model = self._backend.check, self._model
        check("unet_encoder", {"latents": (len(plan.encoder), model.latent_channels, *grid.size(0))})
        check("unet_decoder", {"prompt_embeds": (len(plan.decoder), self._max_length, model.cross_attention_dim)})
        if plan.branch:
            check("local_branch", {"id_tokens": (len(plan.branch), model.num_id_tokens, model.cross_attention_dim)})

    def check_boxes(self, requests: Sequence[Request], grid: Grid) -> None:
        """Raises BoxError for a box that cannot be honoured, before anybody is looked for in a photo."""
        for request in requests:
            for person in request.persons:
                if person.box is not None:
                    snap_box(person.box, grid)

    def noise(self, requests: Sequence[Request], seeds: Sequence[int], grid: Grid) -> NDArray[np.float32]:
        """(B, C, h, w) float32: z_T of every picture; the caller's own latents where given."""
        shape = (self._model.latent_channels, *grid.size(0))
        noise = []
        for request, seed in zip(requests, seeds, strict=True):
            if request.latents is not None:
                noise.append(own_array(request.latents, (request.num_images, *shape), "latents"))
            else:
                noise += [initial_noise(seed + j, shape)[None] for j in range(request.num_images)]
        return np.concatenate(noise)

    # With networks

    def embed_texts(self, texts: Texts) -> list[TextEmbedding]:
        """The embeddings of the distinct texts."""
        model = self._model
        zeros = TextEmbedding.zeros(self._max_length, model.cross_attention_dim, model.pooled_dim)
        return [zeros if ids is None else self._encoders.embed(ids) for ids in texts.distinct]

    def time_tables(
        self, num_inference_steps: int, grid: Grid, texts: Sequence[TextEmbedding], with_branches: bool
    ) -> dict[str, Tensor]:
        """unet_emb, local_emb, global_emb: (S, K, E), each network's time + added embedding, all steps at once."""
        timesteps = self._ddim.timesteps(num_inference_steps).astype(np.float32)
        pooled = np.stack([text.pooled for text in texts])
        per_row = self._config.branch_pooled_text == "per_row"
        tables: dict[str, Tensor] = {"local_emb": None, "global_emb": None}
        for name in ("unet", "local", "global") if with_branches else ("unet",):
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

    def embed_conditions(self, people: Sequence[PreparedPerson], grid: Grid) -> dict[str, Tensor]:
        """local_condition and global_condition: Z(c_p&e) and Z(c_loc) of every person; None without persons."""
        if not people:
            return {"local_condition": None, "global_condition": None}
        poses = np.stack([person.pose_image for person in people])
        masks = np.stack([location_mask(person.face_box.px, grid.height, grid.width) for person in people])
        run, put = self._backend.run, self._backend.put
        return {
            "local_condition": run("local_condition", {"pose_image": put(poses, for_networks=True)})["condition"],
            "global_condition": run("global_condition", {"location_mask": put(masks, for_networks=True)})["condition"],
        }

    def face_cells(self, people: Sequence[PreparedPerson]) -> NDArray[np.int32]:
        """(P, L, 4): every person's face in cells of every level."""
        levels = range(self._model.levels)
        return np.array([[person.face_box.cells(level) for level in levels] for person in people], np.int32)
