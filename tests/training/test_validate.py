"""Losses of finished trainings on examples that they did not see, pair by pair."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from export.checkpoint import Checkpoint
from export.miniature import make_checkpoint
from training.examples import WorldFaces, WorldScenes
from training.processes import accelerator_of
from training.recipe import START
from training.stages import STAGES
from training.store import Store, store_of
from training.train import main as train
from training.validate import main

LEARN = (
    "--new", "--cpu", "--half", "--batch-size", "4", "--threads", "1", "--warmup-steps", "2", "--ema", "0",
    "--precision", "no",
)  # fmt: skip
PLACES = ("x0_inside", "x0_edge", "x0_around", "x0_elsewhere")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trainings: short, long, an uncropped twin, and two of other stages. Data: seen and held-out."""
    folder = tmp_path_factory.mktemp("runs")
    start = make_checkpoint(folder / "start", **START)
    store_of(WorldScenes(pictures=16, persons=(1,), crop_px=64), folder / "seen")
    store_of(WorldScenes(pictures=12, persons=(1, 2), crop_px=64, first=500), folder / "held-out")
    store_of(WorldScenes(pictures=8), folder / "scenes")
    store_of(WorldFaces(pairs=8, views=2, scene_px=48), folder / "faces")
    for out, stage, data, steps in (
        ("short", "branches", "seen", "1"), ("long", "branches", "seen", "9"), ("twin", "branches-uncropped", "seen",
        "9"), ("contrast", "recogniser", "faces", "1"), ("pictures", "vae", "scenes", "1"),
    ):  # fmt: skip
        where = ["--checkpoint", str(start), "--data", str(folder / data), "--out", str(folder / out)]
        assert train([stage, *where, *LEARN, "--steps", steps, "--learning-rate", "1e-3"]) == 0
    return folder


def told(
    capsys: pytest.CaptureFixture[str], runs: Path, *names: str, data: str = "held-out", more: Sequence[str] = ()
) -> dict[str, Any]:
    which = [word for name in names for word in ("--run", str(runs / name))]
    assert main([*which, *more, "--data", str(runs / data), "--cpu", "--draws", "2", "--json"]) == 0
    values: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return values


