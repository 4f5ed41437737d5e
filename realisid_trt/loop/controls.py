"""What a request says about each branch of the table: its factor, its window, and the picture that it is shown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..branches import Branch
from ..checks import own_array
from ..errors import RequestError
from ..persons.bodies import body_drawing
from ..persons.boxes import Grid
from ..persons.conditions import face_drawing, location_mask
from ..persons.patches import paint_patches
from ..persons.person import Person, gives_all, names_drawing
from ..persons.photo import BLACK, Photo, load_photo
from ..persons.prepared import DrawnPerson, PreparedPerson
from ..request import Control, Request


@dataclass(frozen=True, eq=False)
class Setting:
    """One branch in one request.

    scale, start, end: see `Control`. image: (C, H, W) float32 in [0, 1], or None.
    draws: of each person, whether the branch draws it. notes: on the image, in sentences.
    """

    scale: float
    start: float
    end: float
    image: NDArray[np.float32] | None
    draws: tuple[bool, ...]
    notes: tuple[str, ...] = ()

    @property
    def given(self) -> bool:
        """Whether the branch is shown anything."""
        return self.image is not None or any(self.draws)


def settings(request: Request, table: Sequence[Branch], grid: Grid) -> tuple[Setting, ...]:
    """The setting of every branch. request: checked. Raises RequestError, PhotoError."""
    names, controls = [branch.name for branch in table], request.controls or {}
    if unknown := [name for name in controls if name not in names]:
        has = f"it has {', '.join(names)}" if names else "it has none"
        alias = f" (or {unknown[0]}_scale was given)" if unknown[0] in ("local", "global") else ""
        raise RequestError(f"controls names {unknown[0]!r}{alias}, and this engine has no such branch: {has}.")
    return tuple(_setting(branch, controls.get(branch.name, Control()), request, grid) for branch in table)


def _setting(branch: Branch, control: Control, request: Request, grid: Grid) -> Setting:
    scale = branch.scale if control.scale is None else control.scale
    start = branch.start if control.start is None else control.start
    end = branch.end if control.end is None else control.end
    if not 0 <= start < end <= 1:
        raise RequestError(
            f"the control {branch.name} has start {start:g} and end {end:g}, expected 0 <= start < end <= 1: shares of "
            "the steps."
        )
    image, notes = None, tuple[str, ...]()
    if control.image is not None:
        if branch.per != "picture":
            raise RequestError(
                f"the control {branch.name} has an image, but that branch draws every person by itself. "
                f"{_advice(branch)}"
            )
        image, notes = control_image(control.image, branch, grid)
    draws = _draws(branch, request.persons, scale, image is not None)
    setting = Setting(scale, start, end, image, draws, notes)
    expected = not branch.optional and scale != 0 and (request.persons or branch.condition == "image")
    if expected and not setting.given:
        raise RequestError(f"the branch {branch.name} needs something to draw. {_advice(branch)}")
    return setting


def _draws(branch: Branch, persons: Sequence[Person], scale: float, has_image: bool) -> tuple[bool, ...]:
    """Of each person, whether a branch draws it. ID patches are painted on the caller's image too.

    A branch that takes part asks every person for a pose and a box; an optional one asks those who name a drawing for
    it. `People` says what is missing. Nobody is asked for a body: bodies are drawn where they are given.
    """
    if branch.condition == "id_patches":
        return (scale != 0,) * len(persons)
    if has_image or (branch.condition == "image" and not branch.draws_bodies):
        return (False,) * len(persons)
    is_asked = not (branch.optional or branch.draws_bodies)
    asks = [scale != 0 and (is_asked or names_drawing(person, branch)) for person in persons]
    complete = [gives_all(person, branch, len(persons) == 1) for person in persons]
    draws = [asked or whole for asked, whole in zip(asks, complete, strict=True)]
    if branch.per == "picture":
        return tuple(draws)
    return (all(draws) or (any(asks) and not branch.draws_bodies),) * len(persons)


def branches_of(table: Sequence[Branch], given: Sequence[Setting]) -> list[list[Branch]]:
    """Of each person of a request, the branches that draw it. given: the setting of every branch."""
    return [
        [branch for branch, is_drawn in zip(table, of_person, strict=True) if is_drawn]
        for of_person in zip(*(setting.draws for setting in given), strict=True)
    ]


def with_images(table: Sequence[Branch], given: Sequence[Setting]) -> frozenset[str]:
    """The names of the branches that are shown an image of the caller's in the place of a drawing."""
    return frozenset(b.name for b, setting in zip(table, given, strict=True) if setting.image is not None)


def _advice(branch: Branch) -> str:
    """What a request gives to a branch."""
    if branch.draws_bodies:
        advice = f"Give {'every' if branch.per == 'person' else 'a'} person a body: Person(body=…)"
    elif branch.draws_faces:
        advice = f"Give the persons pose={', landmarks= or pose_image=' if branch.view == 'face' else ' or landmarks='}"
    else:
        advice = "Give the persons a box" if branch.condition == "location" else "Give its picture"
    picture = f'controls={{"{branch.name}": Control("picture.png")}}'
    return f"{advice}{f', or the drawing: {picture}' if branch.per == 'picture' else ''}."


