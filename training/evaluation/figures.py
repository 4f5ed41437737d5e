"""The figures that a table is computed from, of every person in every picture: NAME.npz beside NAME.json."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from realisid_trt.errors import RequestError
from realisid_trt.files import whole_or_not

from ..statistics import Sample
from .measures import MEASURES, Judgement


@dataclass(frozen=True, eq=False)
class Figures:
    """The figures that a table is computed from.

    people, pictures: (N,) the person and the seed of the picture of every value, as in `Judgement`.
    values: row → measure → (N,) float32, NaN where there is none.
    """

    people: NDArray[np.int64]
    pictures: NDArray[np.int64]
    values: Mapping[str, Mapping[str, NDArray[np.float32]]]

    def sample(self, row: str, measure: str) -> Sample:
        return Sample(self.values[row][measure], self.people, self.pictures)


def write_figures(path: Path, judged: Mapping[str, Judgement]) -> None:
    """Writes the figures of rows with the same persons in the same pictures. The same figures make the same bytes."""
    first = next(iter(judged.values()))
    values = [[row.values[measure] for measure in MEASURES] for row in judged.values()]
    with whole_or_not(path) as partial, partial.open("wb") as file:
        np.savez_compressed(
            file, people=first.people.astype(np.int64), pictures=first.pictures.astype(np.int64), rows=list(judged),
            measures=MEASURES, values=np.array(values, np.float32),
        )  # fmt: skip


def read_figures(path: Path) -> Figures:
    """The figures of a table. Raises RequestError for a file that is missing or damaged."""
    try:
        with np.load(path) as file:
            values = {
                str(row): dict(zip(map(str, file["measures"]), found, strict=True))
                for row, found in zip(file["rows"], file["values"], strict=True)
            }
            return Figures(file["people"], file["pictures"], values)
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise RequestError(f"{path} holds no figures of a table ({error}). Make the table again.") from error
