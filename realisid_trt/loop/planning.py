"""Which rows each step of a batch evaluates: what every request asks for in this step, before any network runs."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from ..backends import Backend
from ..branches import tokens_input
from ..errors import ShapeError
from ..manifest import Manifest
from ..persons.boxes import Grid
from ..request import OMITTED, Request
from .drafts import Draft, Plan, Stage, Texts
from .rows import (
    BranchRow,
    DecoderRow,
    EncoderRow,
    PictureRows,
    RowPlan,
    guidance_weights,
    in_interval,
    in_window,
    plan_rows,
    steps_without_id,
)
from .sampler_tables import Table

FEW_STEPS = 10  # with fewer a delay is easily most of them


class State(NamedTuple):
    """One request in one step.

    active:  of every branch of the table, whether it is evaluated.
    with_id: whether the UNet or an active branch brings the ID into the pictures.
    absent:  whether rows of "text_and_id" lack ID tokens.
    guided:  False outside the guidance interval, where λt = λi = 1.
    """

    active: tuple[bool, ...]
    with_id: bool
    absent: bool
    guided: bool


class Planner:
    """Plans the rows of an engine's batches, and refuses those for which the engine was not built."""

    def __init__(self, manifest: Manifest, backend: Backend, share_rows: bool) -> None:
        self._backend, self._share_rows = backend, share_rows
        self._config, self._model, self._table = manifest.config, manifest.model, manifest.config.table
        self._max_length = next(iter(manifest.model.tokenizers.values())).max_length

    def groups(self, drafts: Mapping[int, Draft], sampler: Table) -> list[dict[int, Draft]]:
        """Requests that may share the calls of a network, by their place, in the order of their first.

        Where ID tokens follow the text, the pictures of one call must have one number of tokens in every step: padding
        would change them. Elsewhere all requests are one group.
        """
        found: dict[Hashable, dict[int, Draft]] = {}
        for place, draft in drafts.items():
            key: Hashable = ()
            if self._config.unet_tokens == "text_and_id":
                switch = self.steps_without_id(draft, sampler) if draft.request.persons else 0
                key = len(draft.request.persons), switch if self._config.delayed_id == "absent" else 0
            found.setdefault(key, {})[place] = draft
        return list(found.values())

    def plan(self, drafts: Sequence[Draft], sampler: Table, grid: Grid) -> Plan:
        """The rows of every evaluation. Raises ShapeError for more pictures or rows than the engine was built for."""
        self.check_pictures(sum(draft.request.num_images for draft in drafts), grid)
        texts = Texts.distinct_of(draft.token_ids for draft in drafts)
        switches = [self.steps_without_id(draft, sampler) for draft in drafts]
        known: dict[Hashable, Stage] = {}
        of_steps: dict[int, Stage] = {}
        for step, sigma in zip(sampler.step_of.tolist(), sampler.sigmas.tolist(), strict=True):
            if step in of_steps:  # a step's second evaluation
                continue
            states = tuple(
                self._state(draft, step, switch, sampler.num_inference_steps, sigma)
                for draft, switch in zip(drafts, switches, strict=True)
            )
            if states not in known:
                known[states] = self._stage(self._pictures(drafts, texts, states))
                self._check_rows(known[states].rows, grid)
            of_steps[step] = known[states]
        plan = Plan(texts, [of_steps[step] for step in sampler.step_of.tolist()], sampler)
        self._check_conditions(drafts, plan, grid)
        return plan

    def check_pictures(self, count: int, grid: Grid) -> None:
        """Raises ShapeError for more pictures of this size than the engine was built for."""
        if count:
            self._backend.check("unet_encoder", {"latents": (count, self._model.latent_channels, *grid.size(0))})

    def steps_without_id(self, draft: Draft, sampler: Table) -> int:
        """How many steps of this request run without the ID, if it has persons."""
        ratio = draft.request.subject_conditioning_ratio
        alpha = self._config.subject_conditioning_ratio if ratio is OMITTED else ratio
        return steps_without_id(sampler.num_inference_steps, alpha, self._config.delay_rule)

    def notes(self, draft: Draft, sampler: Table) -> tuple[str, ...]:
        """What is unusual about the steps of this request, in sentences."""
        notes, steps, without = list[str](), sampler.num_inference_steps, self.steps_without_id(draft, sampler)
        if draft.request.persons and steps < FEW_STEPS and 3 * without > steps:
            notes.append(
                f"{without} of {steps} steps had no ID. With so few steps give subject_conditioning_ratio=None, which "
                "switches the delay off."
            )
        fixed, made_for = self._config.fixed_steps, self._config.default_sampler.name
        if fixed is not None and (steps, sampler.name) != (fixed, made_for):
            notes.append(f"these weights were made for {fixed} steps of {made_for}, not for {steps} of {sampler.name}.")
        if self._text_scale(draft.request) == 0:
            notes.append("guidance_scale 0 leaves the text out. No guidance, which model cards call 0, is 1 here.")
        return tuple(notes)

    def _text_scale(self, request: Request) -> float:
        return self._config.guidance_scale if request.guidance_scale is None else request.guidance_scale

    def _state(self, draft: Draft, step: int, switch: int, num_inference_steps: int, sigma: float) -> State:
        """sigma: of the step's first evaluation. A branch of scale 0 is evaluated only without sharing."""
        active = tuple(
            setting.given
            and (setting.scale != 0 or not self._share_rows)
            and in_window(step, num_inference_steps, setting.start, setting.end)
            for setting in draft.settings
        )
        guided = in_interval(sigma, draft.request.guidance_interval)
        if not draft.request.persons:
            return State(active, False, False, guided)
        if step < switch:
            return State(active, False, self._config.delayed_id == "absent", guided)
        carried = [
            branch.tokens != "text" and evaluated and setting.scale != 0
            for branch, evaluated, setting in zip(self._table, active, draft.settings, strict=True)
        ]
        return State(active, self._config.unet_tokens != "text" or any(carried), False, guided)

    def _pictures(self, drafts: Sequence[Draft], texts: Texts, states: Sequence[State]) -> list[PictureRows]:
        """states: of each request."""
        config, pictures, first = self._config, list[PictureRows](), 0
        for number, (draft, pair, state) in enumerate(zip(drafts, texts.of, states, strict=True)):
            request = draft.request
            id_scale = config.id_guidance_scale if request.id_guidance_scale is None else request.id_guidance_scale
            scales = (self._text_scale(request), id_scale) if state.guided else (1.0, 1.0)
            weights = guidance_weights(*scales, state.with_id)
            persons = tuple(range(first, first + len(request.persons)))
            picture = PictureRows(pair, persons, weights, state.active, number, state.absent)
            pictures += [picture] * request.num_images
            first += len(request.persons)
        return pictures

    def _stage(self, pictures: Sequence[PictureRows]) -> Stage:
        rows = plan_rows(pictures, self._table, self._config.unet_tokens, self._share_rows)
        return Stage(tuple(pictures), rows)

    def joined(self, stages: Sequence[Stage], texts: Sequence[int]) -> Stage:
        """The stage of requests that take a step together, one behind another. texts: how many each of them has."""
        pictures, first_text, first_person, first_request = list[PictureRows](), 0, 0, 0
        for stage, count in zip(stages, texts, strict=True):
            for picture in stage.pictures:
                none, text = picture.texts
                persons = tuple(first_person + person for person in picture.persons)
                pair, request = (first_text + none, first_text + text), first_request + picture.request
                pictures.append(replace(picture, texts=pair, persons=persons, request=request))
            first_text, first_request = first_text + count, pictures[-1].request + 1
            first_person += len(stage.pictures[-1].persons)
        return self._stage(pictures)

    def fits(self, stage: Stage, grid: Grid) -> bool:
        """Whether the engine was built for this many pictures and rows in a step."""
        try:
            self.check_pictures(len(stage.pictures), grid)
            self._check_rows(stage.rows, grid)
        except ShapeError:
            return False
        return True

    def _check_rows(self, plan: RowPlan, grid: Grid) -> None:
        check, model = self._backend.check, self._model

        def tokens(rows: Sequence[EncoderRow | DecoderRow | BranchRow]) -> tuple[int, int, int]:
            read = rows[0].tokens
            text = 0 if read.text is None else self._max_length
            return len(rows), text + len(read.ids) * model.num_id_tokens, model.cross_attention_dim

        check("unet_encoder", {"latents": (len(plan.encoder), model.latent_channels, *grid.size(0))})
        check("unet_decoder", {tokens_input(self._config.unet_tokens): tokens(plan.decoder)})
        for branch, rows in zip(self._table, plan.branches, strict=True):
            if rows.rows:
                check(f"{branch.name}_branch", {branch.tokens_input: tokens(rows.rows)})

    def _check_conditions(self, drafts: Sequence[Draft], plan: Plan, grid: Grid) -> None:
        side = self._model.default_size
        for place, (branch, evaluated) in enumerate(zip(self._table, plan.evaluated, strict=True)):
            if evaluated:
                shown = [draft.request for draft in drafts if draft.settings[place].given]
                count = sum(len(request.persons) if branch.per == "person" else 1 for request in shown)
                size = (side, side) if branch.view == "face" else (grid.height, grid.width)
                shape = count, branch.channels, *size
                self._backend.check(f"{branch.name}_condition", {branch.condition_input: shape})
