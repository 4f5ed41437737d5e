"""Bad input raises a typed error whose text says what was expected, before any network runs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from realisid_trt import Engine, Identity, Person, Request
from realisid_trt.errors import (
    BoxError,
    EngineMismatch,
    NumericsError,
    PhotoError,
    RealisIDWarning,
    RequestError,
    ShapeError,
)
from tests.realisid_trt.truth import people


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_inference_steps": 0}, RequestError, "num_inference_steps is 0, expected 1 to 1000"),
        ({"num_inference_steps": 1001}, RequestError, "the schedule has 1000 timesteps"),
        ({"num_images": 0}, RequestError, "num_images is 0, expected a whole number of at least 1"),
        ({"num_images": 1.5}, RequestError, "num_images is 1.5"),
        ({"num_images": 60}, ShapeError, "unet_encoder input latents is .*rows in 1..96"),
        ({"seed": -1}, RequestError, "seed is -1, expected a whole number from 0"),
        ({"seed": "seven"}, RequestError, "seed is 'seven'"),
        ({"guidance_scale": math.nan}, RequestError, "guidance_scale is nan, expected a finite number"),
        ({"id_guidance_scale": "5"}, RequestError, "id_guidance_scale is '5'"),
        ({"local_scale": "all"}, RequestError, "local_scale is 'all'"),
        ({"global_scale": math.inf}, RequestError, "global_scale is inf"),
        (
            {"subject_conditioning_ratio": 1.2},
            RequestError,
            "expected a number from 0 to 1, or None for no delay",
        ),
        ({"height": 100}, ShapeError, "height is 100, expected a multiple of 16 px"),
        ({"width": -128}, ShapeError, "width is -128, expected a multiple of 16 px"),
        ({"width": "wide"}, ShapeError, "width is 'wide'"),
        ({"height": 16}, ShapeError, "unet_encoder input latents is .*height in 8..64 in steps of 4"),
        (
            {"width": 4096},
            ShapeError,
            "another picture size, or rebuild with a larger --batch, --persons or --resolution",
        ),
        (
            {"latents": np.zeros((1, 4, 8, 8))},
            RequestError,
            r"latents has shape \(1, 4, 8, 8\), expected \(1, 4, 32, 32\)",
        ),
        ({"latents": np.full((1, 4, 32, 32), np.nan)}, RequestError, "latents holds NaN or infinity. Give finite"),
        ({"latents": "noise"}, RequestError, "latents is not an array of numbers"),
        ({"num_inference_steps": 2.0}, RequestError, "num_inference_steps is 2.0, expected 1 to 1000"),
        ({"num_inference_steps": "8"}, RequestError, "num_inference_steps is '8'"),
        ({"num_inference_steps": True}, RequestError, "num_inference_steps is True"),
        ({"output": "jpeg"}, RequestError, 'output is \'jpeg\', expected "pil", "np" or "latents"'),
        ({"negative_prompt": 7}, RequestError, "negative_prompt is int, expected one string"),
    ],
)
def test_arguments(engine: Engine, photos: Any, options: dict[str, Any], error: type[Exception], message: str) -> None:
    engine.backend.start_request()
    with pytest.raises(error, match=message):
        engine.generate("a beach", [Person(photos.hopper, box=(9, 9, 90, 90))], **options)
    assert engine.backend.usage.rows == {}


@pytest.mark.parametrize("prompt", [None, ["a", "b"], 3])
def test_a_prompt_is_one_string(engine: Engine, prompt: Any) -> None:
    with pytest.raises(RequestError, match="prompt is .*, expected one string. Make a Request per prompt"):
        engine.generate(prompt)


def test_a_prompt_of_broken_text(engine: Engine) -> None:
    with pytest.raises(RequestError, match="prompt contains an unpaired surrogate"):
        engine.generate("a \udcff beach")


def test_a_callback_that_uses_its_own_engine(engine: Engine) -> None:
    def callback(step: int, total: int) -> None:
        engine.generate("another beach")

    with pytest.raises(RequestError, match="a progress callback called the engine that runs it"):
        engine.generate("a beach", num_inference_steps=1, progress=callback)
    engine.generate("a beach", num_inference_steps=1)  # it is free again


def test_persons_that_contradict_themselves() -> None:
    tokens = np.zeros((65, 64))
    with pytest.raises(RequestError, match="exactly one of photo, identity, id_tokens and embedding; got none of them"):
        Person()
    with pytest.raises(RequestError, match="got photo and id_tokens"):
        Person("alice.jpg", id_tokens=tokens)
    with pytest.raises(
        RequestError, match="at most one of pose, landmarks, pose_image and keypoints; got pose and landmarks"
    ):
        Person("alice.jpg", pose="bob.jpg", landmarks=np.zeros((478, 2)))
    with pytest.raises(RequestError, match="has no photo: give box= and one of pose="):
        Person(id_tokens=tokens)
    assert Person(id_tokens=tokens, body=np.full((17, 2), 40.0)).box is None  # an engine may draw bodies alone
    for face in ("left", True, 1.0):
        with pytest.raises(RequestError, match=f"face is {face!r}, expected a whole number"):
            Person("alice.jpg", face=face)  # type: ignore[arg-type]
    assert Person("alice.jpg", face=np.int64(1)).face == 1
    with pytest.raises(RequestError, match="without a photo leave it out"):
        Person(id_tokens=tokens, box=(0, 0, 9, 9), landmarks=np.zeros((478, 2)), face=0)
    with pytest.raises(RequestError, match="identity is str, expected an Identity, as Engine.embed returns"):
        Person(identity="alice.safetensors")  # type: ignore[arg-type]
    for body in (np.zeros((18, 2)), np.zeros((17, 4)), np.zeros(34), 7):
        with pytest.raises(RequestError, match=r"body has shape .*, expected \(17, 2\) or \(17, 3\): x, y in px"):
            Person("alice.jpg", body=body)  # type: ignore[arg-type]
    for number in (np.nan, np.inf):
        with pytest.raises(RequestError, match="body holds NaN or infinity. Give finite numbers"):
            Person("alice.jpg", body=np.full((17, 3), number))
    with pytest.raises(RequestError, match="body is not an array of numbers"):
        Person("alice.jpg", body="pose.json")  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="body has its joints within 0 to 1, expected px of the output"):
        Person("alice.jpg", body=np.full((17, 2), 0.5))


def test_persons_that_the_engine_cannot_place(engine: Engine, photos: Any) -> None:
    def refuse(persons: Any, error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            engine.generate("a beach", persons)

    good = people(engine, 1)[0]
    drawing, tokens = good.pose_image, good.id_tokens
    assert drawing is not None
    refuse(people(engine, 9), RequestError, "9 persons were asked for; an engine takes 0 to 8")
    refuse(["alice.jpg"], RequestError, r"not a list of Person. Write \[Person")
    refuse(good, RequestError, "not a list of Person")
    refuse([Person(photos.hopper), good], BoxError, "person 1 has no box. With several persons each of them needs one")
    refuse([Person(photos.hopper, box=(5, 5, 9, 9))], BoxError, "4 px wide; at the coarsest level one cell is 16 px")
    refuse([Person(photos.hopper, box=(50, 50, 20, 90))], BoxError, "has no area")
    refuse([Person("nowhere.jpg", box=(0, 0, 64, 64))], PhotoError, "nowhere.jpg")
    refuse(
        [Person(photos.hopper, box=(0, 0, 64, 64), face=3)], PhotoError, "face=3 was asked for, but 1 face was found"
    )
    refuse([Person(photos.hopper, box=(0, 0, 64, 64), pose="nowhere.jpg")], PhotoError, "nowhere.jpg")
    box = (0, 0, 64, 64)
    refuse([Person(id_tokens=tokens[:5], box=box, pose_image=drawing)], RequestError,
           r"id_tokens of person 1 has shape \(5, 64\), expected \(65, 64\)")  # fmt: skip
    refuse([Person(id_tokens=tokens * np.nan, box=box, pose_image=drawing)], RequestError, "holds NaN or infinity")
    refuse([Person(id_tokens=[["x"]], box=box, pose_image=drawing)], RequestError, "is not an array of numbers")
    refuse([Person(id_tokens=tokens, box=box, pose_image=drawing[:, :64])], RequestError,
           r"pose_image of person 1 has shape \(3, 64, 128\), expected \(3, 128, 128\)")  # fmt: skip
    refuse(
        [Person(id_tokens=tokens, box=box, pose_image=drawing * 255)], RequestError, r"expected \[0, 1\]. Divide by 255"
    )
    refuse([Person(id_tokens=tokens, box=box, landmarks=np.zeros((68, 2)))], RequestError,
           r"landmarks of person 1 has shape \(68, 2\), expected \(478, 2\)")  # fmt: skip


def test_batches(engine: Engine) -> None:
    for requests in ([], ["a beach"], "a beach", (Request(prompt) for prompt in "ab")):
        with pytest.raises(RequestError, match="requests is empty or not a list of Request"):
            engine.generate_batch(requests)  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match="rows in 1..96"):
        engine.generate_batch([Request("a", people(engine, 8), num_images=7, subject_conditioning_ratio=None)])


def test_identities_of_another_encoder_and_files_that_are_none(engine: Engine, photos: Any, tmp_path: Path) -> None:
    identity = engine.embed(photos.hopper)
    other = Identity(identity.id_tokens, identity.landmarks, identity.box, identity.photo_size, "0" * 64, "hull+person")
    with pytest.raises(
        EngineMismatch, match="the identity of person 1 was made by another ID encoder .*Embed the photo again"
    ):
        engine.generate("a beach", [Person(other)])
    wrong = tmp_path / "wrong.safetensors"
    wrong.write_bytes(b"not a safetensors file")
    with pytest.raises(PhotoError, match="cannot be read as a stored identity"):
        engine.generate("a beach", [Person(wrong, box=(0, 0, 64, 64))])
    from safetensors.numpy import save_file

    save_file({"x": np.zeros(3)}, wrong)
    with pytest.raises(PhotoError, match="is not a stored identity .* Make one: python -m realisid_trt embed"):
        engine.generate("a beach", [Person(wrong, box=(0, 0, 64, 64))])
    with pytest.raises(RequestError, match="box is 'left', expected four finite numbers"):
        engine.embed(photos.hopper, box="left")  # type: ignore[arg-type]


def test_an_overflow_is_reported_not_painted(engine: Engine) -> None:
    with pytest.raises(NumericsError, match="the final latents holds .* NaN or infinite"):
        engine.generate("a beach", people(engine, 1), local_scale=1e38, num_inference_steps=2)


def test_a_prompt_of_megabytes_is_read_as_far_as_it_counts(engine: Engine) -> None:
    """Its tokens are those of the whole text; they take a moment, and the note has a readable length."""
    words = "a red house on a hill, " * 100_000
    prompts = engine._prologue._prompts
    with pytest.warns(RealisIDWarning, match=r"this was cut off: .*… \(\d+ characters\)") as caught:
        ids = prompts.encode(words)
    assert len(str(caught[0].message)) < 1500
    with pytest.warns(RealisIDWarning):
        assert ids == prompts.encode(words[:2300])
    with pytest.warns(RealisIDWarning):
        assert prompts.encode("x" * 2_000_000) == prompts.encode("x" * 30_000)
    blank = prompts.encode(" " * 1_000_000 + "house")
    assert blank == prompts.encode("house")
