"""Numbers of every library and width are taken as what they are, or refused."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch

from realisid_trt import Engine, Identity, Person, Request
from realisid_trt.checks import finite, own_array, whole
from realisid_trt.errors import PhotoError, RequestError
from realisid_trt.persons.mesh import checked_landmarks
from tests.realisid_trt.truth import people

OPTIONS: dict[str, Any] = {"num_inference_steps": 1, "output": "latents", "height": 64, "width": 64}
WIDTHS = [np.uint8(255), np.int8(127), np.uint16(65535), np.int32(2**31 - 1), np.uint32(2**32 - 1), np.int64(2**63 - 2)]


@pytest.mark.parametrize("seed", [*WIDTHS, torch.tensor(255), np.array(7)], ids=repr)
def test_a_seed_of_any_width_counts_on(engine: Engine, seed: Any) -> None:
    found = engine.generate("x", seed=seed, num_images=2, **OPTIONS)
    assert type(found.seed) is int and json.loads(json.dumps(found.seed)) == int(seed)
    for j in range(2):
        alone = engine.generate("x", seed=int(seed) + j, **OPTIONS) if int(seed) + j < 2**63 else None
        assert alone is None or np.allclose(found.latents[j], alone.latents[0], atol=1e-4)
    assert not np.array_equal(found.latents[0], found.latents[1])


@pytest.mark.parametrize(
    "value", [np.float16(2), np.float32(2), np.uint8(2), torch.tensor(2.0), torch.tensor(2.0, dtype=torch.bfloat16),
              np.array(2.0)], ids=repr,
)  # fmt: skip
def test_scales_of_any_kind(engine: Engine, value: Any) -> None:
    persons = people(engine, 1)
    given = {"guidance_scale": value, "id_guidance_scale": value, "local_scale": value, "global_scale": value}
    expected = engine.generate("x", persons, seed=1, **dict.fromkeys(given, 2.0), **OPTIONS)
    assert np.array_equal(engine.generate("x", persons, seed=1, **given, **OPTIONS).latents, expected.latents)


@pytest.mark.parametrize("value", [np.int8(1), np.uint64(1), torch.tensor(1), np.array(1)], ids=repr)
def test_counts_and_sizes_of_any_kind(engine: Engine, value: Any) -> None:
    found = engine.generate(
        "x", num_images=value, num_inference_steps=value, height=64 * value, width=np.int16(64), seed=0
    )
    assert len(found.images) == 1 and len(found.step_ms) == 1 and found.images[0].size == (64, 64)


@pytest.mark.parametrize(
    "value", [True, np.bool_(True), 1.0, np.float32(1), "1", None, 1j, np.array([1]), torch.ones(1)]
)
def test_what_is_not_a_whole_number(value: Any) -> None:
    assert whole(value) is None


@pytest.mark.parametrize("value", [True, np.complex64(3), 1j, "1", None, np.nan, np.float16("inf"), 10**400,
                                   torch.tensor(float("nan")), torch.ones(1)])  # fmt: skip
def test_what_is_not_a_finite_number(value: Any) -> None:
    assert finite(value) is None
    with pytest.raises(RequestError, match="guidance_scale is .*, expected a finite number"):
        Request("x", guidance_scale=value if value is not None else "none").check()


def test_faces_are_numbers_of_any_kind(photos: Any, engine: Engine) -> None:
    for face in (np.uint8(0), torch.tensor(0), np.array(0)):
        assert Person(photos.hopper, face=face).face == 0
        assert engine.embed(photos.hopper, face=face).box == engine.embed(photos.hopper, face=0).box  # type: ignore[arg-type]


ARRAYS = {
    "half": lambda a: a.astype(np.float16).astype(np.float32).astype(np.float16),
    "double": lambda a: a.astype(np.float64),
    "big-endian": lambda a: a.astype(">f4"),
    "list": lambda a: a.tolist(),
    "tensor": torch.from_numpy,
    "tensor with gradients": lambda a: torch.from_numpy(a).requires_grad_(),
    "bfloat16": lambda a: torch.from_numpy(a).bfloat16(),
    "half tensor": lambda a: torch.from_numpy(a).half(),
}


@pytest.mark.parametrize("kind", ARRAYS)
def test_arrays_of_any_kind(kind: str) -> None:
    plain = np.arange(6, dtype=np.float32).reshape(2, 3)  # which all of them hold
    taken = own_array(ARRAYS[kind](plain), (2, 3), "it")
    assert taken.dtype == np.float32 and np.array_equal(taken, plain)


def test_tokens_and_landmarks_of_torch(engine: Engine) -> None:
    model = engine.model
    tokens = torch.zeros(model.num_id_tokens, model.cross_attention_dim, dtype=torch.bfloat16)
    identity = Identity(tokens, torch.rand(478, 2), torch.tensor([0, 0, 9, 9]), np.int16([20, 30]), "k", "hull")  # type: ignore[arg-type]
    assert identity.photo_size == (20, 30) and type(identity.box[0]) is float and identity.id_tokens.dtype == np.float32
    json.dumps([identity.box, identity.photo_size])


@pytest.mark.parametrize("kind", ARRAYS)
@pytest.mark.parametrize("columns", [2, 3])
def test_bodies_of_any_kind(kind: str, columns: int) -> None:
    """Copied, so that a caller may go on with the array, and never changed afterwards."""
    plain = np.arange(17 * columns, dtype=np.float32).reshape(17, columns)
    given = ARRAYS[kind](plain)
    body = Person("alice.jpg", body=given).body
    assert body is not None and body.dtype == np.float64 and body.shape == (17, columns)
    plain += 1
    assert np.array_equal(body, np.arange(17 * columns).reshape(17, columns))
    with pytest.raises(ValueError, match="read-only"):
        body[0] = 0


def test_what_float32_does_not_hold() -> None:
    with pytest.raises(RequestError, match="it holds NaN or infinity"):
        own_array([1e300], (1,), "it")


def test_what_is_no_array_of_numbers() -> None:
    for array in ([[1, 2], [3]], [10**400], [1j], np.array([1 + 2j]), "text", {"a": 1}, None):
        with pytest.raises(RequestError, match="is not an array of numbers|has shape|holds NaN"):
            own_array(array, (1,), "it")
    with pytest.raises(RequestError, match="id_tokens of an identity is not an array"):
        Identity([[1, 2], [3]], np.zeros((478, 2)), (0, 0, 1, 1), (9, 9), "k", "hull")  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="box of an identity is"):
        Identity(np.zeros((2, 3)), np.zeros((478, 2)), (0, [0], 1, 1), (9, 9), "k", "hull")  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="id_encoder_key of an identity is 5, expected a string"):
        Identity(np.zeros((2, 3)), np.zeros((478, 2)), (0, 0, 1, 1), (9, 9), 5, "hull")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "box", [(0, 0, 10**400, 9), (0, 0, 1e300, 1e300), torch.rand(4).requires_grad_(), "box", [1, 2]]
)
def test_boxes_that_cannot_be_meant(engine: Engine, photos: Any, box: Any) -> None:
    with pytest.raises((RequestError, PhotoError)):
        engine.embed(photos.hopper, box=box)
    if not isinstance(box, tuple) or box[2] > 1e300:  # a box of any size is shrunk to the picture, and a note says so
        with pytest.raises(RequestError):
            engine.generate("x", [Person(photos.hopper, box=box)] * 2, **OPTIONS)


def test_a_box_may_be_an_iterator(engine: Engine, photos: Any) -> None:
    person = Person(photos.hopper, box=iter((0, 0, 40, 40)))  # type: ignore[arg-type]
    assert person.box == (0, 0, 40, 40)
    for _ in range(2):
        assert engine.generate("x", [person], seed=1, **OPTIONS).persons[0].box == (0, 0, 40, 40)


def test_landmarks_of_torch(engine: Engine) -> None:
    points = torch.rand(478, 2, dtype=torch.float64).requires_grad_()
    assert np.array_equal(checked_landmarks(points, "it"), points.detach().numpy())  # all of its digits
    assert checked_landmarks(points.detach().bfloat16(), "it").shape == (478, 2)
