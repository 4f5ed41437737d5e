"""The rows that each step must evaluate, and no others. DESIGN.md, "Rows".

The UNet and the branches are evaluated in rows: one picture under one text, with or without the ID. Two rows with the
same inputs are one row; rows whose coefficient in Eq. (8) is zero are skipped. Everything here is exact: nothing is
approximated. This file uses no tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from ..branches import Branch

T = TypeVar("T")
NONE, TEXT, FULL = range(3)  # the rows of Eq. (8): nothing, text, text + ID


def steps_without_id(
    num_inference_steps: int, subject_conditioning_ratio: float | None, delay_rule: str = "inclusive"
) -> int:
    """How many steps, from the first, run without the ID.

    subject_conditioning_ratio: α in [0, 1], or None for no delay.
    delay_rule: "inclusive": those with i <= (1 - α)·S, FastComposer's rule; "exclusive": i < (1 - α)·S, ID-Patch's.
    """
    if subject_conditioning_ratio is None:
        return 0
    last = (1 - subject_conditioning_ratio) * num_inference_steps  # double arithmetic: α = 0.8 gives 5.99…, 6 steps
    return sum(i < last if delay_rule == "exclusive" else i <= last for i in range(num_inference_steps))


def guidance_weights(
    guidance_scale: float, id_guidance_scale: float | None, with_id: bool
) -> tuple[float, float, float]:
    """The coefficients of the three rows in Eq. (8); they sum to 1.

    guidance_scale    λt      c_none = 1 - λt
    id_guidance_scale λi      c_text = λt - λi',  c_full = λi',  with λi' = 0 before the switch and without persons;
                              None: λi = λt, so that there is no text row with the ID and no full row without
    """
    id_scale = (guidance_scale if id_guidance_scale is None else id_guidance_scale) if with_id else 0.0
    return 1.0 - guidance_scale, guidance_scale - id_scale, id_scale


def in_window(step: int, num_inference_steps: int, start: float, end: float) -> bool:
    """Whether a branch takes part in step i of S: not (i/S < start or (i + 1)/S > end). diffusers' rule."""
    return not (step / num_inference_steps < start or (step + 1) / num_inference_steps > end)


def in_interval(sigma: float, interval: tuple[float, float] | None) -> bool:
    """Whether a step at noise level σ is guided: low < σ <= high. Kynkäänniemi et al. 2024 (arXiv 2404.07724)."""
    return interval is None or interval[0] < sigma <= interval[1]


@dataclass(frozen=True)
class Tokens:
    """The tokens that a row reads, by number: a text of the batch, and IDs; 0 is the null ID, p + 1 person p's.

    Attention does not see the order of tokens, but how often they stand there: N persons are dropped by N null IDs.
    """

    text: int | None
    ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class PictureRows:
    """One picture at one step, as the plan's input.

    texts:   index of the text of the none row, and of the text and full rows, in the batch's list of distinct texts.
    persons: index of each person in the batch's list of persons, in the order given.
    weights: coefficients of the none, text and full row, from `guidance_weights`.
    active:  whether each branch of the table is evaluated; one outside its window or of scale 0 need not be.
    request: index of the picture's request in the batch.
    absent:  whether rows of tokens "text_and_id" have no ID tokens in this step: `delayed_id` "absent".
    """

    texts: tuple[int, int]
    persons: tuple[int, ...]
    weights: tuple[float, float, float]
    active: tuple[bool, ...]
    request: int = 0
    absent: bool = False


@dataclass(frozen=True)
class DecoderRow:
    """One row of the UNet decoder: its picture, its kind (NONE, TEXT, FULL), its tokens, and its text's time column."""

    picture: int
    kind: int
    tokens: Tokens
    text: int


@dataclass(frozen=True)
class EncoderRow:
    """One row of the UNet encoder. Where the UNet reads text alone, text and full prediction share it."""

    picture: int
    tokens: Tokens
    text: int


@dataclass(frozen=True)
class BranchRow:
    """One row of a branch.

    subject:     what its condition shows: a person or a request of the batch, by the branch's `per`.
    pooled_text: the text whose pooled embedding it sees, or None for zeros.
    """

    picture: int
    subject: int
    tokens: Tokens
    pooled_text: int | None


