"""Tables of no sampler, for tests of the loop: random histories and noise beside the steps of the real one."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from realisid_trt.loop.prologue import Prologue
from realisid_trt.loop.sampler_tables import Table

TABLE_OF = Prologue.sampler_table  # the real one


def with_state(table: Table, histories: int, draws: NDArray[np.bool_] | None = None, seed: int = 0) -> Table:
    """That table, and histories and noise that change its latents by about a tenth.

    draws: (R,) the rows that draw noise; None: none.
    """
    rng, matrix = np.random.default_rng(seed), table.matrix.copy()
    kept = slice(1, 1 + histories)
    matrix[:, kept, :2] = table.matrix[:, :1, :2] * rng.uniform(0.5, 1, (len(matrix), histories, 1))
    matrix[:, [[0], [1], [2]], [[2, 3]]] = rng.uniform(-0.1, 0.1, (len(matrix), 3, 2))
    matrix[:, 1 + histories : 3], matrix[..., 2 + histories : 4] = 0, 0
    if draws is not None:
        matrix[draws, 0, 4], matrix[draws, kept, 4] = rng.uniform(0.05, 0.15), 0.05
    return dataclasses.replace(table, matrix=matrix, histories=histories)


def use(monkeypatch: pytest.MonkeyPatch, histories: int, draws: Any = None, seed: int = 0) -> None:
    """All engines step with such a table from now on. draws: of a row's number, whether it draws noise."""

    def sampler_table(prologue: Prologue, *options: Any) -> Table:
        found = TABLE_OF(prologue, *options)
        rows = None if draws is None else np.array([bool(draws(row)) for row in range(len(found.matrix))])
        return with_state(found, histories, rows, seed)

    monkeypatch.setattr(Prologue, "sampler_table", sampler_table)
