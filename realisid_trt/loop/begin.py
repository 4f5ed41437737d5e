"""Everything of a request before the loop, stage by stage: persons, text, time, conditions, noise."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from ..backends import Backend
from ..manifest import Manifest
from ..persons.boxes import Grid
from ..persons.people import People
from ..persons.prepared import PreparedPerson, Seen
from .controls import branches_of, drawings, with_images, with_patches
from .drafts import Draft
from .outcomes import Outcomes, Stopwatch
from .passes import Passes
from .prologue import Prologue
from .sampler_tables import Table
from .stages import Stages
from .work import Work


class Beginning:
    """Begins the works of an engine."""

    def __init__(
        self,
        manifest: Manifest,
        backend: Backend,
        people: People,
        prologue: Prologue,
        stages: Stages,
        passes: Passes,
    ) -> None:
        self._backend, self._people, self._prologue, self._stages = backend, people, prologue, stages
        self._table, self._passes = manifest.config.table, passes

    def see(self, draft: Draft, grid: Grid) -> Seen:
        """The persons of a request, and what every branch is shown but for their patches. Runs no network."""
        persons, table = draft.request.persons, self._table
        images = with_images(table, draft.settings)
        people = self._people.see_all(persons, grid, branches_of(table, draft.settings), images)
        return Seen(people, drawings(table, draft.settings, people, grid))

    def works(
        self,
        drafts: Mapping[int, Draft],
        seen: Mapping[int, Seen],
        sampler: Table,
        grid: Grid,
        outcomes: Outcomes,
        watch: Stopwatch,
        previews: bool = False,
    ) -> dict[int, Work]:
        """The works of requests, by place, without those that failed. Every stage is run for all before the next.

        watch: of the stages so far. previews: whether their steps predict the clean latents too.
        """
        works = {place: self._prologue.work(drafts[place], sampler, grid, watch.copy()) for place in seen}
        for work in works.values():
            work.owner = self._passes.token
        people: dict[int, Sequence[PreparedPerson]] = {}

        def persons(place: int) -> None:
            people[place] = self._people.prepare_all(seen[place].people)
            self._prologue.place_persons(works[place], people[place])

        def conditions(place: int) -> None:
            shown = with_patches(self._table, seen[place].drawings, people[place])
            self._prologue.embed_conditions(works[place], shown)
            noise = self._prologue.noise(drafts[place], sampler, grid)
            self._prologue.place_latents(works[place], noise, previews)

        stages: dict[str, Callable[[int], None]] = {
            "persons": persons,
            "text": lambda place: self._prologue.embed_texts(works[place]),
            "time": lambda place: self._prologue.embed_times(works[place]),
            "conditions": conditions,
        }
        places = {place: place for place in works}
        try:
            for name, stage in stages.items():
                self._stages.begin(name)
                places = outcomes.each(places, partial(self._run, name, stage, works))
        except BaseException:
            places = {}
            raise
        finally:
            for place in works.keys() - places.keys():
                self._passes.drop(works[place])
        return {place: works[place] for place in places}

    def _run(self, name: str, stage: Callable[[int], None], works: Mapping[int, Work], place: int) -> int:
        """A stage of one request: measured, and its rows counted. Returns its place."""
        work = works[place]
        self._backend.start_request()
        with work.watch(name):
            stage(place)
        work.count(self._backend.usage.rows)
        return place
