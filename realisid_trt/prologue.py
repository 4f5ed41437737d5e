"""Everything of a batch that does not change over the steps: texts, noise, row plans, time and condition embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .backends import Backend
from .boxes import Grid
from .conditions import location_mask
from .ddim import initial_noise
from .denoise import Batch
from .errors import ShapeError
from .manifest import Manifest
from .people import Conditions
from .picture import check_finite
from .prompt import Prompts, TextEmbedding, TextEncoders, TokenIds
from .request import OMITTED, Request
from .rows import PictureRows, RowPlan, guidance_weights, plan_rows, steps_without_id
from .stopwatch import Stopwatch

Texts = Sequence[tuple[int, int]]  # of each request: its negative prompt and prompt among the distinct texts


class Prologue:
    """Makes the `Batch` that the loop runs on."""

    def __init__(self, manifest: Manifest, backend: Backend, share_rows: bool) -> None:
        self._backend, self._share_rows = backend, share_rows
        self._config, self._model = manifest.config, manifest.model
        self._ddim = manifest.ddim
        self._null_id_tokens = manifest.constants["null_id_tokens"]
        self._prompts = Prompts(manifest.path, self._model.tokenizers)
        self._texts = TextEncoders(backend, tuple(self._model.tokenizers), self._model.pooled_dim)
        self._max_length = next(iter(self._model.tokenizers.values())).max_length

    def grid(self, height: int | None, width: int | None) -> Grid:
        """The grid of pictures of this size. Raises ShapeError for a size the engine does not make."""
        model = self._model
        height, width = (model.default_size if side is None else side for side in (height, width))
        grid = Grid(
            height, width, model.vae_scale_factor, model.levels, self._config.box_snap or model.vae_scale_factor
        )
        for name, side in (("height", height), ("width", width)):
            if not isinstance(side, (int, np.integer)) or isinstance(side, bool) or side < 1 or side % grid.multiple:
                raise ShapeError(
                    f"{name} is {side!r}, expected a multiple of {grid.multiple} px, one cell at the coarsest level."
                )
        self._backend.check("unet_encoder", {"latents": (1, model.latent_channels, *grid.size(0))})
        return grid

    def batch(
        self,
        requests: Sequence[Request],
        people: Sequence[Conditions],
        seeds: Sequence[int],
        num_inference_steps: int,
        grid: Grid,
        watch: Stopwatch,
    ) -> Batch:
        """The batch of all pictures of all requests.

        people: every request's persons, one request after the other.
        seeds:  one per request.
        """
        put, model = self._backend.put, self._model
        coefficients = self._ddim.coefficients(num_inference_steps)
        noise = np.concatenate([self._noise(*pair, grid) for pair in zip(requests, seeds, strict=True)])
        with watch("text"):
            texts, text_of = self._embed_texts(requests)
        plans = self._plan(requests, text_of, num_inference_steps)
        self._check_rows(plans, noise.shape)
        with watch("time"):
            time_tables = self._time_tables(num_inference_steps, grid, texts)
        with watch("conditions"):
            local_condition, global_condition = self._embed_conditions(people, grid)
        scales = [
            (request.local_scale, request.global_scale) for request in requests for _ in range(request.num_images)
        ]
        cells = [[person.face_box.cells(level) for level in range(model.levels)] for person in people]
        return Batch(
            latents=put(noise),
            plans=plans,
            coefficients=coefficients,
            prompt_embeds=put(np.stack([text.prompt_embeds for text in texts])),
            **time_tables,
            id_tokens=put(np.stack([person.id_tokens for person in people] + [self._null_id_tokens])),
            local_condition=local_condition,
            global_condition=global_condition,
            boxes=np.array(cells, np.int32),
            scales=np.array(scales, np.float32),
            levels=model.residual_levels,
            canvas=model.sample_size,
            relocate_mode=self._config.relocate_mode,
            overlap=self._config.overlap,
        )

    def _noise(self, request: Request, seed: int, grid: Grid) -> NDArray[np.float32]:
        """(num_images, C, h, w) float32: z_T."""
        shape = (self._model.latent_channels, *grid.size(0))
        if request.latents is None:
            return np.stack([initial_noise(seed + j, shape) for j in range(request.num_images)])
        latents = np.array(request.latents, np.float32)
        if latents.shape != (request.num_images, *shape):
            raise ShapeError(
                f"latents is {latents.shape}, expected {(request.num_images, *shape)} for this picture size."
            )
        check_finite(latents, "latents")
        return latents

    def _embed_texts(self, requests: Sequence[Request]) -> tuple[list[TextEmbedding], Texts]:
        """The distinct texts of the batch, and who reads which."""
        index: dict[TokenIds | None, int] = {}
        text_of = []
        for request in requests:
            negative_prompt = request.negative_prompt
            if negative_prompt is None and not self._config.force_zeros_for_empty_prompt:
                negative_prompt = ""
            negative = None if negative_prompt is None else self._prompts.encode(negative_prompt, "negative_prompt")
            prompt = self._prompts.encode(request.prompt)
            text_of.append((index.setdefault(negative, len(index)), index.setdefault(prompt, len(index))))
        zeros = TextEmbedding.zeros(self._max_length, self._model.cross_attention_dim, self._model.pooled_dim)
        return [zeros if ids is None else self._texts.embed(ids) for ids in index], text_of

    def _plan(self, requests: Sequence[Request], text_of: Texts, num_inference_steps: int) -> list[RowPlan]:
        """The row plan of every step; equal plans are one object."""
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
                pictures, first = [], 0
                for request, texts, has_id in zip(requests, text_of, with_id, strict=True):
                    weights = guidance_weights(
                        config.guidance_scale if request.guidance_scale is None else request.guidance_scale,
                        config.id_guidance_scale if request.id_guidance_scale is None else request.id_guidance_scale,
                        has_id,
                    )
                    persons = tuple(range(first, first + len(request.persons)))
                    pictures += [PictureRows(texts, persons, weights)] * request.num_images
                    first += len(request.persons)
                known[with_id] = plan_rows(pictures, config.branch_pooled_text == "per_row", self._share_rows)
            plans.append(known[with_id])
        return plans

    def _check_rows(self, plans: Sequence[RowPlan], latents: tuple[int, ...]) -> None:
        """Raises ShapeError if a step would need more rows than the engine was built for."""
        check, canvas = self._backend.check, self._model.sample_size
        text_shape = (self._max_length, self._model.cross_attention_dim)
        for plan in plans:
            check("unet_encoder", {"latents": (len(plan.encoder), *latents[1:])})
            check("unet_decoder", {"prompt_embeds": (len(plan.decoder), *text_shape)})
            if plan.branch:
                check("local_branch", {"latents": (len(plan.branch), latents[1], canvas, canvas)})

    def _time_tables(
        self, num_inference_steps: int, grid: Grid, texts: Sequence[TextEmbedding]
    ) -> dict[str, NDArray[np.float32]]:
        """unet_emb, local_emb, global_emb: (S, K, E), each network's time + added embedding, all steps at once."""
        timesteps = self._ddim.timesteps(num_inference_steps).astype(np.float32)
        pooled = np.stack([text.pooled for text in texts])
        per_row = self._config.branch_pooled_text == "per_row"
        tables = {}
        for name in ("unet", "local", "global"):
            rows = pooled if name == "unet" or per_row else np.zeros_like(pooled[:1])
            inputs = {"timestep": np.repeat(timesteps, len(rows))}
            if self._model.pooled_dim:
                time_ids = np.array([[grid.height, grid.width, 0, 0, grid.height, grid.width]], np.float32)
                inputs["pooled"] = np.tile(rows, (len(timesteps), 1))
                inputs["time_ids"] = time_ids.repeat(len(timesteps) * len(rows), axis=0)
            fed = {port: self._backend.put(array) for port, array in inputs.items()}
            emb = self._backend.get(self._backend.run(f"{name}_time", fed)["emb"])
            tables[f"{name}_emb"] = emb.reshape(len(timesteps), len(rows), -1)
        return tables

    def _embed_conditions(self, people: Sequence[Conditions], grid: Grid) -> tuple[Any, Any]:
        """Z(c_p&e) and Z(c_loc) of every person; nothing without persons."""
        if not people:
            return None, None
        poses = np.stack([person.pose_image for person in people])
        masks = np.stack([location_mask(person.face_box.px, grid.height, grid.width) for person in people])
        local = self._backend.run("local_condition", {"pose_image": self._backend.put(poses)})
        whole = self._backend.run("global_condition", {"location_mask": self._backend.put(masks)})
        return local["condition"], whole["condition"]
