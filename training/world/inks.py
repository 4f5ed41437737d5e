"""The inks a person is painted with: the part that each belongs to, and its colour.

An evaluation asks for parts: "is there neck below the face, and in whose colour?"
"""

from __future__ import annotations

import numpy as np

from .people import Floats, Identity

PARTS = (
    "background", "face", "scalp", "ear", "neck", "arms", "hair", "brows", "eyes", "nose", "mouth", "beard", "glasses",
    "hat", "shirt", "trousers", "shoes",
)  # fmt: skip
HEAD_PARTS = ("face", "scalp", "ear", "hair", "brows", "eyes", "nose", "mouth", "beard", "glasses", "hat")
# ink → the part it belongs to; the first ink of a part is its main colour
INKS = {
    "face": "face", "face shade": "face", "cheeks": "face", "freckles": "face", "scalp": "scalp", "ear": "ear",
    "ear shade": "ear", "neck": "neck", "neck shade": "neck", "arms": "arms", "hair": "hair", "hair back": "hair",
    "hair light": "hair", "brows": "brows", "eye white": "eyes", "iris": "eyes", "pupil": "eyes", "glint": "eyes",
    "lid": "eyes", "nose": "nose", "nose line": "nose", "lips": "mouth", "mouth": "mouth", "teeth": "mouth",
    "tongue": "mouth", "beard": "beard", "glasses": "glasses", "hat": "hat", "hat band": "hat", "shirt": "shirt",
    "shirt shade": "shirt", "shirt line": "shirt", "trousers": "trousers", "trousers shade": "trousers",
    "shoes": "shoes",
}  # fmt: skip
INK_NUMBER = {ink: number for number, ink in enumerate(INKS)}
FACE_INKS = ("face", "face shade", "cheeks", "freckles")


def colors(identity: Identity, shirt: Floats, hat: Floats | None, trousers: Floats) -> Floats:
    """(len(INKS), 3) colour of every ink of a person, 0..1, before the light of the scene."""
    skin, hair, lips = identity.skin, identity.hair, identity.lips
    hat = shirt if hat is None else hat
    white = np.ones(3)
    table = {
        "face": skin, "face shade": skin * (0.90, 0.87, 0.86), "cheeks": skin * (1.0, 0.86, 0.84),
        "freckles": skin * (0.74, 0.66, 0.62),
        "scalp": skin * 0.97 if identity.traits["hair_style"] == "ring" else 0.45 * skin + 0.55 * hair,
        "ear": skin * 0.95, "ear shade": skin * (0.80, 0.74, 0.72),
        "neck": skin * (0.93, 0.91, 0.90), "neck shade": skin * (0.78, 0.74, 0.73), "arms": skin * 0.97,
        "hair": hair, "hair back": hair * (0.82, 0.73, 0.66), "hair light": hair + 0.16 * (1 - hair) * (0.4 + hair),
        "brows": hair * (0.76, 0.64, 0.56), "beard": hair * 0.88,
        "eye white": white * (0.92 + 0.07 * skin.mean()),  # the white of the eyes is dimmer in a dark face
        "iris": identity.eyes, "pupil": white * 0.05, "glint": white, "lid": np.minimum(hair * 0.4, skin * 0.45),
        "nose": skin * (0.88, 0.83, 0.81), "nose line": skin * (0.70, 0.62, 0.60),
        "lips": lips, "mouth": white * (0.32, 0.07, 0.09), "teeth": white * 0.98, "tongue": white * (0.83, 0.36, 0.38),
        "glasses": identity.frames, "hat": hat, "hat band": hat * 0.76,
        "shirt": shirt, "shirt shade": shirt * 0.82, "shirt line": shirt * 0.70,
        "trousers": trousers, "trousers shade": trousers * 0.8, "shoes": trousers * 0.45,
    }  # fmt: skip
    return np.asarray(np.clip([table[ink] for ink in INKS], 0, 1))
