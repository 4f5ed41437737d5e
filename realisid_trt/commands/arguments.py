"""Persons, controls and samplers as they are written on the command line."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import RequestError
from ..loop.samplers import Sampler


def parse_person(text: str) -> Any:
    """photo.jpg@x0,y0,x1,y1,pose=other.jpg,at=x:y,face=0 → Person. The photo may be a stored identity."""
    from ..persons.person import Person

    photo, rest = _split_person(text)
    numbers: list[str] = []
    named: dict[str, Any] = {}
    for part in filter(None, rest.split(",")):
        key, equals, value = part.partition("=")
        if not equals:
            numbers.append(part)
        elif key == "pose" and value:
            named["pose"] = value
        elif key == "body" and value:
            named["body"] = read_body(Path(value), f"--person {text}")
        elif key == "at" and value:
            named["at"] = parse_point(value, f"--person {text}")
        elif key == "face" and value.isascii() and value.isdecimal():
            named["face"] = int(value)
        else:
            raise RequestError(
                f"--person {text}: {part!r} is not understood. Write photo.jpg@x0,y0,x1,y1 and, if wanted, "
                ",pose=other.jpg, ,body=keypoints.json, ,at=x:y and ,face=0 after it."
            )
    if numbers:
        named["box"] = parse_box(",".join(numbers), f"--person {text}")
    return Person(None if photo == "-" else photo, **named)


def read_body(file: Path, where: str) -> Any:
    """(17, 2 or 3) numbers of a JSON file. Raises RequestError."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RequestError(
            f"{where}: {file} cannot be read as JSON ({error}). Write the 17 keypoints of COCO as [[x, y], …] in px."
        ) from None


def parse_controls(texts: Sequence[str]) -> dict[str, Any]:
    """NAME=FILE[,scale=,start=,end=] or NAME=scale=… → {NAME: Control}. Raises RequestError."""
    from ..request import Control

    controls: dict[str, Any] = {}
    for text in texts:
        name, _, rest = text.partition("=")
        numbers = re.findall(r"(?:^|,)(scale|start|end)=([^,]*)(?=$|,)", rest)
        file = re.sub(r"(?:^|,)(?:scale|start|end)=[^,]*(?=$|,)", "", rest)
        try:
            given = {key: float(value) for key, value in numbers}
        except ValueError:
            raise RequestError(f"--control {text}: scale, start and end are numbers. Write scale=0.9.") from None
        if not name or not (file or given) or len(given) < len(numbers):
            raise RequestError(
                f"--control {text!r} is not understood. Write NAME=picture.png and, if wanted, ,scale=0.9 ,start=0 and "
                ",end=0.6 after it."
            )
        if name in controls:
            raise RequestError(f"--control {name} is given twice. Write all of it in one.")
        controls[name] = Control(file or None, **given)
    return controls


def parse_sampler(text: str) -> Sampler:
    """NAME, or the JSON object of the config's key: {"name": "euler", "spacing": "trailing"}. Raises RequestError."""
    if not text.lstrip().startswith("{"):
        return Sampler.of(text)
    try:
        return Sampler.of(json.loads(text))
    except ValueError as error:
        raise RequestError(
            f'--sampler {text} cannot be read as JSON ({error}). Write {{"name": "euler", "spacing": "trailing"}}.'
        ) from None


def with_options(sampler: Sampler, eta: float | None, timesteps: tuple[float, ...] | None) -> Sampler:
    """The sampler with those of the command line's options that are given. Raises RequestError."""
    if eta is not None:
        sampler = dataclasses.replace(sampler, eta=eta)
    if timesteps is not None:  # in the place of everything else that says which timesteps
        sampler = dataclasses.replace(sampler, timesteps=timesteps, spacing=None, original_inference_steps=None)
    return sampler


def parse_numbers(text: str, flag: str, example: str) -> tuple[float, ...]:
    """a,b,… → numbers. Raises RequestError."""
    try:
        return tuple(float(number) for number in text.split(","))
    except ValueError:
        raise RequestError(f"{flag} {text!r} is not understood. Write numbers with commas: {example}.") from None


def _split_person(text: str) -> tuple[str, str]:
    """The photo, and the options after the @. The path may contain an @ too."""
    number = r"[-+.\deE]+"
    if told := re.fullmatch(rf"(.+?)@((?:{number},){{3}}{number}(?:,.*)?|(?:pose|face|body|at)=.*)", text):
        return told[1], told[2]
    if Path(text).is_file():
        return text, ""
    split = re.search(r"@(?=[-+.\d])", text)  # meant as a box
    return (text[: split.start()], text[split.end() :]) if split else (text, "")


def parse_box(text: str, where: str) -> tuple[float, float, float, float]:
    try:
        x0, y0, x1, y1 = (float(number) for number in text.split(","))
    except ValueError:
        raise RequestError(f"{where}: box {text!r} is not x0,y0,x1,y1: four numbers in pixels.") from None
    return x0, y0, x1, y1


def parse_point(text: str, where: str) -> tuple[float, float]:
    try:
        x, y = (float(number) for number in text.split(":"))
    except ValueError:
        raise RequestError(f"{where}: at={text} is not x:y: two numbers in pixels.") from None
    return x, y
