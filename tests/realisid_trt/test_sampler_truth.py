"""The engine with every sampler against the reference, which steps with diffusers' own schedulers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from realisid_trt import Engine, Sampler
from realisid_trt.loop.samplers import NAMES
from tests.realisid_trt.truth import Scene, checkpoint_with, errors

WORST_RATIO = 2.0  # of the error of plain torch in float32
EVERY_TIME = ("dpmpp-2m-karras", "euler-a")  # the others are slow


def each(names: tuple[str, ...]) -> list[Any]:
    return [pytest.param(name, marks=() if name in EVERY_TIME else pytest.mark.slow) for name in names]


def check(engine: Engine, checkpoint: Path, place: str = "apart", **settings: Any) -> None:
    """Two persons, a delay; final latents."""
    side = engine.model.default_size
    scene = Scene.make(engine, place, side, side)
    settings = {"num_inference_steps": 5, "subject_conditioning_ratio": 0.7, "seed": 9, **settings}
    ours, plain = errors(engine, checkpoint_with(checkpoint), scene, **settings)
    print(f"{settings['sampler']}: engine {ours:.2e}, torch in float32 {plain:.2e}, ratio {ours / plain:.2f}")
    assert 0 < ours <= WORST_RATIO * plain


@pytest.mark.parametrize("name", each(NAMES))
def test_each_sampler(name: str, engine: Engine, checkpoint_dir: Path) -> None:
    check(engine, checkpoint_dir, sampler=name)


@pytest.mark.slow
@pytest.mark.parametrize(
    "sampler",
    [
        Sampler("ddim", eta=0.6),
        Sampler("tcd", eta=0.7),
        Sampler("euler", spacing="trailing"),
        Sampler("heun", spacing="linspace"),
        Sampler("lcm", timesteps=(999, 759, 499, 259, 19)),
        Sampler("dpmpp-2m", timesteps=(999, 845, 730, 587, 310)),
    ],
    ids=str,
)
def test_options_of_samplers(sampler: Sampler, engine: Engine, checkpoint_dir: Path) -> None:
    check(engine, checkpoint_dir, sampler=sampler)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["unipc", "dpmpp-2m-sde-karras", "heun", "lcm"])
def test_v_prediction(name: str, engine_dir: Path, checkpoint_dir: Path, with_config: Callable[..., Path]) -> None:
    scheduler = {"prediction_type": "v_prediction"}
    engine = Engine.load(with_config(engine_dir, scheduler=scheduler))
    side = engine.model.default_size
    scene = Scene.make(engine, "one", side, side)
    settings: dict[str, Any] = {"num_inference_steps": 5, "subject_conditioning_ratio": None, "seed": 9}
    ours, plain = errors(engine, checkpoint_with(checkpoint_dir, scheduler), scene, sampler=name, **settings)
    assert 0 < ours <= WORST_RATIO * plain


@pytest.mark.parametrize("seed", [8, 10])
def test_the_noise_of_steps_is_seen(seed: int, engine: Engine) -> None:
    """Steps that draw noise from another seed make another picture, by far more than the bound."""
    side = engine.model.default_size
    scene = Scene.make(engine, "nobody", side, side)
    given: dict[str, Any] = {"num_inference_steps": 3, "sampler": "euler-a", "output": "latents"}
    one, other = (engine.generate("a beach", seed=each, latents=scene.latents, **given).latents for each in (9, seed))
    assert abs(one - other).max() > 0.05
