"""Helpers that the tests of the world share."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from training.world import (
    FACTORS,
    Identity,
    Light,
    Picture,
    Pose,
    Scene,
    World,
)

WORLD = World(seed=3)
FOLDER = Path(__file__).resolve().parents[2] / "training" / "world"


def same(one: Picture, other: Picture) -> bool:
    return all(
        np.array_equal(getattr(one, field.name), getattr(other, field.name)) for field in dataclasses.fields(Picture)
    )


def bare(identity: Identity) -> Identity:
    """The same face without anything that may cover it: cropped hair, no glasses, no beard."""
    factors = identity.factors.copy()
    for name in ("hair_style", "glasses", "beard"):
        factors[FACTORS.index(name)] = 0.0
    return Identity((*identity.name, "bare"), factors)


def portrait(identity: Identity, pose: Pose, cells: int = 32, light: Light | None = None) -> Scene:
    scene = WORLD.scene(0, face=(cells / 64, cells / 64), caption="a person in a blue shirt in a studio",
                        identities=[identity], poses=[pose])  # fmt: skip
    return dataclasses.replace(scene, light=light or Light())
