"""The loop: crop_upsample → branches → relocate_merge → decoder → guide_step, in every step.

Values that are constant over the steps are computed before it (`Batch`). Values that depend on the row plan are
gathered once per phase; a request with a delayed ID has two phases. Values that depend on the step are read from tables
by a step counter on the device, so a step is the same call every time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..backends import Backend, MergeRows, Tensor
from .rows import BranchRows, RowPlan, phases

# The networks and kernels of a step, in order, by the backend's names.
LOOP_NETWORKS = (
    "crop_upsample",
    "local_branch",
    "global_branch",
    "unet_encoder",
    "relocate_merge",
    "unet_decoder",
    "guide_step",
)


@dataclass(eq=False)
class Batch:
    """B pictures of one size and number of steps, their K distinct texts and P persons.

    latents:          (B, C, h, w) float32, updated in place.
    step:             (B,) int32, each picture's next step, counted up.
    plans:            the row plan of each of the S steps; steps with the same plan hold the same object.
    coefficients:     (S, 2) float64, A and B of DDIM.
    prompt_embeds:    (K, T, D).
    unet_emb:         (S, K, E): time + added conditions of every step and text.
    local_emb, global_emb: (S, K, E), or (S, 1, E) when the branches see no text. None, as the
                      condition, for a branch without rows.
    id_tokens:        (1 + P, T, D): the null ID's, then every person's.
    local_condition:  (P, C, canvas, canvas), Z(c_p&e).
    global_condition: (P, C, h, w), Z(c_loc).
    boxes:            (P, L, 4) int32, every person's face in cells of every level.
    scales:           (B, 2) float32, local_scale and global_scale.
    """

    latents: Tensor
    step: Tensor
    plans: Sequence[RowPlan]
    coefficients: Tensor
    prompt_embeds: Tensor
    unet_emb: Tensor
    local_emb: Tensor
    global_emb: Tensor
    id_tokens: Tensor
    local_condition: Tensor
    global_condition: Tensor
    boxes: NDArray[np.int32]
    scales: NDArray[np.float32]


def denoise(backend: Backend, batch: Batch, progress: Callable[[int, int], object] | None = None) -> list[float]:
    """Runs every step on `batch.latents`, in place. Returns the milliseconds of each step.

    progress: called after each step with (steps done, steps in all).
    """
    stamps = [backend.stamp()]
    for steps in phases(batch.plans):
        run_step = backend.repeated(_phase(backend, batch, batch.plans[steps.start]))
        for step in steps:
            run_step()
            stamps.append(backend.stamp())
            if progress is not None:
                backend.wait_for(stamps[-2])  # at most one step ahead: the backend stays busy during the callback
                progress(step + 1, len(batch.plans))
    return backend.elapsed_ms(stamps)


def _phase(backend: Backend, batch: Batch, plan: RowPlan) -> Callable[[], None]:
    """A function for every step with this plan, its inputs gathered row by row."""
    put, run, take_step = backend.put, backend.run, backend.take_step
    encoder_picture = _rows(row.picture for row in plan.encoder)
    encoder_text, decoder_text = _rows(row.text for row in plan.encoder), _rows(row.text for row in plan.decoder)
    decoder_picture = _rows(row.picture for row in plan.decoder)
    encoder_prompt = backend.take(batch.prompt_embeds, encoder_text)
    decoder_prompt = backend.take(batch.prompt_embeds, decoder_text)
    encoder_at = put(encoder_picture), put(encoder_text)
    decoder_at = put(decoder_picture), put(decoder_text)
    decoder_of, weights = put(plan.decoder_of), put(plan.weights)
    with_branches = plan.local_branch.rows or plan.global_branch.rows
    inject = _branches(backend, batch, plan) if with_branches else None

    def step() -> None:
        residuals = inject() if inject is not None else None
        skips = run(
            "unet_encoder",
            {
                "latents": backend.take(batch.latents, encoder_picture),
                "emb": take_step(batch.unet_emb, batch.step, *encoder_at),
                "prompt_embeds": encoder_prompt,
            },
        )
        merged = (
            backend.relocate_merge(list(skips.values()), *residuals)
            if residuals is not None
            else [backend.take(skip, plan.encoder_of) for skip in skips.values()]
        )
        noise_pred = run(
            "unet_decoder",
            {
                **dict(zip(skips, merged, strict=True)),
                "emb": take_step(batch.unet_emb, batch.step, *decoder_at),
                "prompt_embeds": decoder_prompt,
            },
        )["noise_pred"]
        backend.guide_step(batch.latents, batch.step, noise_pred, decoder_of, weights, batch.coefficients)

    return step


Residuals = tuple[list[Tensor], list[Tensor], MergeRows]  # local, global, and where they go


def _branches(backend: Backend, batch: Batch, plan: RowPlan) -> Callable[[], Residuals]:
    """A function that runs both branches of a step: residuals of every person with and without the ID."""
    put, local_rows = backend.put, plan.local_branch.rows
    person = _rows(row.person for row in local_rows)
    rows = MergeRows(
        encoder_of=put(plan.encoder_of),
        local_of=put(plan.local_branch.of),
        global_of=put(plan.global_branch.of),
        boxes=put(batch.boxes[person]),
        scales=put(batch.scales[_rows(row.picture for row in plan.decoder)]),
    )
    faces = put(_rows(row.picture for row in local_rows)), put(batch.boxes[person, 0])
    picture = _rows(row.picture for row in plan.global_branch.rows)
    local = _branch(
        backend, batch, "local_branch", plan.local_branch, batch.local_emb, batch.local_condition,
        lambda: backend.crop_upsample(batch.latents, *faces),
    )  # fmt: skip
    global_branch = _branch(
        backend, batch, "global_branch", plan.global_branch, batch.global_emb, batch.global_condition,
        lambda: backend.take(batch.latents, picture),
    )  # fmt: skip
    return lambda: (local(), global_branch(), rows)


def _branch(
    backend: Backend,
    batch: Batch,
    network: str,
    branch: BranchRows,
    emb: Tensor,
    condition: Tensor,
    latents: Callable[[], Tensor],
) -> Callable[[], list[Tensor]]:
    """A function for a branch's residuals in a step; empty without rows. latents: gives the latents of its rows."""
    rows = branch.rows
    if not rows:
        return lambda: []
    at = backend.put(_rows(row.picture for row in rows)), backend.put(_rows(row.pooled_text or 0 for row in rows))
    id_tokens = backend.take(batch.id_tokens, _rows(row.person + 1 if row.with_id else 0 for row in rows))
    conditions = backend.take(condition, _rows(row.person for row in rows))

    def run() -> list[Tensor]:
        inputs = {
            "latents": latents(),
            "emb": backend.take_step(emb, batch.step, *at),
            "id_tokens": id_tokens,
            "condition": conditions,
        }
        return list(backend.run(network, inputs).values())

    return run


def _rows(values: Iterable[int]) -> NDArray[np.int32]:
    return np.fromiter(values, np.int32)
