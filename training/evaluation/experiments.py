"""The paper's tables in small: their cases, their rows and their comparisons."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from .cases import SIZES, Case, Casting

PEOPLE = 40  # unseen ones, as in the paper
STEPS = 16  # of rows that do not say otherwise
FULL, TRUTH, CEILING = "full", "true renders", "true renders through the VAE"
FLOOR = "true renders of somebody else"
# The faces of Table 3, 1/4 to 1/7 of the picture, as closely as a grid of 32 cells allows.
FACE_CELLS = {"1/4": 8, "1/5.3": 6, "1/6.4": 5, "1/8": 4}
PERSONS = (1, 2, 3)


@dataclass(frozen=True)
class Row:
    """One line of a table.

    maker:   "engine", "truth", "ceiling", "floor", "torch" (the full model, without an engine), or a design of
             training.residuals.
    options: of every Request (engine) or of the Sampler (torch, a design).
    config:  keys of realisid_config.json to change.
    device:  where the engine runs for this row; None: on the device that the command was given.
    sampler: of the engine or of torch. Rows name sampler and steps, so no table changes with a checkpoint's defaults.
    steps:   of this row; None: as many as the command was given, STEPS by default.
    """

    maker: str = "engine"
    options: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    device: str | None = None
    sampler: str = "ddim"
    steps: int | None = None


@dataclass(frozen=True)
class Experiment:
    """A table: cases, rows by name, and the row that the others are compared with, pair by pair.

    alike: all rows should give the same pictures; the table reports their differences.
    """

    title: str
    cases: Callable[[Casting, int], list[Case]]
    rows: Mapping[str, Row]
    against: str = FULL
    times: int = 1  # factor on the number of pictures
    alike: bool = False


def _table(size: str) -> Callable[[Casting, int], list[Case]]:
    """Cases of one person each, 40 people in turn."""
    return lambda casting, pictures: casting.table(size, PEOPLE, pictures)


def _others(casting: Casting, pictures: int) -> list[Case]:
    """Regular and small faces, of 40 people that no other table shows: for choosing settings."""
    half = pictures // 2
    return [
        case
        for size, count, first in (("regular", pictures - half, 6_000_000), ("small", half, 7_000_000))
        for case in casting.table(size, PEOPLE, count, first, first_identity=100)
    ]


def _at(cells: int) -> Callable[[Casting, int], list[Case]]:
    """One person each, faces of exactly `cells` cells."""
    side = cells / 32
    return lambda casting, pictures: casting.groups(1, pictures, (side, side), "apart", PEOPLE)


def _groups(
    persons: int, layout: str = "apart", first: int = 0, first_identity: int = 0
) -> Callable[[Casting, int], list[Case]]:
    """Faces of 6 cells for any number of people, so that the rows differ in that number alone."""
    return lambda casting, pictures: casting.groups(
        persons, pictures, (6 / 32, 6 / 32), layout, PEOPLE, first, first_identity
    )


_SAID = {"regular": "1/4 to 1/2", "small": "5 cells of 32: the only size from 1/7 to 1/6 on this grid"}
_BOUNDS = {TRUTH: Row("truth"), CEILING: Row("ceiling"), FLOOR: Row("floor")}
_DROPPED = {
    "without local branch": Row(options={"local_scale": 0.0}),
    "without global branch": Row(options={"global_scale": 0.0}),
}
_RETRAINED = {
    "without local branch, retrained": Row("global-only"),
    "without global branch, retrained": Row("local-only"),
}
EXPERIMENTS: dict[str, Experiment] = {
    "full-regular": Experiment(
        "The full model, regular faces", _table("regular"), {**_BOUNDS, FULL: Row()}, times=7
    ),
    **{
        f"table2-{size}": Experiment(
            f"Branches, {size} faces ({_SAID[size]})", _table(size), {**_BOUNDS, FULL: Row(), **_DROPPED, **_RETRAINED}
        )
        for size in SIZES
    },
    **{
        f"table3-{cells}": Experiment(
            f"Baselines of equal size, faces of {name} of the picture",
            _at(cells),
            {**_BOUNDS, FULL: Row(), "uncropped twin": Row("uncropped"), "boxed twin": Row("boxed"),
             "five keypoints": Row("five-keypoints")},
        )
        for name, cells in FACE_CELLS.items()
    },
    **{
        f"persons-{persons}-{layout}": Experiment(
            f"{persons} person{'s' * (persons > 1)}, {layout}, faces of 6 cells", _groups(persons, layout),
            {**_BOUNDS, FULL: Row()} if layout == "apart" else
            {TRUTH: Row("truth"), CEILING: Row("ceiling"), FULL: Row(),
             **{mode: Row(config={"overlap": mode}) for mode in ("average", "priority")}},
        )
        for persons, layout in ((1, "apart"), (2, "apart"), (3, "apart"), (2, "overlap"), (3, "overlap"))
    },
    # the figures above influenced the training, so these show other people
    **{
        f"persons-{persons}-others": Experiment(
            f"{persons} person{'s' * (persons > 1)}, apart, faces of 6 cells, forty other people",
            _groups(persons, first=500_000, first_identity=200), {**_BOUNDS, FULL: Row()},
        )
        for persons in (1, 3)
    },
    "guidance": Experiment(
        "Guidance, on people of no other table (regular and small faces)", _others,
        {f"λt {text:g}, λi {identity:g}": Row(options={"guidance_scale": text, "id_guidance_scale": identity})
         for text in (2.0, 3.0, 5.0) for identity in (2.0, 3.0, 5.0)},
    ),
    "null-id": Experiment(
        "Identity guidance λi (λt unchanged)", _table("regular"),
        {FULL: Row(), **{f"λi = {scale}": Row(options={"id_guidance_scale": scale})
                         for scale in (0.0, 1.0, 2.0, 4.0, 8.0)}},
    ),
    "delay": Experiment(
        "Delayed subject conditioning α", _table("regular"),
        {FULL: Row(), **{f"α = {ratio}": Row(options={"subject_conditioning_ratio": ratio})
                         for ratio in (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)}},
    ),
    "samplers": Experiment(
        "Samplers and steps", _table("regular"),
        {FULL: Row(), "ddim, 30 steps": Row(steps=30),
         **{f"{name}, {steps} steps": Row(sampler=name, steps=steps)
            for name in ("dpmpp-2m-karras", "unipc") for steps in (6, 8, 12, 16)}},
    ),
    "placement": Experiment(
        "Down-sampling of R and the grid of boxes", _table("regular"),
        {FULL: Row(), "relocate_mode area": Row(config={"relocate_mode": "area"}),
         "box_snap 16 px": Row(config={"box_snap": 16})},
    ),
    "precision": Experiment(
        "Precision: the engine, and plain torch with its networks in float32 and in float16", _table("regular"),
        {FULL: Row(), "the engine in float32": Row(device="cpu"), "plain torch, float32": Row("torch"),
         "plain torch, float16": Row("torch", options={"half": True})},
        alike=True,
    ),
}  # fmt: skip
