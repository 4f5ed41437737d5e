"""What the judges said of every row → a table: means, differences and ratios, each with its 95 % interval."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from .experiments import CEILING, FULL, Experiment
from .measures import Judgement
from .statistics import Estimate, difference, estimate, frechet, frechet_difference, ratio

MEASURES = ("similarity", "rank1", "iou", "landmarks", "mouth", "brow", "harmony", "neck", "shirt", "place", "text")
OF_CEILING = ("rank1", "similarity")  # whose share of the ceiling's is told too
Judged = Mapping[str, Judgement]  # row → what was said of it


def table(experiment: Experiment, rows: Judged, pictures: int) -> dict[str, Any]:
    """JSON values: {"title", "pictures", "rows": {row: {"persons", "means", "of ceiling", "frechet", "minus …"}}}.

    An estimate is [mean, low, high], or None where no case tells anything.
    """
    base, ceiling, told = rows.get(experiment.against), rows.get(CEILING), {}
    for name, row in rows.items():
        people = row.values["identity"]
        line: dict[str, Any] = {"persons": len(people)}
        line["means"] = {measure: listed(estimate(row.values[measure], people)) for measure in MEASURES}
        if ceiling is not None:
            line["of ceiling"] = {
                measure: listed(ratio(row.values[measure], ceiling.values[measure], people)) for measure in OF_CEILING
            }
            if row is not ceiling:
                line["frechet"] = frechet(row.features, ceiling.features)
        if base is not None and row is not base:
            minus = {m: listed(difference(row.values[m], base.values[m], people)) for m in MEASURES}
            if ceiling is not None and row is not ceiling:
                minus["frechet"] = listed(frechet_difference(row.features, base.features, ceiling.features))
            line["minus " + experiment.against] = minus
        told[name] = line
    return {"title": experiment.title, "pictures": pictures, "rows": told}


def between(judged: Mapping[str, Judged]) -> dict[str, dict[str, Any]]:
    """What is told by two experiments together, of those that are there: name → its table."""
    told = {}
    for name, of, one, other in (
        ("table3-growth", growth, "table3-8", "table3-4"),
        ("persons-kept", kept, "persons-1-apart", "persons-3-apart"),
    ):
        if one in judged and other in judged:
            told[name] = of(judged[one], judged[other])
    return told


def growth(large: Judged, small: Judged) -> dict[str, Any]:
    """How much the full model's lead over every other row grows from large faces to small ones.

    Both of the same people, captions and noise, case by case: {row: {measure: [mean, low, high]}}, of
    (full − row at small faces) − (full − row at large ones).
    """
    people = large[FULL].values["identity"]
    told: dict[str, Any] = {}
    for name in large:
        if name == FULL or name not in small:
            continue
        leads = [
            {m: np.asarray(rows[FULL].values[m] - rows[name].values[m]) for m in MEASURES} for rows in (large, small)
        ]
        told[name] = {m: listed(difference(leads[1][m], leads[0][m], people)) for m in MEASURES}
    return told


def kept(one: Judged, three: Judged) -> dict[str, Any]:
    """What is left of the identity rate with three persons: of the full model's, and of the ceiling's own.

    {row: {measure: [ratio, low, high]}}. Faces are of one size; the people are the same forty, others in every picture.
    """
    return {
        name: {
            m: listed(
                ratio(three[name].values[m], one[name].values[m], three[name].values["identity"],
                      one[name].values["identity"])
            )
            for m in OF_CEILING
        }
        for name in (FULL, CEILING)
    }  # fmt: skip


def listed(found: Estimate) -> list[float] | None:
    """[mean, low, high], None if they are no numbers."""
    values = (found.mean, found.low, found.high)
    return None if not np.isfinite(values).all() else [round(value, 5) for value in values]