def control_image(
    source: Photo | NDArray[Any], branch: Branch, grid: Grid
) -> tuple[NDArray[np.float32], tuple[str, ...]]:
    """(C, H, W) float32 in [0, 1] at the picture's size, and a note if it had to be resized. Raises RequestError."""
    name, size = f"the image of the control {branch.name}", (grid.height, grid.width)
    if _is_floats(source):
        image = own_array(source, None, name)
        if image.ndim != 3 or image.shape[0] != branch.channels:
            raise RequestError(f"{name} has shape {image.shape}, expected ({branch.channels}, H, W) floats in [0, 1].")
        if image.shape[1:] != size:
            raise RequestError(
                f"{name} is {image.shape[2]}×{image.shape[1]} px, the picture {grid.width}×{grid.height}. Give an "
                "array of the picture's size, or an image, which is resized."
            )
        if image.min() < 0 or image.max() > 1:
            raise RequestError(
                f"{name} reaches from {image.min():g} to {image.max():g}, expected [0, 1]. Divide by 255?"
            )
        return image, ()
    loaded = load_photo(source, name, BLACK, longest_px=None)
    pixels, notes = loaded.rgb, loaded.notes
    height, width = pixels.shape[:2]
    if (height, width) != size:
        if abs(width * grid.height - height * grid.width) > max(width * grid.height, height * grid.width) * 0.01:
            raise RequestError(
                f"{name} is {width}×{height} px, the picture {grid.width}×{grid.height}: another aspect. Crop it, or "
                "make a picture of its aspect with height= and width=."
            )
        picture = Image.fromarray(pixels).resize((grid.width, grid.height), Image.Resampling.LANCZOS)
        pixels = np.asarray(picture)
        notes = (
            *notes,
            f"{name} was resized from {width}×{height} to {grid.width}×{grid.height} px.",
        )
    if branch.channels == 1:
        pixels = np.asarray(Image.fromarray(pixels).convert("L"))[..., None]
    return np.ascontiguousarray(pixels.transpose(2, 0, 1), np.float32) / np.float32(255), notes


def blanks(table: Sequence[Branch], grid: Grid) -> dict[str, Control]:
    """A black picture for every branch that takes one."""
    return {
        branch.name: Control(np.zeros((branch.channels, grid.height, grid.width), np.float32))
        for branch in table
        if branch.per == "picture"
    }


def drawings(
    table: Sequence[Branch], given: Sequence[Setting], people: Sequence[DrawnPerson], grid: Grid
) -> dict[str, list[NDArray[np.float32]]]:
    """What one request shows to every branch, by the branch's name: (C, H, W) in [0, 1], one for each person or one for
    the picture. Branches that are shown nothing are left out. Raises RequestError."""
    numbered, shown = dict(enumerate(people, start=1)), dict[str, list[NDArray[np.float32]]]()
    for branch, setting in zip(table, given, strict=True):
        if setting.image is not None:
            shown[branch.name] = [setting.image]
        elif setting.given and branch.per == "picture":
            drawn = {number: person for number, person in numbered.items() if setting.draws[number - 1]}
            shown[branch.name] = [_drawing(branch, drawn, grid)]
        elif setting.given:
            shown[branch.name] = [_of_person(branch, number, person, grid) for number, person in numbered.items()]
    return shown


def with_patches(
    table: Sequence[Branch], shown: Mapping[str, list[NDArray[np.float32]]], people: Sequence[PreparedPerson]
) -> dict[str, list[NDArray[np.float32]]]:
    """What one request shows to every branch, with the persons' patches painted on the drawings of "id_patches"."""
    painted = dict(shown)
    for branch in table:
        if branch.condition == "id_patches" and branch.name in shown and people:
            pairs = [(p.id_patch, p.anchor) for p in people if p.id_patch is not None and p.anchor is not None]
            patches, anchors = [patch for patch, _ in pairs], [anchor for _, anchor in pairs]
            painted[branch.name] = [paint_patches(shown[branch.name][0], patches, anchors)]
    return painted


def _of_person(branch: Branch, number: int, person: DrawnPerson, grid: Grid) -> NDArray[np.float32]:
    if branch.condition == "location":
        assert person.face_box is not None
        return _in_channels(location_mask(person.face_box.px, grid.height, grid.width), branch.channels)
    if branch.view == "face":
        assert branch.style is not None
        return _in_channels(person.pose_images[branch.style], branch.channels)
    return _drawing(branch, {number: person}, grid)


def _drawing(branch: Branch, people: Mapping[int, DrawnPerson], grid: Grid) -> NDArray[np.float32]:
    """The faces or the bodies of these persons, by their number, drawn into the whole picture."""
    assert branch.style is not None
    if branch.draws_bodies:
        bodies = [person.body for person in people.values() if person.body is not None]
        drawing = body_drawing(bodies, grid.height, grid.width, branch.style)
    else:
        if without := [number for number, person in people.items() if person.landmarks is None]:
            whole = (
                f', or that whole drawing: controls={{"{branch.name}": Control(…)}}' if branch.per == "picture" else ""
            )
            raise RequestError(
                f"person {without[0]} has a pose_image, and the branch {branch.name} draws landmarks into the whole "
                f"picture. Give landmarks= or pose={whole}."
            )
        faces = [person.landmarks_px for person in people.values()]
        drawing = face_drawing(faces, grid.height, grid.width, branch.style)
    return _in_channels(drawing, branch.channels)


def _in_channels(drawing: NDArray[np.float32], channels: int) -> NDArray[np.float32]:
    """(C, H, W) → (channels, H, W): of a drawing in colours the brightest, of a mask a grey picture."""
    if len(drawing) == channels:
        return drawing
    return drawing.max(axis=0, keepdims=True) if channels == 1 else drawing.repeat(channels, axis=0)


def _is_floats(source: Any) -> bool:
    """Whether an image is given as floats, of NumPy or torch."""
    return hasattr(source, "ndim") and "float" in str(getattr(source, "dtype", ""))
