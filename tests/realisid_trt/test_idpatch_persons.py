"""Photographs in an engine with ID patches: from the command line and from Python."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from realisid_trt import Control, Engine, Person
from realisid_trt.__main__ import main
from realisid_trt.commands.drawing import COLORS
from realisid_trt.errors import BoxError, RequestError
from realisid_trt.persons.identity import Identity
from realisid_trt.persons.people import People
from tests.methods import built_method


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine.load(built_method("idpatch").engine)


def latents(engine: Engine, persons: list[Person], **options: Any) -> NDArray[np.float32]:
    return engine.generate("friends", persons, num_inference_steps=3, seed=3, output="latents", **options).latents


def body_of(side: float) -> NDArray[np.float64]:
    return np.column_stack([np.linspace(0.3, 0.7, 17), np.linspace(0.2, 0.9, 17)]) * side


def test_photo_identity_file_and_embedding_make_one_picture(engine: Engine, photos: Any, tmp_path: Path) -> None:
    body, identity = body_of(engine.model.default_size), engine.embed(photos.hopper)
    identity.save(tmp_path / "hopper.safetensors")
    assert identity.kind == "embedding" and identity.mask_source == "aligned"
    expected = latents(engine, [Person(photos.hopper, body=body)])
    for source in (identity, tmp_path / "hopper.safetensors"):
        assert np.array_equal(latents(engine, [Person(source, body=body)]), expected)
    assert np.array_equal(latents(engine, [Person(embedding=identity.embedding, body=body)]), expected)
    other = latents(engine, [Person(photos.astronaut, body=body)])
    moved = latents(engine, [Person(photos.hopper, body=body, at=(20, 20))])
    assert np.abs(other - expected).max() > 0.01 and np.abs(moved - expected).max() > 0.01


def test_persons_may_change_places_in_the_list(engine: Engine, photos: Any) -> None:
    side = engine.model.default_size
    persons = [Person(photos.hopper, at=(side / 3, side / 2)), Person(photos.astronaut, at=(side / 1.5, side / 2))]
    drawing = np.full((3, side, side), 0.25, np.float32)
    controls = {"id_patch": Control(drawing)}
    one, other = latents(engine, persons, controls=controls), latents(engine, persons[::-1], controls=controls)
    np.testing.assert_allclose(one, other, atol=1e-4)
    [shown] = engine.conditions("friends", persons, controls=controls)["id_patch"]
    assert (shown != drawing).any() and shown.max() > 1 and shown.min() < 0  # patches leave the range of colours
    placed = engine.generate("friends", persons, num_inference_steps=1, output="latents", controls=controls).persons
    assert [person.anchor for person in placed] == [person.at for person in persons]
    assert [person.box for person in placed] == [None, None]


def test_a_photo_alone_becomes_a_head_and_says_so(engine: Engine, photos: Any) -> None:
    [person] = engine.generate("a portrait", [Person(photos.hopper)], num_inference_steps=1, output="latents").persons
    assert person.anchor is not None and "so the head was drawn" in person.notes[-1]


@pytest.mark.parametrize(
    ("given", "image", "error", "message"),
    [
        ({"at": (900, 5)}, True, BoxError, r"at of person 2 is \(900, 5\), outside of the picture"),
        (
            {"body": body_of(128) + 900},
            False,
            BoxError,
            "the nose of the body of person 2 is .*, outside of the picture",
        ),
        ({}, True, RequestError, "person 2 has no anchor: nothing says where the ID patch goes"),
        ({}, False, RequestError, "person 2 has neither body nor box, and the branch id_patch needs something to draw"),
        ({"box": (0, 0, 64, 64)}, True, RequestError, "person 2 has neither a pose nor a photo that says where in the"),
    ],
)
def test_anchors_are_checked_before_a_face_is_searched(
    engine: Engine, monkeypatch: Any, given: dict[str, Any], image: bool, error: type[Exception], message: str
) -> None:
    """The first person's photo does not exist, and nobody noticed yet."""
    monkeypatch.setattr(People, "see", None)
    side = engine.model.default_size
    controls = {"id_patch": Control(np.zeros((3, side, side), np.float32))} if image else None
    who = Person(embedding=np.ones(512), **given)
    with pytest.raises(error, match=message):
        engine.generate("x", [Person("nowhere.jpg", box=(0, 0, 64, 64)), who], controls=controls)


def test_commands(engine: Engine, photos: Any, tmp_path: Path, capsys: Any) -> None:
    """embed, generate with anchors and a drawing, what the branch was shown, and inspect."""
    folder, stored = str(built_method("idpatch").engine), tmp_path / "hopper.safetensors"
    assert main(["embed", "--engine", folder, str(photos.hopper), "--out", str(stored)]) == 0
    assert "an embedding of the face at" in (printed := capsys.readouterr().out) and "aligned by its eyes" in printed
    assert Identity.load(stored).kind == "embedding"
    drawing, shown = tmp_path / "pose.png", tmp_path / "shown"
    Image.new("RGB", (256, 256), (0, 0, 90)).save(drawing)
    arguments = [
        "generate",
        "--engine",
        folder,
        "--prompt",
        "x",
        "--steps",
        "1",
        "--out",
        str(tmp_path / "o.png"),
        "--json",
    ]
    arguments += ["--person", f"{stored}@at=40:30.5", "--person", f"{photos.astronaut}@at=90:90"]
    arguments += ["--control", f"id_patch={drawing}", "--save-conditions", str(shown)]
    arguments += ["--draw-boxes", str(tmp_path / "boxes.png")]
    assert main(arguments) == 0
    output = capsys.readouterr()
    assert [person["anchor"] for person in json.loads(output.out.splitlines()[-1])["persons"]] == [[40, 30.5], [90, 90]]
    assert "person 1, ID patch about (40, 30) px" in output.err
    drawn = Image.open(tmp_path / "boxes.png")
    assert drawn.getpixel((40, 30)) == COLORS[0] and drawn.getpixel((90, 90)) == COLORS[1]
    pixels = np.asarray(Image.open(shown / "id_patch-0.png"))
    assert pixels.min() == 0 and pixels.max() == 255 and (pixels[-1, 0] == (0, 0, 90)).all()
    assert main(["inspect", "--engine", folder, str(photos.hopper), "--out", str(tmp_path / "found.png")]) == 0
    assert "aligned by its eyes, nose and mouth" in capsys.readouterr().out
    assert main(["inspect", folder]) == 0
    assert "branch id_patch: is shown the ID patches of all persons, on a given picture or" in capsys.readouterr().out
