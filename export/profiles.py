"""TensorRT's profiles: the rows that each network of an engine may get, computed from the row plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from realisid_trt.config import RealisIDConfig
from realisid_trt.loop.rows import PictureRows, guidance_weights, plan_rows

from .forms import Limits
from .networks import Port, Size

ALL_ROWS = 7.5, 5.0  # λt and λi with which no row of Eq. (8) has the weight zero
MOST_STEPS = 1000


@dataclass(frozen=True)
class Profile:
    """Sizes of every unit ("rows", "timesteps", "height", "width", "tokens") that a plan is built for.

    "tokens" is missing where no network reads the text and IDs together.

    The plan takes sizes from least to most, and is fastest at the best.
    """

    least: dict[str, int]
    best: dict[str, int]
    most: dict[str, int]

    @property
    def limits(self) -> Limits:
        """The limits of the inputs, for the manifest."""
        rows, timesteps, side = ((self.least[unit], self.most[unit]) for unit in ("rows", "timesteps", "height"))
        tokens = (self.least["tokens"], self.most["tokens"]) if "tokens" in self.most else None
        return Limits(rows=rows, timesteps=timesteps, side=side, tokens=tokens)

    def shapes(self, port: Port) -> tuple[list[int], list[int], list[int]] | None:
        """Least, best and most of one input; None if its shape is constant."""
        if not any(isinstance(size, Size) for size in port.shape):
            return None
        least, best, most = (
            [units[size.unit] * size.factor if isinstance(size, Size) else size for size in port.shape]
            for units in (self.least, self.best, self.most)
        )
        return least, best, most


def profiles(
    networks: Sequence[str],
    pictures: int,
    persons: int,
    side: tuple[int, int, int],
    steps: int,
    config: RealisIDConfig,
    tokens: tuple[int, int, int] | None = None,
) -> dict[str, Profile]:
    """The profile of every network, for batches of up to `pictures` pictures with up to `persons` persons each.

    side:           least, best and most of a picture's height and width, in cells of the coarsest level.
    steps:          the usual number of denoising steps.
    config:         the branches, and the guidance that a request has by default.
    tokens:         least, best and most tokens of a row that reads text and IDs; None where none does.
    """
    usual = config.guidance_scale, config.id_guidance_scale
    best, most = _rows(1, min(persons, 1), config, usual), _rows(pictures, persons, config, ALL_ROWS)
    by_text = {"unet_time", *(f"{branch.name}_time" for branch in config.table if branch.pooled == "per_row")}
    counts: list[dict[str, int]] = [{} if tokens is None else {"tokens": count} for count in tokens or (0, 0, 0)]
    found = {}
    for name in networks:
        # A network without an entry runs once per prompt, photo or picture, one row at a time.
        one, many = max(1, best.get(name, 1)), max(1, most.get(name, 1))
        texts = 2 if name in by_text else 1
        found[name] = Profile(
            least={"rows": 1, "timesteps": 1, "height": side[0], "width": side[0], **counts[0]},
            best={"rows": one, "timesteps": steps * texts, "height": side[1], "width": side[1], **counts[1]},
            most={
                "rows": many,
                "timesteps": MOST_STEPS * texts * pictures,
                "height": side[2],
                "width": side[2],
                **counts[2],
            },
        )
    return found


def _rows(pictures: int, persons: int, config: RealisIDConfig, guidance: tuple[float, float | None]) -> dict[str, int]:
    """Rows of the networks that run on a whole batch, when every picture has texts and persons of its own.

    guidance: λt and λi.
    """
    table = config.table
    active = (True,) * len(table)
    reads_id = config.unet_tokens == "text_and_id" or any(branch.tokens != "text" for branch in table)
    weights = guidance_weights(*guidance, with_id=reads_id)
    batch = [
        PictureRows((2 * b, 2 * b + 1), tuple(range(persons * b, persons * (b + 1))), weights, active, b)
        for b in range(pictures)
    ]
    plan = plan_rows(batch, table, config.unet_tokens)
    rows = {"unet_encoder": len(plan.encoder), "unet_decoder": len(plan.decoder)}
    for branch, of in zip(table, plan.branches, strict=True):
        rows[f"{branch.name}_branch"] = len(of.rows)
        rows[f"{branch.name}_condition"] = pictures * (persons if branch.per == "person" else 1)
    return rows
