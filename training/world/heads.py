"""The geometry of heads: identity and pose → every point of a face, in three dimensions and in its face box.

Head units: the face is 1 high from forehead to chin, its centre is the origin, x points right in the picture, y down,
z to the viewer. A head turns as a rigid body and is seen from far away. The results of a runtime's face detector and
landmark net are defined here: the **face square** is the bounding box of the turned face outline, squared on its
longer edge about its centre, and landmarks are in [0, 1] of that square. (On real photos MTCNN's box, squared, and the
outline of MediaPipe's mesh agree to a few per cent.)
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from realisid_trt.errors import ShapeError
from realisid_trt.persons.mesh import (
    INNER_LIPS,
    JAW,
    LEFT_BROW,
    LEFT_EYE,
    LEFT_IRIS,
    NOSE_BASE,
    NOSE_RIDGE,
    NUM_LANDMARKS,
    OUTER_LIPS,
    RIGHT_BROW,
    RIGHT_EYE,
    RIGHT_IRIS,
)

from .people import FACTORS, POSE, Floats

FOREHEAD = (251, 284, 332, 297, 338, 10, 109, 67, 103, 54, 21)  # closes JAW to MediaPipe's face oval
RIGHT, LEFT = -1, 1  # the person's own sides; the right eye is on the left of the picture, at negative x
OUTLINE_STEPS = 36 * 3  # the face oval's 36 landmarks are every third vertex of the drawn outline
EYE_STEPS, LIP_STEPS, BROW_STEPS = 16 * 3, 20 * 3, 9


class Heads:
    """n heads at once; every curve below is (n, k, 3) in head units, and `project` takes it to the face square."""

    def __init__(self, factors: ArrayLike, poses: ArrayLike) -> None:
        """factors: (n, 27) of identities; poses: (n, 9), see `Pose.values`."""
        identity, pose = np.asarray(factors, np.float64), np.asarray(poses, np.float64)
        of = {name: identity[:, number, None] for number, name in enumerate(FACTORS)}
        does = {name: pose[:, number, None] for number, name in enumerate(POSE)}
        self.of, self.does = of, does
        self.half_width = 0.36 + 0.07 * of["face_width"]
        cos, sin = np.cos(pose[:, 2]), np.sin(pose[:, 2])
        self.roll = np.stack([np.stack([cos, -sin], -1), np.stack([sin, cos], -1)], -2)
        self._view = self.roll @ _rotations(pose[:, :2])  # (n, 2, 3)
        seen = self._seen(self.outline(np.arange(OUTLINE_STEPS) / OUTLINE_STEPS))
        low, high = seen.min(axis=1), seen.max(axis=1)
        self.side = (high - low).max(axis=1)  # (n,) head units per side of the face square
        self._corner = (low + high) / 2 - self.side[:, None] / 2

    def project(self, points: Floats) -> Floats:
        """(n, k, 3) head units → (n, k, 2) in [0, 1] of the face square."""
        return np.asarray((self._seen(points) - self._corner[:, None]) / self.side[:, None, None])

    def ellipse(self, centre: ArrayLike, radii: tuple[ArrayLike, ArrayLike], turns: Floats) -> Floats:
        """A ball seen from anywhere: its centre turns with the head, its outline stays an ellipse.

        centre: (3,) head units; radii: x and y, each a number or (k,); turns: (k,), 0 right, 1/4 down.
        Returns (n, k, 2) in [0, 1] of the face square.
        """
        angle = 2 * np.pi * turns
        x, y = np.broadcast_arrays(np.asarray(radii[0]) * np.cos(angle), np.asarray(radii[1]) * np.sin(angle))
        around = np.broadcast_to(np.stack([x, y], -1), (len(self.side), len(turns), 2))
        middle = self.project(np.broadcast_to(np.asarray(centre, np.float64), (len(self.side), 1, 3)))
        return np.asarray(middle + _applied(self.roll, around) / self.side[:, None, None])

    def landmarks(self) -> Floats:
        """(n, 478, 2) in [0, 1] of the face square, by MediaPipe's numbers: see `landmarks` below."""
        points = np.broadcast_to(self.project(self._tip()), (len(self.side), NUM_LANDMARKS, 2)).copy()
        oval = self.project(self.outline(np.arange(36) / 36))
        # `outline` starts at the top and goes right, the oval's landmarks (251 …) start five steps from the top
        points[:, JAW] = oval[:, (31 - np.arange(len(JAW))) % 36]
        points[:, FOREHEAD] = oval[:, (5 - np.arange(len(FOREHEAD))) % 36]
        for side, eye, iris, (upper, lower) in (
            (RIGHT, RIGHT_EYE, RIGHT_IRIS, RIGHT_BROW),
            (LEFT, LEFT_EYE, LEFT_IRIS, LEFT_BROW),
        ):
            points[:, eye] = self.project(self.eye(side, np.arange(16) / 16))
            points[:, iris[:1]] = self.project(self.iris(side, np.zeros(1), 0.0))
            points[:, iris[1:]] = self.project(self.iris(side, np.arange(4) / 4))
            along = np.linspace(-1, 1, 5)
            points[:, upper] = self.project(self.brow(side, along, -1))
            points[:, lower] = self.project(self.brow(side, along, 1))
        points[:, NOSE_RIDGE] = self.project(self.nose_ridge(np.linspace(0, 1, len(NOSE_RIDGE))))
        points[:, NOSE_BASE] = self.project(self.nose_base(np.linspace(-1, 1, len(NOSE_BASE))))
        points[:, OUTER_LIPS] = self.project(self.lips(np.arange(20) / 20, outer=True))
        points[:, INNER_LIPS] = self.project(self.lips(np.arange(20) / 20, outer=False))
        return points

    def outline(self, turns: Floats) -> Floats:
        """The edge of the face, from the top of the forehead clockwise as seen."""
        angle = 2 * np.pi * turns
        across, y = np.sin(angle), -0.5 * np.cos(angle)
        low = np.clip(y / 0.5, 0, 1)
        jaw = self.of["jaw"]
        power = np.where(y < 0, 0.80, 0.80 + (0.24 - 0.36 * jaw) * low)  # under 1: squarer than an ellipse
        x = self.half_width * np.sign(across) * np.abs(across) ** power * (1 - (0.20 - 0.14 * jaw) * low**2)
        y = y + 0.075 * self.does["mouth"] * low**2
        return _points(x, y, 0.4 * _depth(x, y))

    def eye(self, side: int, turns: Floats) -> Floats:
        """The opening between the lids: outer corner, lower lid, inner corner, upper lid."""
        angle = 2 * np.pi * turns
        width, lids = self._eye_width(), self.does["lids"]
        opening = np.where(lids < 0, 1 + lids, 1 + 0.35 * lids)
        squint = 1 - 0.35 * np.clip(self.does["smile"], 0, 1) * (lids <= 0.1)
        bow = np.sign(np.sin(angle)) * np.abs(np.sin(angle)) ** 0.85
        height = self._eye_height()
        upper = height * (1.05 * opening - 0.05) * (0.6 + 0.4 * squint)  # a shut lid lies on the lower one
        lower = height * (0.62 * squint)
        out = np.cos(angle)  # 1 at the outer corner
        drop = np.where(lids < 0, -lids, 0.0) * lower * np.abs(bow)
        y = np.where(bow > 0, lower * bow, upper * bow + drop)
        y = y - 0.045 * (self.of["eye_tilt"] - 0.4) * out
        x = side * (self.eye_x() + width * out)
        y = EYE_Y + y + np.zeros_like(x)
        return _points(x, y, _depth(x, y))

    def iris(self, side: int, turns: Floats, size: float = 1.0) -> Floats:
        """The rim of an iris, or of a disc `size` times as large about its centre."""
        angle, radius = 2 * np.pi * turns, 0.68 * self._eye_height() + 0.012
        x = side * self.eye_x() + self.does["gaze_x"] * 0.42 * self._eye_width()
        y = EYE_Y + (self.does["gaze_y"] * 0.38 - 0.12) * self._eye_height()
        x, y = x + size * radius * np.cos(angle), y + size * radius * np.sin(angle)
        return _points(x, y, _depth(x, y))

    def brow(self, side: int, along: Floats, edge: int) -> Floats:
        """One edge of a brow (-1 upper, 1 lower), from its outer end (-1) to its inner end (1)."""
        brows, thickness = self.does["brows"], 0.014 + 0.026 * self.of["brow_thickness"]
        slope = 0.055 * (self.of["brow_angle"] - 0.75) + 0.045 * np.clip(-brows, 0, 1) - 0.02 * np.clip(brows, 0, 1)
        height = EYE_Y - self._eye_height() - 0.070 - 0.055 * brows - 0.02 * (1 - along**2)
        taper = 0.55 + 0.45 * np.clip((along + 1) / 1.2, 0, 1)
        x = side * (self.eye_x() - (0.24 * self.half_width + 0.01 * np.clip(-brows, 0, 1)) * along)
        y = height + slope * along + edge * thickness * taper
        return _points(x, y, _depth(x, y))

    def nose_ridge(self, along: Floats) -> Floats:
        """From between the eyes (0) to the tip (1)."""
        y = EYE_Y + 0.01 + (self._nose_y() - EYE_Y - 0.01) * along
        return _points(0 * y, y, _depth(0 * y, y) + 0.14 * along**1.5)

    def nose_base(self, along: Floats) -> Floats:
        """Under the nose, from wing (-1) to wing (1)."""
        x = self._nose_width() * along
        y = self._nose_y() + 0.045 * np.sqrt(1 - along**2)
        return _points(x, y, _depth(x, y) + 0.14 - 0.03 * along**2)

    def nose(self, turns: Floats) -> Floats:
        """The drawn bulb of the nose, whose lower edge is the base."""
        angle = 2 * np.pi * turns
        x = self._nose_width() * np.cos(angle)
        y = self._nose_y() + np.where(np.sin(angle) > 0, 0.045, 0.05) * np.sin(angle)
        return _points(x, y, _depth(x, y) + 0.14 - 0.03 * np.cos(angle) ** 2)

    def lips(self, turns: Floats, *, outer: bool) -> Floats:
        """An edge of the lips: the corner left in the picture, lower lip, other corner, upper lip."""
        angle = 2 * np.pi * turns
        across, rise = -np.cos(angle), np.abs(np.sin(angle))
        mouth, smile = self.does["mouth"], self.does["smile"]
        width = (0.085 + 0.065 * self.of["mouth_width"]) * (1 + 0.22 * smile - 0.18 * mouth)
        full = 0.014 + 0.022 * self.of["lip_fullness"]
        seam = MOUTH_Y + (0.012 + 0.055 * smile) * (0.45 - across**2)  # corners up, middle down
        lower, upper = 0.125 * mouth, 0.03 * mouth
        thick = full if outer else 0.0
        bow = 1 - 0.35 * np.exp(-((across / 0.22) ** 2)) if outer else 1.0
        down = np.sin(angle) > 0
        y = seam + np.where(down, (lower + 1.25 * thick) * rise, -(upper + thick * bow) * rise)
        x = (width + (0.012 if outer else 0.0)) * across
        y = y + np.zeros_like(x)
        return _points(x, y, _depth(x, y) + 0.02)

    def on_face(self, x: ArrayLike, y: ArrayLike, lift: float = 0.0) -> Floats:
        """Points of the face's surface; x as a fraction of half the face's width, y in head units."""
        x, y = np.broadcast_arrays(self.half_width * np.asarray(x, np.float64), np.asarray(y, np.float64))
        return _points(x, y, _depth(x, y) + lift)

    def _tip(self) -> Floats:
        return self.nose_ridge(np.ones(1))

    def eye_x(self) -> Floats:
        """(n, 1) from the middle of the face to that of an eye."""
        return np.asarray(self.half_width * (0.40 + 0.08 * self.of["eye_gap"]))

    def _eye_width(self) -> Floats:
        return np.asarray(self.half_width * (0.20 + 0.06 * self.of["eye_size"]))

    def _eye_height(self) -> Floats:
        return np.asarray((0.042 + 0.020 * self.of["eye_size"]) * (0.8 + 0.45 * self.of["eye_height"]))

    def _nose_y(self) -> Floats:
        return np.asarray(0.05 + 0.065 * self.of["nose_length"])

    def _nose_width(self) -> Floats:
        return np.asarray(0.038 + 0.045 * self.of["nose_width"])

    def _seen(self, points: Floats) -> Floats:
        """(n, k, 3) head units → (n, k, 2) as seen, not yet in the square."""
        return _applied(self._view, points)