@dataclass(frozen=True, eq=False)
class BranchRows:
    """The rows of one branch in one step.

    of: (R, N) int32. The rows whose residuals decoder row r receives, in the order of the persons, -1 after the last;
        N is the most persons of any picture, at least 1.
    """

    rows: tuple[BranchRow, ...]
    of: NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class RowPlan:
    """The rows of one step for a batch of pictures, and the links between them.

    branches:    the rows of each branch of the table, and the decoder rows that receive their residuals.
    encoder_of:  (R,) int32. The encoder row that decoder row r continues.
    decoder_of:  (B, 3) int32. The decoder row of each picture's none, text and full prediction, -1 where it has none.
    weights:     (B, 3) float64. Their coefficients in Eq. (8).
    """

    encoder: tuple[EncoderRow, ...]
    decoder: tuple[DecoderRow, ...]
    branches: tuple[BranchRows, ...]
    encoder_of: NDArray[np.int32]
    decoder_of: NDArray[np.int32]
    weights: NDArray[np.float64]


def plan_rows(
    pictures: Sequence[PictureRows], table: Sequence[Branch], unet_tokens: str = "text", share: bool = True
) -> RowPlan:
    """The fewest rows that give every picture its prediction. Rows that read the same are one row.

    table:       the branches.
    unet_tokens: "text" or "text_and_id".
    share:       False evaluates three full rows for every picture, as a naive pipeline does. For measurements.
    """
    decoder: list[DecoderRow] = []
    encoder = _Distinct[EncoderRow](share)
    branches = [_Distinct[BranchRow](share) for _ in table]
    encoder_of: list[int] = []
    branches_of: list[list[list[int]]] = [[] for _ in table]
    decoder_of = np.full((len(pictures), 3), -1, np.int32)
    for b, picture in enumerate(pictures):
        for kind in (NONE, TEXT, FULL):
            if share and picture.weights[kind] == 0:
                continue
            text = picture.texts[0 if kind == NONE else 1]
            tokens = Tokens(text, _ids(picture, kind) if unet_tokens == "text_and_id" else ())
            decoder_of[b, kind] = len(decoder)
            decoder.append(DecoderRow(b, kind, tokens, text))
            encoder_of.append(encoder.add(EncoderRow(b, tokens, text)))
            for place, branch in enumerate(table):
                rows = _rows_of(branch, picture, b, kind, text) if picture.active[place] else []
                branches_of[place].append([branches[place].add(row) for row in rows])
    most = max((len(picture.persons) for picture in pictures), default=0)
    return RowPlan(
        encoder=tuple(encoder.items),
        decoder=tuple(decoder),
        branches=tuple(
            BranchRows(tuple(rows.items), _padded(of, max(most, 1)))
            for rows, of in zip(branches, branches_of, strict=True)
        ),
        encoder_of=np.array(encoder_of, np.int32),
        decoder_of=decoder_of,
        weights=np.array([picture.weights for picture in pictures], np.float64).reshape(-1, 3),
    )


def _rows_of(branch: Branch, picture: PictureRows, number: int, kind: int, text: int) -> list[BranchRow]:
    """The rows of an active branch that a decoder row of this kind and text receives."""
    pooled_text = text if branch.pooled == "per_row" else None
    if branch.per == "picture":
        ids = _ids(picture, kind) if branch.tokens == "text_and_id" else ()
        return [BranchRow(number, picture.request, Tokens(text, ids), pooled_text)]

    def tokens(person: int) -> Tokens:
        return Tokens(None, (person + 1 if kind == FULL else 0,)) if branch.tokens == "id" else Tokens(text)

    return [BranchRow(number, person, tokens(person), pooled_text) for person in picture.persons]


def _ids(picture: PictureRows, kind: int) -> tuple[int, ...]:
    """The IDs that follow the text in a row of this kind."""
    if picture.absent:
        return ()
    return tuple(person + 1 if kind == FULL else 0 for person in picture.persons)


def _padded(rows: Sequence[Sequence[int]], length: int) -> NDArray[np.int32]:
    padded = [[*row, *[-1] * (length - len(row))] for row in rows]
    return np.array(padded, np.int32).reshape(len(rows), length)


class _Distinct(Generic[T]):
    """A list without duplicates; with share=False every item is new."""

    def __init__(self, share: bool) -> None:
        self.items: list[T] = []
        self._index: dict[T, int] = {}
        self._share = share

    def add(self, item: T) -> int:
        if self._share and item in self._index:
            return self._index[item]
        self._index[item] = len(self.items)
        self.items.append(item)
        return self._index[item]
