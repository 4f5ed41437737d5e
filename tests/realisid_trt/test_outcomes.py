"""One request of a batch fails: the others are made, or its error names the request."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from realisid_trt import Engine, Person, Request, Result
from realisid_trt.errors import BoxError, NumericsError, PhotoError, RealisIDError, RequestError, ShapeError
from tests.realisid_trt.test_engine import close
from tests.realisid_trt.truth import people

OPTIONS: dict[str, Any] = {"num_inference_steps": 2, "output": "latents"}


def overflowing(engine: Engine) -> Person:
    tokens = np.full((engine.model.num_id_tokens, engine.model.cross_attention_dim), 3e38, np.float32)
    side = engine.model.default_size
    return Person(id_tokens=tokens, pose_image=np.zeros((3, side, side)), box=(0, 0, side / 2, side / 2))


BAD: dict[str, tuple[Callable[[Engine, Path], Request], type[RealisIDError], str]] = {
    "argument": (lambda engine, path: Request("x", num_images=0), RequestError, "num_images is 0"),
    "prompt": (lambda engine, path: Request(b"x"), RequestError, "prompt is bytes"),  # type: ignore[arg-type]
    "latents": (lambda engine, path: Request("x", latents=np.zeros(3)), RequestError, "latents has shape"),
    "box": (lambda engine, path: Request("x", [Person(path, box=(0, 0, 1, 1))]), BoxError, "the face would vanish"),
    "outside": (
        lambda engine, path: Request("x", [Person(path, box=(600, 200, 800, 400))]), BoxError, "outside the picture"
    ),
    "photo": (lambda engine, path: Request("x", [Person(path)]), PhotoError, "no such file"),
    "numbers": (
        lambda engine, path: Request("x", [overflowing(engine)], subject_conditioning_ratio=None),
        NumericsError,
        "the final latents holds",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("place", [0, 1, 2])
def test_the_others_are_made(engine: Engine, tmp_path: Path, name: str, place: int) -> None:
    make, error, text = BAD[name]
    good = [Request("a beach", people(engine, 1), seed=1), Request("a street", seed=2, num_images=2)]
    requests = [*good[:place], make(engine, tmp_path / "none.jpg"), *good[place:]]
    found = engine.generate_batch(requests, errors="return", **OPTIONS)
    failed = found.pop(place)
    assert isinstance(failed, error) and failed.request == place + 1
    assert str(failed).startswith(f"request {place + 1}: ") and text in str(failed)
    for request, result in zip(good, found, strict=True):
        assert isinstance(result, Result)
        assert close(result.latents, engine.generate_batch([request], **OPTIONS)[0].latents)
    with pytest.raises(error, match=f"^request {place + 1}: ") as caught:
        engine.generate_batch(requests, **OPTIONS)
    assert caught.value.request == place + 1


def test_all_of_them_fail(engine: Engine, tmp_path: Path) -> None:
    for make in ("argument", "photo", "numbers"):
        found = engine.generate_batch([BAD[make][0](engine, tmp_path / "x.jpg")] * 2, errors="return", **OPTIONS)
        assert [type(error) for error in found] == [BAD[make][1]] * 2
    with pytest.raises(RequestError, match="^num_images is 0"):  # alone it needs no number
        engine.generate_batch([Request("x", num_images=0)])
    with pytest.raises(RequestError, match='errors is \'ignore\', expected "raise" or "return"'):
        engine.generate_batch([Request("x")], errors="ignore")  # type: ignore[call-overload]


def test_what_concerns_the_batch_is_raised(engine: Engine) -> None:
    for options in ({"height": 33}, {"num_inference_steps": 0}, {"output": "gif"}):
        with pytest.raises(RequestError):
            engine.generate_batch([Request("x")], errors="return", **options)


def test_a_count_that_cannot_be_meant_is_refused_at_once(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def noise(*arguments: Any) -> Any:
        raise AssertionError("noise was drawn")

    monkeypatch.setattr("realisid_trt.loop.prologue.initial_noise", noise)
    with pytest.raises(RequestError, match="latents is .* expected"):
        engine.generate("x", num_images=10**9)


def test_photos_are_looked_at_while_another_batch_is_made(engine_dir: Path, photos: Any) -> None:
    """In a progress callback of the batch, so that the lock is surely held."""
    engine = Engine.load(engine_dir)
    looked = threading.Event()

    def look() -> None:
        engine._people.look(photos.hopper)
        looked.set()

    threads: list[threading.Thread] = []

    def progress(step: int, of: int) -> None:
        if step == 1:
            threads.append(threading.Thread(target=look))
            threads[0].start()
            assert looked.wait(60)
            with pytest.raises(RequestError, match="a progress callback called the engine that runs it"):
                engine.embed(photos.hopper)

    engine.generate("x", num_inference_steps=2, output="latents", progress=progress)
    threads[0].join()
    known = engine.embed(photos.hopper)

    def known_again(step: int, of: int) -> None:  # which needs no network
        found: list[Any] = []
        thread = threading.Thread(target=lambda: found.append(engine.embed(photos.hopper)))
        thread.start()
        thread.join(60)
        assert found == [known]

    engine.generate("x", num_inference_steps=1, output="latents", progress=known_again)


def test_one_that_is_too_large_by_itself_fails_by_itself(engine: Engine) -> None:
    requests = [Request("a", people(engine, 1), num_images=40), Request("b", seed=1)]
    failed, made = engine.generate_batch(requests, errors="return", **OPTIONS)
    assert isinstance(failed, ShapeError) and failed.request == 1 and isinstance(made, Result)


def test_a_kept_error_holds_nothing(engine: Engine, tmp_path: Path) -> None:
    """It holds neither the batch nor the engine: programs that run for weeks collect errors."""
    bad = BAD["photo"][0](engine, tmp_path / "none.jpg")
    gc.collect()
    gc.disable()
    try:
        [failed] = engine.generate_batch([bad], errors="return", **OPTIONS)
        link: BaseException | None = failed  # type: ignore[assignment]
        while link is not None:
            assert link.__traceback__ is None
            link = link.__cause__ or link.__context__
    finally:
        gc.enable()


def test_a_callback_is_refused_before_anything_is_looked_for(engine_dir: Path, tmp_path: Path) -> None:
    engine = Engine.load(engine_dir, device="cpu:1")

    def progress(step: int, of: int) -> None:
        for call in (lambda: engine.embed(tmp_path / "none.jpg"), lambda: engine.generate("x", [Person("none.jpg")])):
            with pytest.raises(RequestError, match="a progress callback called the engine that runs it"):
                call()

    engine.generate("x", num_inference_steps=1, output="latents", progress=progress)
