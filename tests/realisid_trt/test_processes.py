"""Errors, people, requests and results can be sent from one process to another."""

from __future__ import annotations

import copy
import inspect
import multiprocessing
import pickle
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from realisid_trt import Engine, Identity, Person, Request, Result, errors
from realisid_trt.errors import PhotoError, RealisIDError, RequestError
from realisid_trt.request import OMITTED

CLASSES = [found for _, found in inspect.getmembers(errors, inspect.isclass) if issubclass(found, RealisIDError)]


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda error: pickle.loads(pickle.dumps(error))])
def test_every_error_is_itself_on_the_other_side(cls: Any, copied: Any) -> None:
    error = cls("no_face", "the text") if issubclass(cls, PhotoError) else cls("the text")
    error.request = 3
    found = copied(error)
    assert type(found) is cls and str(found) == "request 3: the text" and found.exit_status == cls.exit_status
    assert getattr(found, "code", None) == getattr(error, "code", None) and found.request == 3


def test_people_and_requests(photos: Any) -> None:
    identity = Identity(np.ones((2, 3)), np.zeros((478, 2)), (0, 0, 9, 9), (20, 30), "key", "hull", ("a note",))
    body = np.arange(51.0).reshape(17, 3)
    person = Person(identity, box=(1, 2, 30, 40), landmarks=np.zeros((478, 2)), body=body)
    request = Request("two", [person, Person(photos.hopper)], seed=np.uint8(255))  # type: ignore[arg-type]
    found = pickle.loads(pickle.dumps(request))
    assert found.subject_conditioning_ratio is OMITTED and found.persons[0].box == (1, 2, 30, 40)
    kept = found.persons[0].photo
    assert np.array_equal(kept.id_tokens, identity.id_tokens) and kept.notes == ("a note",)
    with pytest.raises(ValueError, match="read-only"):
        kept.id_tokens[0] = 0
    for copied in (found.persons[0], copy.copy(person), copy.deepcopy(person)):
        assert np.array_equal(copied.body, body) and np.array_equal(copied.landmarks, np.zeros((478, 2)))
        with pytest.raises(ValueError, match="read-only"):
            copied.body[0] = 0
    assert found.persons[1].photo == photos.hopper and found.persons[1].body is None
    assert found.check().seed == 255


def test_results(engine: Engine) -> None:
    result = engine.generate("a beach", num_inference_steps=1, seed=1, height=32, width=32)
    found: Result = pickle.loads(pickle.dumps(result))
    assert np.array_equal(found.latents, result.latents) and found.rows == result.rows and found.seed == 1
    assert np.array_equal(np.asarray(found.images[0]), np.asarray(result.images[0]))


def test_an_engine_stays_where_it_is(engine: Engine) -> None:
    for copied in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(RequestError, match=r"its networks are open in this one. Load it there: Engine.load\("):
            copied(engine)


def embed(given: tuple[str, str]) -> Any:
    engine, photo = given
    return Engine.load(engine, device="cpu:1", networks=("id_encoder",)).embed(photo)


@pytest.mark.slow
def test_one_bad_photo_does_not_end_a_pool(engine_dir: Path, photos: Any, tmp_path: Path) -> None:
    from PIL import Image

    bad = tmp_path / "nobody.png"
    Image.new("RGB", (256, 256), "grey").save(bad)
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        work = [pool.submit(embed, (str(engine_dir), str(path))) for path in (photos.hopper, bad, photos.astronaut)]
        with pytest.raises(PhotoError, match="nobody.png: no face was found") as caught:
            work[1].result()
        assert caught.value.code == "no_face"
        assert all(isinstance(work[index].result(), Identity) for index in (0, 2))