EYE_Y, MOUTH_Y = -0.09, 0.265


def landmarks(factors: ArrayLike, poses: ArrayLike) -> Floats:
    """Faces' landmarks, by MediaPipe's numbers, as `realisid_trt.persons.conditions.pose_image` takes them.

    factors: (n, 27) of identities; poses: (n, 9).

    Returns (n, 478, 2) float64 in [0, 1] of the face square. Face oval, brows, eyes, irises, nose and lips are where
    they are drawn (PLACED lists their numbers); the rest of the mesh, which nothing draws, stands at the nose's tip.
    Raises ShapeError.
    """
    identity, pose = np.asarray(factors), np.asarray(poses)
    if identity.ndim != 2 or identity.shape[1] != len(FACTORS) or pose.shape != (len(identity), len(POSE)):
        raise ShapeError(
            f"factors are {identity.shape} and poses {pose.shape}, expected (n, {len(FACTORS)}) and (n, {len(POSE)})."
        )
    return Heads(identity, pose).landmarks()


PLACED: NDArray[np.int64] = np.unique(
    np.concatenate([
        JAW, FOREHEAD, *RIGHT_BROW, *LEFT_BROW, RIGHT_EYE, LEFT_EYE, RIGHT_IRIS, LEFT_IRIS, NOSE_RIDGE, NOSE_BASE,
        OUTER_LIPS, INNER_LIPS,
    ])
)  # fmt: skip


