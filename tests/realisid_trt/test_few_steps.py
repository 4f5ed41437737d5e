"""Samplers in an engine: which one runs, how many steps, steps without guidance, and what a result says of them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from realisid_trt import Engine, Request, Sampler
from realisid_trt.__main__ import main
from realisid_trt.errors import RequestError
from tests.realisid_trt.truth import people

NETWORKS = ("unet_encoder", "unet_decoder")


def made(engine: Engine, persons: int = 1, steps: int | None = 4, **options: Any) -> Any:
    given = {"subject_conditioning_ratio": None, "seed": 5, "output": "latents", **options}
    return engine.generate("two friends", people(engine, persons), num_inference_steps=steps, **given)


@pytest.mark.parametrize(
    ("sampler", "said", "evaluations"),
    [
        ("dpmpp-2m-karras", "dpmpp-2m-karras, 4 steps", 4),
        ("heun", "heun, 4 steps of 7 evaluations", 7),
        ("dpmpp-sde-karras", "dpmpp-sde-karras, 4 steps of 7 evaluations", 7),
        (Sampler("tcd", eta=0.5), "tcd, 4 steps", 4),
        ({"name": "euler", "spacing": "trailing"}, "euler, 4 steps", 4),
        (None, "ddim, 4 steps", 4),
    ],
)
def test_a_result_says_which_sampler_ran(engine: Engine, sampler: Any, said: str, evaluations: int) -> None:
    told = list[tuple[int, int]]()
    result = made(engine, sampler=sampler, progress=lambda *step: told.append(step))
    assert result.sampler == said and len(result.step_ms) == evaluations
    assert told == [(step, evaluations) for step in range(1, evaluations + 1)]
    assert result.rows["guide_step"] == evaluations
    assert np.isfinite(result.latents).all() and result.latents.std() > 0.1


def test_another_sampler_is_another_picture_of_the_same_noise(engine: Engine) -> None:
    names = ("ddim", "euler-a", "dpmpp-2m", "dpmpp-2m-sde", "unipc", "lcm")
    pictures = [made(engine, sampler=name).latents for name in names]
    for first in range(len(names)):
        for second in range(first):
            assert np.abs(pictures[first] - pictures[second]).max() > 0.01, (names[first], names[second])
    again = made(engine, sampler="euler-a").latents
    assert np.array_equal(again, pictures[names.index("euler-a")])


def test_steps_are_those_of_the_timesteps_if_nobody_says(engine: Engine) -> None:
    sampler = Sampler("lcm", timesteps=(999, 759, 499))
    assert made(engine, steps=None, sampler=sampler).sampler == "lcm, 3 steps"
    with pytest.raises(RequestError, match="num_inference_steps is 4, and the sampler has 3 timesteps"):
        made(engine, steps=4, sampler=sampler)


def test_pictures_of_a_batch_have_noise_of_their_own(engine: Engine) -> None:
    """The fresh noise of a step is that of the picture's seed, alone and in a batch."""
    options: dict[str, Any] = {"num_inference_steps": 3, "sampler": "euler-a", "output": "latents"}
    requests = [Request("a beach", seed=7, num_images=2), Request("a street", people(engine, 1), seed=8)]
    first, second = engine.generate_batch(requests, **options)
    [alone] = engine.generate_batch([Request("a beach", seed=8)], **options)
    assert np.array_equal(first.latents[1:], alone.latents)
    [alone] = engine.generate_batch([requests[1]], **options)
    assert np.array_equal(second.latents, alone.latents)


