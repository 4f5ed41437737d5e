"""The loop: crop_upsample → branches → relocate_merge → decoder → guide_step, in every step.

Values that are constant over the steps are computed before it (`Batch`). Values that depend on the row plan are
gathered once per phase; a phase ends where a delayed ID begins, and where a branch's window or the guidance interval
begins or ends. Values that depend on the step are read from tables by a step counter on the device, so a step is the
same call every time. Fresh noise, where the sampler draws any, is written between two steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from realisid_trt.kernels import EVERYWHERE, INSIDE, RELOCATED

from ..backends import Backend, MergeRows, Tensor
from ..branches import Branch, tokens_input
from .rows import BranchRows, RowPlan, Tokens, phases


def loop_networks(table: Sequence[Branch]) -> tuple[str, ...]:
    """The networks and kernels of a step, in order, by the backend's names."""
    branches = (f"{branch.name}_branch" for branch in table)
    return ("crop_upsample", *branches, "unet_encoder", "relocate_merge", "unet_decoder", "guide_step")


@dataclass(frozen=True, eq=False)
class BranchTables:
    """What one branch of a batch reads. Its subjects are persons or requests, by its `per`.

    emb:          (S, K, E): time + added conditions of every evaluation and text; (S, 1, E) if it sees no pooled text.
    condition:    (Q, C, h, w), Z(c) of the subjects that have a drawing.
    condition_of: (subjects,) int32, the row of `condition` of each subject, -1 without a drawing.
    scales:       (B,) float32, the factor of its residuals in each picture.
    """

    emb: Tensor
    condition: Tensor
    condition_of: NDArray[np.int32]
    scales: NDArray[np.float32]


@dataclass(eq=False)
class Batch:
    """B pictures of one size and sampler, their K distinct texts and P persons.

    S is the number of evaluations of the networks: a step of the sampler has one or two.

    latents:          (B, C, h, w) float32, updated in place.
    step:             (B,) int32, each picture's next step, counted up.
    plans:            the row plan of each evaluation; those with the same plan hold the same object.
    matrix:           (S, 4, 5) float64, what `guide_step` computes after each evaluation.
    histories:        (B, K, C, h, w) float32, what the sampler keeps from step to step, zeros before the first, updated
                      in place; None for a sampler that keeps nothing.
    noise:            (B, C, h, w) float32, the fresh noise of the current step; None for a sampler that draws none.
    step_noise:       step → what is written into `noise` before it; None before a step that draws none.
    prompt_embeds:    (K, T, D).
    unet_tokens:      what the UNet reads: "text" or "text_and_id".
    unet_emb:         (S, K, E): time + added conditions of every evaluation and text.
    table:            the branches. branches: what each reads; None for one that no step evaluates.
    id_tokens:        (1 + P, T', D): the null ID's, then every person's. None for an engine without identities.
    token_rows:       (K·T + (1 + P)·T', D): all of them one below the other; None if nothing reads "text_and_id".
    boxes:            (P, L, 4) int32, every person's face in cells of every level.
    """

    latents: Tensor
    step: Tensor
    plans: Sequence[RowPlan]
    matrix: Tensor
    histories: Tensor | None
    noise: Tensor | None
    step_noise: Callable[[int], NDArray[np.float32] | None]
    prompt_embeds: Tensor
    unet_tokens: str
    unet_emb: Tensor
    table: Sequence[Branch]
    branches: Sequence[BranchTables | None]
    id_tokens: Tensor
    token_rows: Tensor
    boxes: NDArray[np.int32]


def denoise(backend: Backend, batch: Batch, progress: Callable[[int, int], object] | None = None) -> list[float]:
    """Runs every step on `batch.latents`, in place. Returns the milliseconds of each step.

    progress: called after each step with (steps done, steps in all).
    """
    stamps = [backend.stamp()]
    for steps in phases(batch.plans):
        run_step = backend.repeated(_phase(backend, batch, batch.plans[steps.start]))
        for step in steps:
            fresh = batch.step_noise(step)
            if fresh is not None:
                backend.write(batch.noise, fresh)  # a replayed step reads it where the captured one did
            run_step()
            stamps.append(backend.stamp())
            if progress is not None:
                backend.wait_for(stamps[-2])  # at most one step ahead: the backend stays busy during the callback
                with backend.outside():
                    progress(step + 1, len(batch.plans))
    return backend.elapsed_ms(stamps)


