"""What a request says about each branch of the table: its factor, its window, and the picture that it is shown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..checks import own_array
from ..config import Branch
from ..errors import RequestError
from ..persons.bodies import body_drawing
from ..persons.boxes import Grid
from ..persons.conditions import face_drawing, location_mask
from ..persons.photo import BLACK, Photo, load_photo
from ..persons.prepared import DrawnPerson
from ..request import Control, Request


@dataclass(frozen=True, eq=False)
class Setting:
    """One branch in one request.

    scale, start, end: see `Control`. image: (C, H, W) float32 in [0, 1], or None.
    given: whether there is anything to draw for it. notes: on the image, in sentences.
    """

    scale: float
    start: float
    end: float
    image: NDArray[np.float32] | None
    given: bool
    notes: tuple[str, ...] = ()


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
    given = image is not None or _drawable(branch, request)
    expected = not branch.optional and scale != 0 and (request.persons or branch.condition == "image")
    if expected and not given:
        raise RequestError(f"the branch {branch.name} needs something to draw. {_advice(branch)}")
    return Setting(scale, start, end, image, given, notes)


def _drawable(branch: Branch, request: Request) -> bool:
    """Whether the persons of a request give what a branch without an image draws."""
    if branch.draws_bodies:
        bodies = [person.body is not None for person in request.persons]
        return bool(bodies) and (all(bodies) if branch.per == "person" else any(bodies))
    return bool(request.persons) and branch.condition != "image"


def _advice(branch: Branch) -> str:
    """What a request gives to a branch."""
    if branch.draws_bodies:
        advice = f"Give {'every' if branch.per == 'person' else 'a'} person a body: Person(body=…)"
    elif branch.draws_faces:
        advice = "Give the persons pose=, landmarks= or pose_image="
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
            shown[branch.name] = [_drawing(branch, numbered, grid)]
        elif setting.given:
            shown[branch.name] = [_of_person(branch, number, person, grid) for number, person in numbered.items()]
    return shown


def _of_person(branch: Branch, number: int, person: DrawnPerson, grid: Grid) -> NDArray[np.float32]:
    if branch.condition == "location":
        assert person.face_box is not None
        return location_mask(person.face_box.px, grid.height, grid.width)
    if branch.view == "face":
        assert branch.style is not None
        return person.pose_images[branch.style]
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
    return drawing if branch.channels == 3 else drawing.max(axis=0, keepdims=True)


def _is_floats(source: Any) -> bool:
    """Whether an image is given as floats, of NumPy or torch."""
    return hasattr(source, "ndim") and "float" in str(getattr(source, "dtype", ""))
