"""The judges' measures of every row → a table: means, differences and ratios, each with its 95 % interval."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..statistics import METHOD, Estimate, estimate, frechet, kernel_difference, ratio
from .experiments import CEILING, FULL, TRUTH, Experiment
from .measures import MEASURES, Floats, Judgement

SHARES = ("rank1", "similarity")  # also listed as a share of the truth's and of the ceiling's
Judged = Mapping[str, Judgement]  # row → its measures


def table(experiment: Experiment, rows: Judged, pictures: int, others: Floats) -> dict[str, Any]:
    """JSON values: {"title", "pictures", "people", "intervals", "rows": {row: {"persons", "means", "of truth", "of
    ceiling", "frechet", "minus …"}}}.

    others: (M, D) features of true renders of the same captions, people and sizes in other scenes. An estimate is
    as `listed` gives it.
    """
    base, lines = rows.get(experiment.against), {}
    for name, row in rows.items():
        line: dict[str, Any] = {"persons": len(row.people)}
        line["means"] = {measure: listed(estimate(row[measure])) for measure in MEASURES}
        for key, bound in (("of truth", rows.get(TRUTH)), ("of ceiling", rows.get(CEILING))):
            if bound is not None:
                line[key] = {measure: listed(ratio(row[measure], bound[measure])) for measure in SHARES}
        line["frechet"] = round(frechet(row.features, others), 4)
        if base is not None and row is not base:
            minus = {measure: listed(estimate(row[measure] - base[measure])) for measure in MEASURES}
            farther = kernel_difference(row.features, base.features, others, row.cast)
            lines[name] = line | {"minus " + experiment.against: minus | {"kid": listed(farther)}}
        else:
            lines[name] = line
    return {"title": experiment.title, "pictures": pictures, **_sure(rows), "rows": lines}


def levels(pictures: Mapping[str, NDArray[np.uint8]], against: str) -> dict[str, list[float]]:
    """How far a row's pictures are from those of `against`: {row: [mean, the farthest picture's]}, of 255 levels."""
    lines = {}
    for name, made in pictures.items():
        if name != against:
            apart = np.abs(made.astype(np.int16) - pictures[against]).mean((1, 2, 3))
            lines[name] = [round(float(value), 4) for value in (apart.mean(), apart.max())]
    return lines


def between(judged: Mapping[str, Judged]) -> dict[str, dict[str, Any]]:
    """The tables that combine two experiments, of those that were made: name → table."""
    lines = {}
    for name, (of, one, other) in BETWEEN.items():
        if one in judged and other in judged:
            lines[name] = {**_sure(judged[one]), "rows": of(judged[one], judged[other])}
    return lines


def _sure(rows: Judged) -> dict[str, Any]:
    """The number of people and the method of a table's intervals."""
    return {"people": len(np.unique(next(iter(rows.values())).people)), "intervals": METHOD}


def growth(large: Judged, small: Judged) -> dict[str, Any]:
    """How much the full model's lead over every other row grows from large faces to small ones.

    Both of the same people, captions and noise, case by case: {row: {measure: [mean, low, high]}}, of
    (full − row at small faces) − (full − row at large ones).
    """
    lines: dict[str, Any] = {}
    for name in large:
        if name != FULL and name in small:
            leads = {m: [rows[FULL][m] - rows[name][m] for rows in (small, large)] for m in MEASURES}
            lines[name] = {m: listed(estimate(lead - before)) for m, (lead, before) in leads.items()}
    return lines


def kept(one: Judged, three: Judged) -> dict[str, Any]:
    """The share of the identity with one person that is left with three: of the full model, and of the ceiling.

    {row: {measure: [ratio, low, high]}}. Faces are of one size; the people are the same forty, in other scenes.
    """
    return {name: {m: listed(ratio(three[name][m], one[name][m])) for m in SHARES} for name in (FULL, CEILING)}


BETWEEN = {
    "table3-growth": (growth, "table3-8", "table3-4"),
    "persons-kept": (kept, "persons-1-apart", "persons-3-apart"),
    "persons-kept-others": (kept, "persons-1-others", "persons-3-others"),
}


def listed(found: Estimate) -> list[float | None] | None:
    """[mean, low, high]; of a single case [mean, None, None]; None where no case has a value."""
    if not np.isfinite(found.mean):
        return None
    return [round(value, 5) if np.isfinite(value) else None for value in (found.mean, found.low, found.high)]
