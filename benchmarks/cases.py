"""The shapes that the kernels are timed at: SDXL's, with realistic numbers and sizes of faces."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

SDXL = ((320, 0),) * 3 + ((320, 1),) + ((640, 1),) * 2 + ((640, 2),) + ((1280, 2),) * 3  # channels, level; mid last
CANVAS, CHANNELS, FACTOR, LEVELS = 128, 4, 8, 3
PICTURES = ((1024, 1024), (832, 1216))  # height, width, px
FACES, FRACTIONS = (1, 2, 4, 8), (2, 4, 7)


@dataclass(frozen=True)
class Case:
    """One shape. rows: 1, a plain row; 3, the none, text and full row of guidance (two encoder rows).

    histories, noise: of the sampler; only guide_step reads them.
    """

    height: int
    width: int
    faces: int
    fraction: int
    rows: int
    histories: int = 0
    noise: bool = False

    @property
    def encoder_of(self) -> list[int]:
        return [0, 1, 1][: self.rows] if self.rows == 3 else [0]

    @property
    def branches_of(self) -> list[list[int]]:
        """The null ID's branch rows first, then the persons' own."""
        null, own = list(range(self.faces)), list(range(self.faces, 2 * self.faces))
        return [null, null, own] if self.rows == 3 else [null]

    @property
    def branch_rows(self) -> int:
        return self.faces * (2 if self.rows == 3 else 1)

    @property
    def matrix(self) -> list[list[float]]:
        """(4, 5), what guide_step computes in its steps: of few, the latents stay small."""
        none = [0.0] * 5
        latents = [0.9, 0.1, -0.05 if self.histories else 0.0, 0.03 if self.histories > 1 else 0.0, 0.02 * self.noise]
        clean, ahead = [1.2, -0.4, 0.0, 0.0, 0.0], [0.8, 0.1, 0.05, -0.02, 0.0]
        return [latents, *([], [clean], [ahead, clean])[self.histories], *[none] * (3 - self.histories)]

    def cells(self, level: int) -> tuple[int, int]:
        """Height and width of the picture at a level."""
        return self.height // FACTOR >> level, self.width // FACTOR >> level

    def box(self, face: int, level: int) -> tuple[int, int, int, int]:
        """x0, y0, x1, y1 of one face: the faces stand in a row, and overlap if the picture is too narrow."""
        height, width = self.cells(0)
        side = max(4, min(height, width) // self.fraction)
        x, y = (width - side) * face // max(1, self.faces - 1), (height - side) // 2
        side_k = max(1, int(side / 2**level + 0.5))
        return x >> level, y >> level, (x >> level) + side_k, (y >> level) + side_k


def cases() -> Iterator[Case]:
    for height, width in PICTURES:
        for faces in FACES:
            for fraction in FRACTIONS:
                for rows in (1, 3):
                    yield Case(height, width, faces, fraction, rows)


def sampler_cases() -> Iterator[Case]:
    """Of guide_step, beside DDIM's step, which keeps nothing: one history and noise, as DPM++ 2M SDE has them, and two
    histories, as UniPC has them."""
    for height, width in PICTURES:
        for histories, noise in ((1, True), (2, False)):
            yield Case(height, width, FACES[0], FRACTIONS[0], 3, histories, noise)