def _phase(backend: Backend, batch: Batch, plan: RowPlan) -> Callable[[], None]:
    """A function for every step with this plan, its inputs gathered row by row."""
    put, run, take_step = backend.put, backend.run, backend.take_step
    encoder_picture = _rows(row.picture for row in plan.encoder)
    encoder_text, decoder_text = _rows(row.text for row in plan.encoder), _rows(row.text for row in plan.decoder)
    decoder_picture = _rows(row.picture for row in plan.decoder)
    tokens_name = tokens_input(batch.unet_tokens)
    encoder_tokens = _tokens(backend, batch, batch.unet_tokens, [row.tokens for row in plan.encoder])
    decoder_tokens = _tokens(backend, batch, batch.unet_tokens, [row.tokens for row in plan.decoder])
    encoder_at = put(encoder_picture), put(encoder_text)
    decoder_at = put(decoder_picture), put(decoder_text)
    decoder_of, weights = put(plan.decoder_of), put(plan.weights)
    inject = _injection(backend, batch, plan)

    def step() -> None:
        residuals = None if inject is None else inject.residuals()
        skips = run(
            "unet_encoder",
            {
                "latents": backend.take(batch.latents, encoder_picture),
                "emb": take_step(batch.unet_emb, batch.step, *encoder_at),
                tokens_name: encoder_tokens,
            },
        )
        merged = (
            [backend.take(skip, plan.encoder_of) for skip in skips.values()]
            if inject is None or residuals is None
            else backend.relocate_merge(list(skips.values()), residuals, inject.rows)
        )
        noise_pred = run(
            "unet_decoder",
            {
                **dict(zip(skips, merged, strict=True)),
                "emb": take_step(batch.unet_emb, batch.step, *decoder_at),
                tokens_name: decoder_tokens,
            },
        )["noise_pred"]
        backend.guide_step(
            batch.latents,
            batch.histories,
            batch.step,
            noise_pred,
            decoder_of,
            weights,
            batch.matrix,
            batch.noise,
            preview=None,
        )

    return step


@dataclass(frozen=True, eq=False)
class _Injection:
    """What the branches add to the UNet in one phase. residuals: runs them; rows: where each residual goes."""

    sources: Sequence[Callable[[], Sequence[Tensor]]]
    rows: MergeRows

    def residuals(self) -> list[Sequence[Tensor]]:
        return [source() for source in self.sources]


def _injection(backend: Backend, batch: Batch, plan: RowPlan) -> _Injection | None:
    """The branches that have rows in this plan, in the order of the table; None if none has."""
    picture = _rows(row.picture for row in plan.decoder)
    sources, rows_of, scales, rules, boxes, boxed = [], [], [], [], [], 0
    for branch, tables, rows in zip(batch.table, batch.branches, plan.branches, strict=True):
        if not rows.rows or tables is None:
            continue
        face_boxes = batch.boxes[_rows(row.subject for row in rows.rows)] if branch.writes == "box" else batch.boxes[:0]
        sources.append(_branch(backend, batch, branch, tables, rows))
        rows_of.append(rows.of)
        scales.append(tables.scales[picture])
        rules.append((_placement(branch), branch.merge == "mean", boxed if len(face_boxes) else -1))
        boxes.append(face_boxes)
        boxed += len(face_boxes)
    if not sources:
        return None
    put = backend.put
    merge = MergeRows(
        encoder_of=put(plan.encoder_of),
        rows_of=put(np.stack(rows_of, axis=1)),
        scales=put(np.stack(scales, axis=1)),
        rules=put(np.array(rules, np.int32)),
        boxes=put(np.concatenate(boxes)),
    )
    return _Injection(sources, merge)


def _placement(branch: Branch) -> int:
    """How its residuals are placed in the picture."""
    if branch.writes == "everywhere":
        return int(EVERYWHERE)
    return int(RELOCATED if branch.view == "face" else INSIDE)


def _branch(
    backend: Backend, batch: Batch, branch: Branch, tables: BranchTables, of: BranchRows
) -> Callable[[], Sequence[Tensor]]:
    """A function for a branch's residuals in a step."""
    put, take, rows = backend.put, backend.take, of.rows
    picture, subject = _rows(row.picture for row in rows), _rows(row.subject for row in rows)
    at = put(picture), put(_rows(row.pooled_text or 0 for row in rows))
    tokens = _tokens(backend, batch, branch.tokens, [row.tokens for row in rows])
    condition = take(tables.condition, tables.condition_of[subject])
    faces = (at[0], put(batch.boxes[subject, 0])) if branch.view == "face" else None

    def run() -> Sequence[Tensor]:
        inputs = {
            "latents": backend.crop_upsample(batch.latents, *faces) if faces else take(batch.latents, picture),
            "emb": backend.take_step(tables.emb, batch.step, *at),
            branch.tokens_input: tokens,
            "condition": condition,
        }
        return list(backend.run(f"{branch.name}_branch", inputs).values())

    return run


def _tokens(backend: Backend, batch: Batch, read: str, rows: Sequence[Tokens]) -> Tensor:
    """(R, T, D): the tokens of these rows. read: "id", "text" or "text_and_id", whose T is the same in all rows."""
    if read == "id":
        return backend.take(batch.id_tokens, _rows(tokens.ids[0] for tokens in rows))
    if read == "text":
        return backend.take(batch.prompt_embeds, _rows(tokens.text or 0 for tokens in rows))
    texts, length, _ = batch.prompt_embeds.shape
    id_length = batch.id_tokens.shape[1]
    sequences = [
        [(tokens.text or 0) * length + i for i in range(length)]
        + [texts * length + id * id_length + i for id in tokens.ids for i in range(id_length)]
        for tokens in rows
    ]
    return backend.take(batch.token_rows, np.array(sequences, np.int32))


def _rows(values: Iterable[int]) -> NDArray[np.int32]:
    return np.fromiter(values, np.int32)
