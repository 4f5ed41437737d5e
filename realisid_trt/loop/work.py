"""A request on its way through the loop: what its steps read, how far they are, and what they took."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..backends import Tensor, Usage
from ..branches import Branch
from ..errors import BackendError, RequestError
from ..persons.boxes import Grid
from ..persons.person import PlacedPerson
from .drafts import Plan, Stage
from .outcomes import Stopwatch
from .prompt import TextEmbedding

LOST = "a step of this work failed, and its pictures are lost. Begin the request again."
ENDED = "this work was finished or dropped. Begin the request again."


@dataclass(eq=False, repr=False, kw_only=True)
class Work:
    """A request that was begun: `Engine.step` takes its steps, `Engine.finish` makes its pictures, `Engine.drop` leaves
    it. Read `seed`, `steps`, `steps_done` and `is_done`; the rest is the engine's.

    seed:          of the first picture.
    pictures:      how many it has.
    grid:          their size. plan: the rows of each evaluation, and the sampler's table.
    scales:        of every branch of the table, the factor of its residuals.
    notes, rows, step_ms: of its Result. watch: milliseconds of its stages.
    owner:         the `token` of its engine's passes. number: works of a pass stand in this order.
    ended:         why no step can follow.
    persons:       as they were placed.
    texts:         the embeddings of its K texts, as the UNet reads them.
    unet_emb:      (S, K, E) float32. branch_embs: the same of every branch, or (S, 1, E); None for one without rows.
    id_tokens:     (N, T', D) float32, of its N persons; None for an engine without identities.
    boxes:         (N, L, 4) int32, the cells of the faces.

    Kept on the device, in the backend's memory:

    conditions:    of every branch, (N or 1, C, h, w); None for one without rows.
    latents:       (pictures, C, h, w) float32, after the last step of a pass that ended.
    histories:     (pictures, H, C, h, w) float32; None for a sampler that keeps nothing.
    preview:       (pictures, C, h, w) float32, the clean latents as they were last predicted; None if nobody asked.
    """

    seed: int
    pictures: int
    grid: Grid
    plan: Plan
    scales: Sequence[float]
    notes: tuple[str, ...]
    watch: Stopwatch
    owner: Any = None
    number: int = field(default_factory=itertools.count().__next__)
    steps_done: int = 0
    persons: tuple[PlacedPerson, ...] = ()
    texts: Sequence[TextEmbedding] = ()
    unet_emb: NDArray[np.float32] = field(default_factory=lambda: np.zeros(0, np.float32))
    branch_embs: Sequence[NDArray[np.float32] | None] = ()
    id_tokens: NDArray[np.float32] | None = None
    boxes: NDArray[np.int32] = field(default_factory=lambda: np.zeros(0, np.int32))
    conditions: list[Tensor | None] = field(default_factory=list)
    latents: Tensor = None
    histories: Tensor | None = None
    preview: Tensor | None = None
    ended: str | None = None
    step_ms: list[float] = field(default_factory=list)
    rows: dict[str, int] = field(default_factory=dict)
    _ms: dict[str, float] = field(default_factory=dict)
    _unmeasured: set[str] = field(default_factory=set)

    def __repr__(self) -> str:
        return f"Work({self.steps_done} of {self.steps} steps)"

    @property
    def steps(self) -> int:
        """How many times `Engine.step` evaluates its networks: once a step, twice where the sampler has two evaluations
        in a step."""
        return len(self.plan.stages)

    @property
    def is_done(self) -> bool:
        """Whether all steps were taken, so that `Engine.finish` can make the pictures."""
        return self.steps_done >= self.steps

    @property
    def stage(self) -> Stage:
        """What its next step evaluates."""
        return self.plan.stages[self.steps_done]

    def check(self) -> None:
        """Raises RequestError if it was finished or dropped, BackendError if a step failed."""
        if self.ended is not None:
            raise (BackendError if self.ended == LOST else RequestError)(self.ended)

    def check_done(self) -> None:
        """Raises RequestError if steps are left."""
        if not self.is_done:
            raise RequestError(
                f"{self.steps_done} of {self.steps} steps were taken. Call step until is_done, or drop the work."
            )

    def check_preview(self) -> None:
        """Raises RequestError if there is nothing to preview."""
        if self.preview is None:
            raise RequestError("this work has no previews. Begin it with previews=True.")
        if not self.steps_done:
            raise RequestError("this work took no step yet, so there is nothing to preview. Call step first.")

    def kept(self) -> list[Tensor]:
        """All that it keeps on the device."""
        tensors = (*self.conditions, self.latents, self.histories, self.preview)
        return [tensor for tensor in tensors if tensor is not None]

    def count(self, rows: Mapping[str, int]) -> None:
        """Adds rows that were evaluated for it, by network or kernel."""
        for name, number in rows.items():
            self.rows[name] = self.rows.get(name, 0) + number

    def count_steps(self, table: Sequence[Branch]) -> None:
        """Adds what its steps evaluated and took. Called once, between the stages before and after them."""
        self.watch.ms["denoise"] = sum(self.step_ms)
        for stage in self.plan.stages[: self.steps_done]:
            self.count(rows_of(stage, self.pictures, table))

    def measure(self, ms: float, usage: Usage) -> None:
        """Adds the milliseconds of a step, and of what was run in it."""
        self.step_ms.append(ms)
        measured = usage.ms
        self._unmeasured |= usage.rows.keys() - measured.keys()
        for name, each in measured.items():
            self._ms[name] = self._ms.get(name, 0.0) + each

    def timings(self, names: Sequence[str]) -> Mapping[str, float]:
        """Milliseconds of every stage, and in the loop of each of these networks and kernels."""
        parts = {name: ms for name, ms in self._ms.items() if name not in self._unmeasured}
        return self.watch.with_parts("denoise", names, parts)


def rows_of(stage: Stage, pictures: int, table: Sequence[Branch]) -> dict[str, int]:
    """The rows of a step by network or kernel, in the order in which they run."""
    plan, found = stage.rows, dict[str, int]()
    for branch, rows in zip(table, plan.branches, strict=True):
        if rows.rows and branch.view == "face":
            found["crop_upsample"] = found.get("crop_upsample", 0) + len(rows.rows)
        if rows.rows:
            found[f"{branch.name}_branch"] = len(rows.rows)
    merged = {"relocate_merge": len(plan.decoder)} if found else {}
    return {
        **found,
        "unet_encoder": len(plan.encoder),
        **merged,
        "unet_decoder": len(plan.decoder),
        "guide_step": pictures,
    }
