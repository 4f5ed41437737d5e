"""The outcome of each request of a batch: its result or its error, and the time that each stage took."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

from ..errors import BackendError, RealisIDError
from ..request import Progress, Result

In = TypeVar("In")
Out = TypeVar("Out")


class Outcomes:
    """Runs the stages of a batch request by request.

    errors: of the requests that failed, by their place in the batch.
    """

    def __init__(self, count: int, keep: bool) -> None:
        """count: requests of the batch. keep: a failure is kept, and the others go on; else it is raised."""
        self.errors: dict[int, RealisIDError] = {}
        self._count, self._keep = count, keep

    @contextmanager
    def of(self, place: int) -> Iterator[None]:
        """A context for work on one request. A BackendError is raised in any case: it concerns all requests."""
        try:
            yield
        except BackendError:
            raise
        except RealisIDError as error:
            if self._count > 1:
                error.request = place + 1
            if not self._keep:
                raise
            self.errors[place] = _without_frames(error)

    def each(self, items: Mapping[int, In], work: Callable[[In], Out]) -> dict[int, Out]:
        """The result of `work` for each item, by place, without those that failed."""
        done: dict[int, Out] = {}
        for place, item in items.items():
            with self.of(place):
                done[place] = work(item)
        return done

    def in_order(self, results: Mapping[int, Result]) -> list[Result | RealisIDError]:
        """A result or an error for every request."""
        return [self.errors[place] if place in self.errors else results[place] for place in range(self._count)]


class Stopwatch:
    """`with watch("text"): …` adds to `watch.ms["text"]`."""

    def __init__(self) -> None:
        self.ms: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.ms[stage] = self.ms.get(stage, 0.0) + (time.perf_counter() - start) * 1e3

    def copy(self) -> Stopwatch:
        """Another one that goes on from here."""
        other = Stopwatch()
        other.ms = dict(self.ms)
        return other

    def with_parts(self, stage: str, names: Iterable[str], parts: Mapping[str, float]) -> dict[str, float]:
        """Milliseconds of every stage; after this one, those of its parts with these names, as STAGE.NAME."""
        timings: dict[str, float] = {}
        for each, ms in self.ms.items():
            timings[each] = ms
            if each == stage:
                timings |= {f"{stage}.{name}": parts[name] for name in names if name in parts}
        return timings


def _without_frames(error: RealisIDError) -> RealisIDError:
    """The error without tracebacks: their frames would hold the batch, its photos and the engine."""
    link: BaseException | None = error
    while link is not None:
        link.__traceback__ = None
        link = link.__cause__ or link.__context__
    return error


def part_of(progress: Progress, number: int, parts: int) -> Progress:
    """The callback of one pass of a batch, which counts the steps of all. number: of the pass, from 0."""
    return lambda done, total: progress(number * total + done, parts * total)