def test_latents_of_the_caller_are_the_noise(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Euler with trailing spacing starts at its own level of noise, z_T = init·noise, as diffusers has it."""
    model, sampler = engine.model, Sampler("euler", spacing="trailing")
    cells = model.default_size // model.vae_scale_factor
    noise = np.random.default_rng(3).standard_normal((1, model.latent_channels, cells, cells)).astype(np.float32)
    backend, seen = type(engine.backend), list[Any]()
    run: Any = backend.guide_step

    def watched(self: Any, latents: Any, *rest: Any, **named: Any) -> None:
        seen.append(latents.copy())
        run(self, latents, *rest, **named)

    monkeypatch.setattr(backend, "guide_step", watched)
    made(engine, 0, 1, sampler=sampler, latents=noise)
    init = engine._prologue.sampler_table(sampler, 1).init
    assert 0.9 < init < 1
    np.testing.assert_array_equal(seen[0], np.float32(init) * noise)


# Steps without guidance


def sigmas(engine: Engine, steps: int) -> np.ndarray:
    return engine._prologue.sampler_table(None, steps).sigmas


def test_without_guidance_only_one_row_is_left(engine: Engine) -> None:
    """λt = λi = 1: the same picture as with these scales, at the same cost."""
    plain = made(engine, 2, guidance_scale=1.0, id_guidance_scale=1.0)
    outside = made(engine, 2, guidance_interval=(200.0, 300.0))
    assert np.array_equal(outside.latents, plain.latents)
    assert [outside.rows[name] for name in NETWORKS] == [plain.rows[name] for name in NETWORKS] == [4, 4]
    everywhere = made(engine, 2, guidance_interval=(0.0, 300.0))
    assert np.array_equal(everywhere.latents, made(engine, 2).latents)


def test_an_interval_holds_its_upper_end_and_not_its_lower(engine: Engine) -> None:
    levels = sigmas(engine, 5)
    assert (np.diff(levels) < 0).all()
    for low, high, guided in ((levels[3], levels[1], 2), (levels[4], levels[0], 4), (levels[2], levels[1] * 1.001, 1)):
        result = made(engine, 1, 5, guidance_interval=(float(low), float(high)))
        # one row without guidance; two of the encoder and three of the decoder with it
        assert [result.rows[name] for name in NETWORKS] == [5 + guided, 5 + 2 * guided]


def test_a_step_of_two_evaluations_is_guided_in_both_or_in_none(engine: Engine) -> None:
    table = engine._prologue.sampler_table("heun", 4)
    first, second = table.sigmas[2:4]  # of the second step
    result = made(engine, 1, 4, sampler="heun", guidance_interval=(float(second), float(first)))
    assert result.rows["unet_decoder"] == 7 + 2 * 2


def test_the_delay_counts_steps_and_not_evaluations(engine: Engine) -> None:
    """α = 0.5 of four steps: i <= 2, so that three run without the ID, whatever they evaluate."""
    result = made(engine, 1, 4, sampler="heun", subject_conditioning_ratio=0.5)
    # none and text in 3 · 2 evaluations, none, text and full in the last one
    assert result.rows["unet_decoder"] == 6 * 2 + 3


def test_requests_of_a_batch_have_intervals_of_their_own(engine: Engine) -> None:
    requests = [
        Request("a beach", people(engine, 1), seed=3, guidance_interval=interval)
        for interval in (None, (0.5, 3.0), (200.0, 300.0))
    ]
    options: dict[str, Any] = {"num_inference_steps": 6, "output": "latents"}
    for request, found in zip(requests, engine.generate_batch(requests, **options), strict=True):
        [alone] = engine.generate_batch([request], **options)
        assert np.array_equal(found.latents, alone.latents)


def test_an_interval_may_be_an_array_or_have_no_upper_end(engine: Engine) -> None:
    low = float(sigmas(engine, 4)[2])
    expected = made(engine, guidance_interval=(low, 300.0)).latents
    for interval in (np.array([low, 300.0]), [low, math.inf]):
        assert np.array_equal(made(engine, guidance_interval=interval).latents, expected)
    assert not np.array_equal(made(engine).latents, expected)


@pytest.mark.parametrize(
    "interval", [(3, 1), (1, 1), (-1, 2), (1,), "0,1", 5, (math.inf, math.inf), (1, math.nan), (None, 2)]
)
def test_impossible_intervals(engine: Engine, interval: Any) -> None:
    with pytest.raises(RequestError, match="^guidance_interval is .*, expected two noise levels σ, 0 <= low < high"):
        made(engine, guidance_interval=interval)


# Notes


def test_a_delay_of_most_steps_is_noted(engine: Engine) -> None:
    def notes(steps: int, alpha: float | None, persons: int = 1) -> tuple[str, ...]:
        return tuple(made(engine, persons, steps, subject_conditioning_ratio=alpha).notes)

    [note] = notes(4, 0.7)
    assert note.startswith("2 of 4 steps had no ID. With so few steps give subject_conditioning_ratio=None")
    assert notes(4, None) == notes(4, 0.7, persons=0) == notes(9, 0.7) == notes(10, 0.2) == ()


def test_a_guidance_scale_of_zero_is_noted(engine: Engine) -> None:
    [note] = made(engine, 0, 1, guidance_scale=0).notes
    assert note == "guidance_scale 0 leaves the text out. No guidance, which model cards call 0, is 1 here."
    assert made(engine, 0, 1, guidance_scale=1).notes == ()


def test_weights_that_know_their_steps(engine_dir: Path, with_config: Callable[..., Path]) -> None:
    fixed = Engine.load(with_config(engine_dir, sampler="euler", steps="fixed", num_inference_steps=3))
    assert made(fixed, 0, None).notes == () and made(fixed, 0, None).sampler == "euler, 3 steps"
    for given, taken in (({"steps": 4}, "4 of euler"), ({"steps": None, "sampler": "unipc"}, "3 of unipc")):
        [note] = made(fixed, 0, **given).notes
        assert note == f"these weights were made for 3 steps of euler, not for {taken}."


# The command line


def test_the_command_line(engine_dir: Path, engine: Engine, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*flags: str) -> dict[str, Any]:
        command = ["generate", "--engine", str(engine_dir), "--prompt", "a beach", "--seed", "3", "--json"]
        assert main([*command, "--out", str(tmp_path / "out.png"), *flags]) == 0
        last: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
        return last

    assert run("--steps", "3", "--sampler", "heun")["sampler"] == "heun, 3 steps of 5 evaluations"
    assert run("--sampler", "lcm", "--timesteps", "999,499")["sampler"] == "lcm, 2 steps"
    assert run("--steps", "2", "--eta", "0.5")["sampler"] == "ddim, 2 steps"
    as_in_a_config = '{"name": "euler", "spacing": "trailing"}'
    assert run("--steps", "2", "--sampler", as_in_a_config)["sampler"] == "euler, 2 steps"
    assert run("--sampler", as_in_a_config, "--timesteps", "999,499")["sampler"] == "euler, 2 steps"  # in its place
    rows = run("--steps", "2", "--guidance-interval", "200,300")["rows"]
    assert rows["unet_decoder"] == 2
    fresh, plain = (
        engine.generate("a beach", seed=3, num_inference_steps=2, sampler=Sampler("ddim", eta=eta), output="latents")
        for eta in (0.5, 0.0)
    )
    assert np.abs(fresh.latents - plain.latents).max() > 0.01


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--sampler", "{name: euler}"], "--sampler {name: euler} cannot be read as JSON"),
        (["--sampler", '{"name": "euler", "sigma": 1}'], "sampler: unknown key 'sigma'. Known keys: name, spacing"),
        (["--sampler", "magic", "--engine", "nowhere"], "sampler is 'magic', expected one of ddim, euler"),
        (["--sampler", "magic"], "sampler is 'magic', expected one of ddim, euler"),
        (["--sampler", "pndm"], "pndm is not offered: it keeps three or more past predictions"),
        (["--sampler", "euler", "--eta", "0.5"], "euler has no eta"),
        (["--timesteps", "a,b"], "--timesteps 'a,b' is not understood. Write numbers with commas: 999,749,499,249."),
        (["--guidance-interval", "x"], "--guidance-interval 'x' is not understood. Write numbers with commas"),
    ],
)
def test_the_command_line_refuses(
    engine_dir: Path, tmp_path: Path, flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.png"
    command = ["generate", "--engine", str(engine_dir), "--prompt", "a beach", "--out", str(out), *flags]
    assert main(command) == 2 and message in capsys.readouterr().err
    assert not out.exists()
