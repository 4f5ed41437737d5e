"""Requests on their way to the loop: checked, with their texts and the rows of all their steps."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..request import Request
from .controls import Setting
from .prompt import TokenIds
from .rows import PictureRows, RowPlan
from .sampler_tables import Table


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
    settings:  of every branch of the table.
    """

    request: Request
    seed: int
    token_ids: tuple[TokenIds | None, TokenIds]
    latents: NDArray[np.float32] | None
    settings: tuple[Setting, ...]

    @property
    def notes(self) -> tuple[str, ...]:
        """Decisions about the images of its controls."""
        return tuple(note for setting in self.settings for note in setting.notes)


@dataclass(frozen=True, eq=False)
class Stage:
    """What the pictures of some requests evaluate in a step. Equal stages of a plan are one object.

    pictures: every picture, as `plan_rows` takes it. rows: its plan.
    """

    pictures: tuple[PictureRows, ...]
    rows: RowPlan

    @property
    def ids(self) -> int:
        """How many IDs follow the text in the UNet's rows: with another number a row has another length."""
        return len(self.rows.decoder[0].tokens.ids)


@dataclass(frozen=True, eq=False)
class Plan:
    """The distinct texts of some requests, their sampler, and the stage of every evaluation."""

    texts: Texts
    stages: list[Stage]
    sampler: Table

    @property
    def rows(self) -> list[RowPlan]:
        """The row plan of every evaluation."""
        return [stage.rows for stage in self.stages]

    @property
    def evaluated(self) -> tuple[bool, ...]:
        """Of every branch of the table, whether some step evaluates it."""
        return tuple(any(rows.rows for rows in of) for of in zip(*(plan.branches for plan in self.rows), strict=True))
