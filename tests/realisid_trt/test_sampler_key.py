"""The key `sampler` of realisid_config.json: what it may say, and that manifests carry it."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from realisid_trt import Sampler
from realisid_trt.commands.inspect_engine import inspect_engine
from realisid_trt.config import RealisIDConfig
from realisid_trt.errors import CheckpointError, RequestError
from realisid_trt.loop.samplers import NAMES
from realisid_trt.manifest import MANIFEST, Manifest
from tests.realisid_trt.truth import Scene, checkpoint_with, errors

DMD2 = {"name": "lcm", "timesteps": [999, 749, 499, 249]}
KEYS: list[str | dict[str, Any]] = [
    *NAMES, {"name": "euler", "spacing": "trailing"}, {"name": "ddim", "spacing": "linspace", "eta": 0.5}, DMD2,
    {"name": "tcd", "eta": 0, "original_inference_steps": 40}, {"name": "euler", "timesteps": [999, 600.5, 12.25, 0]},
]  # fmt: skip


def config_of(sampler: Any = None, **values: Any) -> RealisIDConfig:
    given = {"branch_pooled_text": "zeros", "num_inference_steps": 4, **values}
    return RealisIDConfig.from_dict(given if sampler is None else {**given, "sampler": sampler})


@pytest.mark.parametrize("key", KEYS, ids=str)
@pytest.mark.parametrize("resolved", [False, True])
def test_a_key_comes_back_as_it_was_written(key: Any, resolved: bool) -> None:
    config = config_of(key).resolved() if resolved else config_of(key)
    assert config.sampler == Sampler.of(key) and hash(config.sampler) == hash(Sampler.of(key))
    values = config.to_dict()
    assert values["sampler"] == key == json.loads(json.dumps(values))["sampler"]
    assert RealisIDConfig.from_dict(json.loads(json.dumps(values))) == config


def test_nulls_say_nothing() -> None:
    key = {"name": "euler", "spacing": None, "eta": None, "timesteps": None, "original_inference_steps": None}
    assert config_of(key).to_dict()["sampler"] == "euler"
    assert config_of({"name": "lcm", "timesteps": DMD2["timesteps"], "eta": None}).to_dict()["sampler"] == DMD2


@pytest.mark.parametrize("method", ["realisid", "idpatch", "controlnet"])
def test_without_the_keys_files_stay_what_they_were(method: str) -> None:
    row = {"name": "canny", "condition": "image", "tokens": "text", "pooled": "per_row"}
    values: dict[str, Any] = {"method": method}
    values |= {"branches": [row]} if method == "controlnet" else {}
    values |= {"branch_pooled_text": "zeros"} if method == "realisid" else {}
    for keys in ({}, {"sampler": None, "steps": "free"}):
        config = RealisIDConfig.from_dict({**values, **keys})
        assert config.sampler is None and config.steps == "free" and config.fixed_steps is None
        assert not {"sampler", "steps"} & {*config.to_dict(), *config.resolved().to_dict()}


def test_distilled_weights_know_their_number_of_steps() -> None:
    assert config_of(DMD2).fixed_steps == 4
    assert config_of("euler").fixed_steps is None
    assert config_of("euler", steps="fixed", num_inference_steps=8).fixed_steps == 8
    assert config_of(steps="fixed").fixed_steps == 4  # by DDIM
    assert config_of(steps="fixed").to_dict()["steps"] == "fixed"


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"sampler": "eular"}, "FILE: sampler is 'eular', expected one of ddim, euler, "),
        ({"sampler": "lcm-karras"}, "FILE: sampler: lcm has no Karras noise levels. Write 'lcm', or take one of ddim"),
        ({"sampler": {"spacing": "trailing"}}, "FILE: sampler is {'spacing': 'trailing'}, expected a name, a Sampler"),
        ({"sampler": {"name": "ddim", "etta": 1}}, "FILE: sampler: unknown key 'etta'. Known keys: name, spacing, eta"),
        ({"sampler": {"name": "lcm", "spacing": "trailing"}}, "FILE: sampler: lcm has no spacing; it has timesteps, "),
        ({"sampler": {"name": "ddim", "clip_sample": True}}, "FILE: sampler: clip_sample is not offered: a step is "),
        (
            {"sampler": {**DMD2, "timesteps": [999, 749]}},
            "FILE: sampler has 2 timesteps, and num_inference_steps is 4.",
        ),
        ({"steps": "few"}, "FILE: steps is 'few', expected one of free, fixed. Mend it."),
        ({"steps": None}, "FILE: steps is None, expected one of free, fixed. Mend it."),
    ],
)
def test_what_is_wrong_names_file_and_key(values: dict[str, Any], said: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        RealisIDConfig.from_dict(
            {"branch_pooled_text": "zeros", "num_inference_steps": 4, **values}, "FILE", "Mend it."
        )
    assert str(caught.value).startswith(said)


def test_whatever_stands_there_only_a_checkpoint_error_comes_out() -> None:
    odd: tuple[Any, ...] = (True, 0, -1.5, "", "x", [], [1], [[1], [2, 3]], {}, {"name": []}, {"odd": [None]}, 1e999)
    tried = 0
    fields = ("name", "spacing", "eta", "timesteps", "original_inference_steps")
    for name, key in itertools.product(("ddim", "euler", "lcm", "unipc-karras"), fields):
        for value in odd:
            for given in (value, {"name": name, key: value}):
                try:
                    assert config_of(given).sampler is not None
                except CheckpointError as error:
                    assert "sampler" in str(error) and not isinstance(error.__cause__, TypeError)
                tried += 1
    assert tried > 300


def test_a_sampler_of_python_is_taken_too() -> None:
    sampler = Sampler("euler", spacing="trailing")
    assert config_of(sampler).sampler is sampler
    with pytest.raises(RequestError):  # and no CheckpointError: no file is involved
        Sampler.of({"name": "euler", "eta": 1})


# The manifest


def test_a_manifest_carries_the_sampler_and_an_older_one_opens(
    engine_dir: Path, with_config: Callable[..., Path]
) -> None:
    older = json.loads((engine_dir / MANIFEST).read_text())
    assert "sampler" not in older["realisid_config"]
    assert Manifest.read(engine_dir).config.sampler is None
    config = Manifest.read(with_config(engine_dir, sampler=DMD2, num_inference_steps=4)).config
    assert config.sampler == Sampler.of(DMD2) and config.fixed_steps == 4


@pytest.mark.parametrize(
    ("config", "line"),
    [
        ({}, "sampler: ddim, epsilon, leading spacing"),
        ({"sampler": "euler-karras"}, "sampler: euler-karras, epsilon, leading spacing"),
        ({"sampler": "dpmpp-2m-karras"}, "sampler: dpmpp-2m-karras, epsilon"),  # its spacing is Karras' own
        (
            {
                "sampler": {"name": "ddim", "spacing": "trailing", "eta": 0.5},
                "steps": "fixed",
                "num_inference_steps": 8,
            },
            "sampler: ddim, epsilon, trailing spacing, eta 0.5, distilled to 8 steps",
        ),
        (
            {"sampler": DMD2, "num_inference_steps": 4},
            "sampler: lcm, epsilon, timesteps 999, 749, 499, 249, distilled to 4 steps",
        ),
        (
            {"sampler": {"name": "tcd", "original_inference_steps": 40}, "steps": "fixed", "num_inference_steps": 1},
            "sampler: tcd, epsilon, of 40 timesteps, distilled to 1 step",
        ),
    ],
)
def test_inspect_names_the_sampler(
    config: dict[str, Any], line: str, engine_dir: Path, with_config: Callable[..., Path]
) -> None:
    lines = inspect_engine(str(with_config(engine_dir, **config))).lines
    assert [each for each in lines if each.startswith("sampler: ")] == [line]
    [shown] = [each for each in lines if each.startswith("realisid_config: ")]
    assert "sampler" not in shown and "relocate_mode=bilinear" in shown


def test_the_engine_of_a_network_that_predicts_clean_latents(built: Any, with_config: Callable[..., Path]) -> None:
    """As the 1-step SDXL-Lightning does."""
    from realisid_trt import Engine

    scheduler, of = {"prediction_type": "sample", "timestep_spacing": "trailing"}, built["x4"]
    with Engine.load(with_config(of.engine, scheduler=scheduler)) as engine:
        side = engine.model.default_size
        for steps in (1, 3):
            ours, plain = errors(
                engine,
                checkpoint_with(of.checkpoint, scheduler),
                Scene.make(engine, "one", side, side),
                num_inference_steps=steps,
                subject_conditioning_ratio=None,
            )
            assert 0 < ours <= 4 * plain
