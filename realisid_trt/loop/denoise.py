"""A step of the loop: crop_upsample → branches → relocate_merge → decoder → guide_step.

Values that are constant over the steps of a pass are computed before it (`Batch`), and what its row plan says is
gathered once. Values that depend on the step are read from tables by a step counter on the device, so a step is the
same call every time. The pictures of a pass may be at different steps, of different samplers: the tables of all
pictures stand one behind another on one axis of evaluations, and a picture's step is a place on that axis.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from realisid_trt.kernels import EVERYWHERE, INSIDE, RELOCATED

from ..backends import Backend, MergeRows, Tensor
from ..branches import Branch, tokens_input
from .rows import BranchRows, RowPlan, Tokens


def loop_networks(table: Sequence[Branch]) -> tuple[str, ...]:
    """The networks and kernels of a step, in order, by the backend's names."""
    branches = (f"{branch.name}_branch" for branch in table)
    return ("crop_upsample", *branches, "unet_encoder", "relocate_merge", "unet_decoder", "guide_step")


@dataclass(frozen=True, eq=False)
class BranchTables:
    """What one branch of a batch reads. Its subjects are persons or requests, by its `per`.

    emb:          (S, K, E): time + added conditions of every evaluation and column; (S, 1, E) without pooled text.
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
    """B pictures of one size in a pass, and the texts and persons of their requests.

    S is the number of evaluations of the networks in the schedules of all requests together, K the most texts that one
    request has: its columns.

    latents:       (B, C, h, w) float32, updated in place.
    step:          (B,) int32, each picture's next evaluation, a place on the axis S; counted up.
    plan:          the rows of every step of the pass.
    matrix:        (S, 4, 5) float64, what `guide_step` computes after each evaluation.
    histories:     (B, H, C, h, w) float32, what samplers keep from step to step, zeros before the first, updated in
                   place; None if no sampler keeps anything.
    noise:         (B, C, h, w) float32, the fresh noise of the next step; None if no sampler draws any.
    preview:       (B, C, h, w) float32, the clean latents as the last step predicted them; None if nobody asked.
    prompt_embeds: (texts, T, D), those of all requests.
    columns:       of each text, its column in the tables of its request.
    unet_tokens:   what the UNet reads: "text" or "text_and_id".
    unet_emb:      (S, K, E): time + added conditions of every evaluation and column.
    table:         the branches. branches: what each reads; None for one that has no rows.
    id_tokens:     (1 + P, T', D): the null ID's, then every person's. None for an engine without identities.
    token_rows:    (texts·T + (1 + P)·T', D): all of them one below the other; None if nothing reads "text_and_id".
    boxes:         (P, L, 4) int32, every person's face in cells of every level.
    """

    latents: Tensor
    step: Tensor
    plan: RowPlan
    matrix: Tensor
    histories: Tensor | None
    noise: Tensor | None
    preview: Tensor | None
    prompt_embeds: Tensor
    columns: NDArray[np.int32]
    unet_tokens: str
    unet_emb: Tensor
    table: Sequence[Branch]
    branches: Sequence[BranchTables | None]
    id_tokens: Tensor
    token_rows: Tensor
    boxes: NDArray[np.int32]


def step_of(backend: Backend, batch: Batch) -> Callable[[], None]:
    """A function for every step of the pass, its inputs gathered row by row."""
    plan = batch.plan
    put, run, take_step = backend.put, backend.run, backend.take_step
    encoder_picture, decoder_picture = (_rows(row.picture for row in rows) for rows in (plan.encoder, plan.decoder))
    encoder_column, decoder_column = (
        batch.columns[_rows(row.text for row in rows)] for rows in (plan.encoder, plan.decoder)
    )
    tokens_name = tokens_input(batch.unet_tokens)
    encoder_tokens = _tokens(backend, batch, batch.unet_tokens, [row.tokens for row in plan.encoder])
    decoder_tokens = _tokens(backend, batch, batch.unet_tokens, [row.tokens for row in plan.decoder])
    encoder_at = put(encoder_picture), put(encoder_column)
    decoder_at = put(decoder_picture), put(decoder_column)
    decoder_of, weights = put(plan.decoder_of), put(plan.weights)
    inject = _injection(backend, batch)

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
            batch.preview,
        )

    return step


@dataclass(frozen=True, eq=False)
class _Injection:
    """What the branches add to the UNet in one pass. residuals: runs them; rows: where each residual goes."""

    sources: Sequence[Callable[[], Sequence[Tensor]]]
    rows: MergeRows

    def residuals(self) -> list[Sequence[Tensor]]:
        return [source() for source in self.sources]


def _injection(backend: Backend, batch: Batch) -> _Injection | None:
    """The branches that have rows, in the order of the table; None if none has."""
    plan = batch.plan
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
    column = _rows(0 if row.pooled_text is None else batch.columns[row.pooled_text] for row in rows)
    at = put(picture), put(column)
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