def _points(x: Floats, y: Floats, z: Floats) -> Floats:
    points = np.empty((*np.broadcast_shapes(x.shape, y.shape, z.shape), 3))
    points[..., 0], points[..., 1], points[..., 2] = x, y, z
    return points


def _applied(matrices: Floats, points: Floats) -> Floats:
    """(n, 2, d) on (n, k, d) → (n, k, 2). Spelled out: a BLAS may round a batch of two unlike a batch of one."""
    return np.asarray(sum(points[..., d, None] * matrices[:, None, :, d] for d in range(points.shape[-1])))


def _depth(x: Floats, y: Floats) -> Floats:
    """How far the surface of a face stands out: flat enough that no eye leaves the outline at the largest yaw."""
    return np.asarray(0.22 * (1 - (x / 0.5) ** 2) - 0.10 * (y / 0.5) ** 2)


def _rotations(angles: Floats) -> Floats:
    """(n, 2) yaw and pitch → (n, 2, 3): rows x and y of the rotation, yaw first."""
    (cos_yaw, cos_pitch), (sin_yaw, sin_pitch) = np.cos(angles).T, np.sin(angles).T
    zero = np.zeros_like(cos_yaw)
    x = np.stack([cos_yaw, zero, sin_yaw], -1)
    y = np.stack([sin_yaw * sin_pitch, cos_pitch, -cos_yaw * sin_pitch], -1)
    return np.stack([x, y], 1)