@pytest.mark.slow
def test_what_learned_longer_has_less_loss(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = told(capsys, runs, "short", "long", "twin")
    short, long, twin = (values["runs"][str(runs / name)] for name in ("short", "long", "twin"))
    assert [short["steps"], long["steps"], twin["stage"]] == [1, 9, "branches-uncropped"]
    assert "minus the first" not in short
    for other in (long, twin):
        assert set(other["losses"]["all"]) == {"loss", "whole", "face_x0", *PLACES} and other["seen"] is False
        mean, _, high = other["minus the first"]["all"]["loss"]
        assert mean < 0 and high < 0
        assert mean == pytest.approx(other["losses"]["all"]["loss"][0] - short["losses"]["all"]["loss"][0], abs=2e-5)
    assert long["losses"]["all"] != twin["losses"]["all"]


def test_no_more_is_encoded_than_is_asked_for(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Only the first two examples are encoded, and no file is left beside them."""
    values = told(capsys, runs, "long", more=("--examples", "2"))
    assert values["examples"] == values["groups"]["all"] == 2
    assert not list((runs / "held-out").glob(".latents*"))


def test_sizes_are_parts_of_all(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = told(capsys, runs, "long")
    sizes = {name: count for name, count in values["groups"].items() if name != "all"}
    assert values["groups"]["all"] == values["examples"] == sum(sizes.values()) == 12 and len(sizes) > 1
    means = values["runs"][str(runs / "long")]["losses"]
    parts = [means[name]["loss"][0] for name in sizes]
    assert np.average(parts, weights=list(sizes.values())) == pytest.approx(means["all"]["loss"][0], abs=2e-5)


def test_noise_levels_are_parts_of_all(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With little noise, v is nearly the noise itself, which an untrained base cannot predict."""
    values = told(capsys, runs, "long", more=("--noise-levels", "2", "--draws", "8"))
    means = values["runs"][str(runs / "long")]["losses"]
    low, high = (means[f"all, t {name}"] for name in ("0 to 499", "500 to 999"))
    for key in ("loss", *PLACES):
        assert min(low[key][0], high[key][0]) <= means["all"][key][0] <= max(low[key][0], high[key][0])
    assert low["loss"][1] > high["loss"][2]


def test_places_are_parts_of_a_picture(runs: Path) -> None:
    """The face is the inside and the edge: a box of n × n cells has (n - 2)² cells inside."""
    start = Checkpoint.open(runs / "start")
    stage = STAGES["branches"](start, Store(runs / "held-out"), accelerator_of(cpu=True), new=True, seed=0)
    batch = {key: part[None] for key, part in stage.item(0, np.random.default_rng(0)).items()}
    with torch.no_grad():
        found = {key: float(value) for key, value in stage.validation_losses(batch).items()}
    faces = batch["each.face"][0, : int(batch["num_persons"])]
    assert len(faces) == 1
    cells = int(faces.sum())
    inside = (round(cells**0.5) - 2) ** 2
    face = (inside * found["x0_inside"] + (cells - inside) * found["x0_edge"]) / cells
    assert face == pytest.approx(found["face_x0"], rel=1e-5)


@pytest.mark.slow
def test_all_are_given_the_same_noise(runs: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """So a run and its copy have no difference, and a second call gives the same."""
    shutil.copytree(runs / "long", runs / "copy", dirs_exist_ok=True)
    values = told(capsys, runs, "long", "copy", data="seen")
    copied = values["runs"][str(runs / "copy")]
    assert copied["seen"] is True
    differences = {tuple(value) for means in copied["minus the first"].values() for value in means.values()}
    assert differences <= {(0, 0, 0), (0, None, None)} and (0, 0, 0) in differences  # None: a group of one example
    file, where = tmp_path / "made" / "losses.json", ["--run", str(runs / "long"), "--data", str(runs / "seen")]
    assert main([*where, "--cpu", "--draws", "2", "--out", str(file)]) == 0
    words = capsys.readouterr().out
    assert "on the examples that it was trained on" in words and "of 1/4 and more" in words
    assert json.loads(file.read_text())["runs"][str(runs / "long")] == values["runs"][str(runs / "long")]


def test_refusals(runs: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    def refused(*more: str, data: str = "held-out") -> str:
        assert main([*more, "--data", str(runs / data), "--cpu"]) == 2
        return capsys.readouterr().err

    assert "--no-further" in refused("--run", str(tmp_path))
    assert "compares examples with each other" in refused("--run", str(runs / "contrast"), data="faces")
    assert "left a checkpoint" in refused("--run", str(runs / "twin"))
    assert "expected at least 1" in refused("--run", str(runs / "long"), "--draws", "0")
    assert "--noise-levels is 0" in refused("--run", str(runs / "long"), "--noise-levels", "0")
    other = ("--run", str(runs / "pictures"), "--noise-levels", "2")
    assert "Leave --noise-levels out" in refused(*other, "--examples", "2", data="scenes")
    shutil.copytree(runs / "twin", tmp_path / "other")
    origin = json.loads((tmp_path / "other" / "origin.json").read_text())
    origin["weights"]["unet"] = "0" * 64
    (tmp_path / "other" / "origin.json").write_text(json.dumps(origin))
    assert "trained on another unet" in refused("--run", str(runs / "long"), "--run", str(tmp_path / "other"))
    origin = json.loads((runs / "twin" / "origin.json").read_text())
    origin["config"]["relocate_mode"] = "area"
    (tmp_path / "other" / "origin.json").write_text(json.dumps(origin))
    assert "for another relocate_mode" in refused("--run", str(runs / "long"), "--run", str(tmp_path / "other"))
    (tmp_path / "other" / "weights" / "uncropped.safetensors").write_bytes(b"damaged")
    assert "not what this training wrote" in refused("--run", str(tmp_path / "other"))
    shutil.copytree(runs / "long", tmp_path / "cut")
    next((tmp_path / "cut" / "checkpoint" / "controlnet_local").glob("*.safetensors")).unlink()
    assert "is missing" in refused("--run", str(tmp_path / "cut"))
