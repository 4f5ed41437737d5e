"""The loop: crop_upsample → branches → relocate_merge → decoder → guide_step, thirty times.

Everything that does not change over the steps was computed before (`Batch`); everything that changes with the row plan
is gathered once per phase (`_Phase`): a request with a delayed ID has two phases.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .backends import Backend, Tensor
from .rows import RowPlan, phases

# What a step runs, in order, as the backend names it.
LOOP = (
    "crop_upsample", "local_branch", "global_branch", "unet_encoder", "relocate_merge", "unet_decoder", "guide_step",
)  # fmt: skip


@dataclass(eq=False)
class Batch:
    """B pictures of one size and number of steps, their K distinct texts and P persons.

    latents:          (B, C, h, w) float32, updated in place.
    plans:            the row plan of each of the S steps; steps with the same plan hold the same object.
    coefficients:     (S, 2) float64, A and B of DDIM.
    prompt_embeds:    (K, T, D).
    unet_emb:         (S, K, E) float32: time + added conditions of every step and text.
    local_emb, global_emb: (S, K, E), or (S, 1, E) when the branches see no text.
    id_tokens:        (P + 1, T, D): every person's, the null ID last.
    local_condition:  (P, C, canvas, canvas), Z(c_p&e).
    global_condition: (P, C, h, w), Z(c_loc).
    boxes:            (P, L, 4) int32, every person's face in cells of every level.
    scales:           (B, 2) float32, local_scale and global_scale.
    levels:           level of each residual.
    """

    latents: Tensor
    plans: Sequence[RowPlan]
    coefficients: NDArray[np.float64]
    prompt_embeds: Tensor
    unet_emb: NDArray[np.float32]
    local_emb: NDArray[np.float32]
    global_emb: NDArray[np.float32]
    id_tokens: Tensor
    local_condition: Tensor
    global_condition: Tensor
    boxes: NDArray[np.int32]
    scales: NDArray[np.float32]
    levels: tuple[int, ...]
    canvas: int
    relocate_mode: str
    overlap: str


def denoise(backend: Backend, batch: Batch, progress: Callable[[int, int], object] | None = None) -> list[float]:
    """Runs every step on `batch.latents`, in place. Returns the milliseconds of each step.

    progress: called after each step with (steps done, steps in all).
    """
    step_ms: list[float] = []
    for steps in phases(batch.plans):
        phase = _Phase(backend, batch, batch.plans[steps.start], steps)
        for step in steps:
            start = time.perf_counter()
            phase.step(step)
            step_ms.append((time.perf_counter() - start) * 1e3)
            if progress is not None:
                progress(step + 1, len(batch.plans))
    return step_ms


class _Phase:
    """A run of steps under one row plan, with its inputs gathered row by row."""

    def __init__(self, backend: Backend, batch: Batch, plan: RowPlan, steps: range) -> None:
        self.backend, self.batch, self.plan, self.first = backend, batch, plan, steps.start
        within = slice(steps.start, steps.stop)

        encoder_text = _rows(row.text for row in plan.encoder)
        decoder_text = _rows(row.text for row in plan.decoder)
        self.encoder_picture = _rows(row.picture for row in plan.encoder)
        self.encoder_prompt = backend.take(batch.prompt_embeds, encoder_text)
        self.decoder_prompt = backend.take(batch.prompt_embeds, decoder_text)
        self.encoder_emb = backend.put(batch.unet_emb[within][:, encoder_text])
        self.decoder_emb = backend.put(batch.unet_emb[within][:, decoder_text])
        self.encoder_of = backend.put(plan.encoder_of)
        self.decoder_of, self.weights = backend.put(plan.decoder_of), backend.put(plan.weights)
        if not plan.branch:
            return

        person = _rows(row.person for row in plan.branch)
        null_id = len(batch.id_tokens) - 1
        pooled_text = _rows(row.pooled_text or 0 for row in plan.branch)
        self.branch_picture = _rows(row.picture for row in plan.branch)
        self.id_tokens = backend.take(
            batch.id_tokens, _rows(row.person if row.with_id else null_id for row in plan.branch)
        )
        self.local_emb = backend.put(batch.local_emb[within][:, pooled_text])
        self.global_emb = backend.put(batch.global_emb[within][:, pooled_text])
        self.local_condition = backend.take(batch.local_condition, person)
        self.global_condition = backend.take(batch.global_condition, person)
        self.face_pictures = backend.put(self.branch_picture)
        self.face_boxes = backend.put(batch.boxes[person, 0])
        self.boxes = backend.put(batch.boxes[person])
        self.branches_of = backend.put(plan.branches_of)
        self.scales = backend.put(batch.scales[_rows(row.picture for row in plan.decoder)])

    def step(self, step: int) -> None:
        b, batch, i = self.backend, self.batch, step - self.first
        if self.plan.branch:
            face_latents = b.crop_upsample(batch.latents, self.face_pictures, self.face_boxes, batch.canvas)
            local_residuals = b.run(
                "local_branch",
                {
                    "latents": face_latents,
                    "emb": self.local_emb[i],
                    "id_tokens": self.id_tokens,
                    "condition": self.local_condition,
                },
            )
            global_residuals = b.run(
                "global_branch",
                {
                    "latents": b.take(batch.latents, self.branch_picture),
                    "emb": self.global_emb[i],
                    "id_tokens": self.id_tokens,
                    "condition": self.global_condition,
                },
            )
        skips = b.run(
            "unet_encoder",
            {
                "latents": b.take(batch.latents, self.encoder_picture),
                "emb": self.encoder_emb[i],
                "prompt_embeds": self.encoder_prompt,
            },
        )
        if self.plan.branch:
            merged = b.relocate_merge(
                list(skips.values()),
                list(local_residuals.values()),
                list(global_residuals.values()),
                self.encoder_of,
                self.branches_of,
                self.boxes,
                batch.levels,
                self.scales,
                batch.relocate_mode,
                batch.overlap,
            )
        else:
            merged = [b.take(skip, self.plan.encoder_of) for skip in skips.values()]
        noise_pred = b.run(
            "unet_decoder",
            {
                **dict(zip(skips, merged, strict=True)),
                "emb": self.decoder_emb[i],
                "prompt_embeds": self.decoder_prompt,
            },
        )["noise_pred"]
        coefficients = np.broadcast_to(batch.coefficients[step], (len(self.plan.weights), 2))
        b.guide_step(batch.latents, noise_pred, self.decoder_of, self.weights, coefficients)


def _rows(values: Any) -> NDArray[np.int32]:
    return np.fromiter(values, np.int32)
