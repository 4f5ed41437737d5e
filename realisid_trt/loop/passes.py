"""Works that take a step together: a pass is put together when its members or their rows change, then stepped.

A work keeps its latents, histories and conditions on the device. A pass has copies of them, one work behind another, in
memory of its own; when it ends, the latents and histories go back. So any works may take the next step, in any order.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..backends import Backend, Tensor, Usage
from ..config import RealisIDConfig
from ..errors import BackendError, RequestError
from .denoise import Batch, BranchTables, step_of
from .drafts import Stage
from .noise import step_noise
from .planning import Planner
from .work import ENDED, LOST, Work

AHEAD = 1  # steps that the backend may be behind: it stays busy while the next one is put together


class _Pass(NamedTuple):
    """Works and the stage of each, which last as long as the pass; what its steps read; and a function for a step."""

    works: Sequence[Work]
    stages: Sequence[Stage]
    batch: Batch
    run: Callable[[], None]

    def is_of(self, works: Sequence[Work]) -> bool:
        """Whether the next step of these works is one more of this pass."""
        if len(works) != len(self.works):
            return False
        own = zip(self.works, self.stages, strict=True)
        return all(work is given and given.stage is stage for given, (work, stage) in zip(works, own, strict=True))


class _EnqueuedStep(NamedTuple):
    """A step that was enqueued: markers before and after it, and what it ran."""

    works: Sequence[Work]
    start: Any
    end: Any
    usage: Usage


class Passes:
    """The passes of one engine, one at a time."""

    def __init__(
        self, config: RealisIDConfig, backend: Backend, planner: Planner, null_id_tokens: NDArray[np.float32] | None
    ) -> None:
        """null_id_tokens: (T', D), of the engine's constants; None without identities."""
        self._backend, self._planner = backend, planner
        self._config, self._table, self._null_id_tokens = config, config.table, null_id_tokens
        self.token = object()  # the owner of this engine's works
        self._current: _Pass | None = None
        self._enqueued = deque[_EnqueuedStep]()

    def checked(self, works: object) -> list[Work]:
        """The works. Raises RequestError for anything else, one twice, one of another engine, and one that ended;
        BackendError for a lost one."""
        given = list(works) if isinstance(works, Sequence) else []
        if not isinstance(works, Sequence) or not all(isinstance(work, Work) for work in given):
            raise RequestError(f"{works!r:.200} is not a list of what Engine.begin returned.")
        if len(set(map(id, given))) != len(given):
            raise RequestError("a work stands twice in the list, and takes one step at a time. Give each once.")
        for work in given:
            if work.owner is not self.token:
                raise RequestError("a work is of another engine. Give it to the engine that began it.")
            work.check()
        return given

    def step(self, works: Sequence[Work]) -> None:
        """One step of each work, with as few runs of the networks as the sizes, the lengths of the token sequences and
        the engine's limits allow. May return before it is done; a step earlier is done.

        Raises BackendError, or EngineMismatch for networks that were replaced while they were not loaded: works that
        shared a pass with the failure are lost.
        """
        for group in self._groups(sorted(works, key=lambda work: work.number)):
            self._step(group)

    def latents(self, work: Work) -> NDArray[np.float32]:
        """(pictures, C, h, w): the latents of a work after its last step. Waits for it; the pass ends."""
        self._settle(0)
        if self._current is not None and work in self._current.works:
            self._end()
        return self._backend.get(work.latents)

    def preview(self, work: Work) -> NDArray[np.float32]:
        """(pictures, C, h, w): the clean latents as the last step predicted them. Waits for it; the pass goes on."""
        backend = self._backend
        if self._current is None or work not in self._current.works:
            return backend.get(work.preview)
        batch, pictures = self._current.batch, enumerate(_pictures(self._current.works))
        return np.stack([backend.get(backend.part(batch.preview, at)) for at, (of, _) in pictures if of is work])

    def drop(self, work: Work) -> None:
        """Frees what the work keeps. Its pass ends with the next step of the others.

        Raises RequestError for a work of another engine.
        """
        if getattr(work, "owner", None) is not self.token:
            self.checked([work])
        work.ended = ENDED
        self._free(work)
        if self._current is not None and all(each.ended for each in self._current.works):
            self._current = None

    def clear(self) -> None:
        """Forgets the current pass. No step may follow."""
        self._current = None
        self._enqueued.clear()

    def _free(self, work: Work) -> None:
        tensors = work.kept()
        work.conditions, work.latents, work.histories, work.preview = [], None, None, None
        with ExitStack() as then:  # a failure of one does not skip the next
            for tensor in tensors:
                then.callback(self._backend.free, tensor)

    def _groups(self, works: Sequence[Work]) -> list[list[Work]]:
        """Works that take a step in one run of the networks: each joins the first group in which it fits."""
        if self._current is not None and self._current.is_of(works):
            return [list(works)]
        groups: list[list[Work]] = []
        for work in works:
            for group in groups:
                is_alike = (group[0].grid, group[0].stage.ids) == (work.grid, work.stage.ids)
                if is_alike and self._planner.fits(self._joined([*group, work]), work.grid):
                    group.append(work)
                    break
            else:
                groups.append([work])
        return groups

    def _joined(self, works: Sequence[Work]) -> Stage:
        if len(works) == 1:
            return works[0].stage
        return self._planner.joined([work.stage for work in works], [len(work.texts) for work in works])

    def _step(self, works: Sequence[Work]) -> None:
        backend, concerned = self._backend, list(works)
        try:
            start, usage = backend.stamp(), backend.start_usage()
            if self._current is not None and self._current.is_of(works):
                memory = backend.in_pass()
            else:
                concerned = [*self._current.works, *works] if self._current is not None else concerned
                self._end()
                concerned, memory = list(works), backend.start_pass()
            with memory:
                if self._current is None:
                    self._current = self._begun(works)
                if any(work.plan.sampler.draws[work.steps_done] for work in works):
                    backend.write(self._current.batch.noise, self._noise(works))  # a replayed step reads it there
                self._current.run()
            self._enqueued.append(_EnqueuedStep(works, start, backend.stamp(), usage))
            for work in works:
                work.steps_done += 1
            self._settle(AHEAD)
        except BaseException:
            self._lose(concerned)
            raise

    def _lose(self, works: Sequence[Work]) -> None:
        """Ends works whose step failed, and frees what they keep."""
        self._current = None
        self._enqueued = deque(step for step in self._enqueued if not any(work in works for work in step.works))
        for work in works:
            if work.ended is None:
                work.ended = LOST
                with suppress(BackendError):
                    self._free(work)

    def _settle(self, ahead: int) -> None:
        """Waits for all steps but the latest few, and reads their times."""
        while len(self._enqueued) > ahead:
            works, start, end, usage = self._enqueued.popleft()
            [ms] = self._backend.elapsed_ms([start, end])
            for work in works:
                work.measure(ms, usage)

    def _begun(self, works: Sequence[Work]) -> _Pass:
        batch = self._batch(works)
        run = step_of(self._backend, batch)
        if len(batch.plan.decoder_of) == 1:  # of several pictures a graph would hardly ever come again
            run = self._backend.repeated(run)
        return _Pass(works, [work.stage for work in works], batch, run)

    def _end(self) -> None:
        """Gives the works of the current pass their latents, histories and previews."""
        if self._current is None:
            return
        batch, works, copy, part = self._current.batch, self._current.works, self._backend.copy, self._backend.part
        for number, (work, place) in enumerate(_pictures(works)):
            if work.ended is not None:
                continue
            if batch.latents is not work.latents:
                copy(part(batch.latents, number), part(work.latents, place))
            for kept in range(work.plan.sampler.histories):
                copy(part(batch.histories, number, kept), part(work.histories, place, kept))
            if work.preview is not None:
                copy(part(batch.preview, number), part(work.preview, place))
        self._current = None

    # What a pass reads

    def _batch(self, works: Sequence[Work]) -> Batch:
        backend, put, stage = self._backend, self._backend.put, self._joined(works)
        shape, ends = works[0].latents.shape[1:], np.cumsum([work.steps for work in works])
        step = [end - work.steps + work.steps_done for work, end in zip(works, ends, strict=True)]
        prompt_embeds, id_tokens, token_rows = self._tokens(works)
        return Batch(
            latents=backend.join([work.latents for work in works]),
            step=put(np.repeat(step, [work.pictures for work in works]).astype(np.int32)),
            plan=stage.rows,
            matrix=put(np.concatenate([work.plan.sampler.matrix for work in works])),
            histories=self._histories(works, shape),
            noise=self._zeros(any(work.plan.sampler.draws.any() for work in works), stage, shape),
            preview=self._zeros(any(work.preview is not None for work in works), stage, shape),
            prompt_embeds=prompt_embeds,
            columns=np.concatenate([np.arange(len(work.texts), dtype=np.int32) for work in works]),
            unet_tokens=self._config.unet_tokens,
            unet_emb=put(_side_by_side([work.unet_emb for work in works]), for_networks=True),
            table=self._table,
            branches=[self._branch(place, works, stage) for place in range(len(self._table))],
            id_tokens=id_tokens,
            token_rows=token_rows,
            boxes=np.concatenate([work.boxes for work in works]),
        )

    def _zeros(self, wanted: bool, stage: Stage, shape: Sequence[int]) -> Tensor | None:
        """(B, C, h, w) float32, if anybody wants it."""
        return self._backend.put(np.zeros((len(stage.pictures), *shape), np.float32)) if wanted else None

    def _histories(self, works: Sequence[Work], shape: Sequence[int]) -> Tensor | None:
        """(B, H, C, h, w) float32, H the most that a sampler keeps; None if none keeps anything."""
        kept, pictures = [work.plan.sampler.histories for work in works], _pictures(works)
        if not any(kept):
            return None
        histories = self._backend.put(np.zeros((len(pictures), max(kept), *shape), np.float32))
        for number, (work, place) in enumerate(pictures):
            for history in range(work.plan.sampler.histories):
                source = self._backend.part(work.histories, place, history)
                self._backend.copy(source, self._backend.part(histories, number, history))
        return histories

    def _noise(self, works: Sequence[Work]) -> NDArray[np.float32]:
        """(B, C, h, w): the noise of the next step, every picture's from its own seed; zeros where none is drawn."""
        drawn = []
        for work, place in _pictures(works):
            sampler, shape = work.plan.sampler, tuple(work.latents.shape[1:])
            draws, row = sampler.draws[work.steps_done], sampler.row_of[work.steps_done]
            drawn.append(step_noise(work.seed + place, row, shape) if draws else np.zeros(shape, np.float32))
        return np.stack(drawn)

    def _branch(self, place: int, works: Sequence[Work], stage: Stage) -> BranchTables | None:
        """What a branch reads; None for one without rows."""
        branch, embs = self._table[place], [work.branch_embs[place] for work in works]
        if not stage.rows.branches[place].rows:
            return None
        width = next(emb.shape[-1] for emb in embs if emb is not None)
        shaped = [
            np.zeros((work.steps, 1, width), np.float32) if emb is None else emb
            for work, emb in zip(works, embs, strict=True)
        ]
        drawn = np.concatenate(
            [
                np.full(len(work.boxes) if branch.per == "person" else 1, work.conditions[place] is not None)
                for work in works
            ]
        )
        return BranchTables(
            emb=self._backend.put(_side_by_side(shaped), for_networks=True),
            condition=self._backend.join([c for work in works if (c := work.conditions[place]) is not None]),
            condition_of=np.where(drawn, np.cumsum(drawn) - 1, -1).astype(np.int32),
            scales=np.array([work.scales[place] for work, _ in _pictures(works)], np.float32),
        )

    def _tokens(self, works: Sequence[Work]) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """`prompt_embeds`, `id_tokens` and `token_rows` of a Batch."""
        put, prompt_embeds = self._backend.put, np.stack([text.prompt_embeds for work in works for text in work.texts])
        text_tokens = put(prompt_embeds, for_networks=True)
        if self._null_id_tokens is None:
            return text_tokens, None, None
        given = [work.id_tokens for work in works if work.id_tokens is not None]
        ids = np.concatenate([self._null_id_tokens[None], *given])
        id_tokens = put(ids, for_networks=True)
        if self._config.unet_tokens == "text":
            return text_tokens, id_tokens, None
        width = ids.shape[-1]
        rows = np.concatenate([prompt_embeds.reshape(-1, width), ids.reshape(-1, width)])
        return text_tokens, id_tokens, put(rows, for_networks=True)


def _pictures(works: Sequence[Work]) -> list[tuple[Work, int]]:
    """Every picture of a pass: its work, and its number there."""
    return [(work, place) for work in works for place in range(work.pictures)]


def _side_by_side(tables: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
    """(ΣS, K, E): the (S, K, E) tables of all works one behind another; those with fewer columns end with zeros."""
    most = max(table.shape[1] for table in tables)
    return np.concatenate([np.pad(table, ((0, 0), (0, most - table.shape[1]), (0, 0))) for table in tables])
