"""The trained miniature as it is shipped: small, whole, in half precision. Its engine draws the requested people."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file

import export.build
from export.build import miniature_checkpoint
from export.checkpoint import Checkpoint
from realisid_trt import Engine
from realisid_trt.errors import CheckpointError
from tests.conftest import ENGINES, ROOT
from training.evaluate import JUDGES_FOLDER
from training.evaluation.cases import Case, Casting
from training.evaluation.contenders import EngineContender
from training.evaluation.measures import Judgement, Judges
from training.evaluation.sampler import TorchSampler

FOLDER = ROOT / "checkpoints" / "miniature"
CASTING = Casting()
with_its_engine = pytest.mark.slow("the trained miniature's engine")


def test_it_is_a_whole_checkpoint_of_at_most_25_mb() -> None:
    checkpoint = Checkpoint.open(FOLDER)
    checkpoint.check_weights()
    assert sum(file.stat().st_size for file in FOLDER.rglob("*") if file.is_file()) < 25e6
    for file in FOLDER.rglob("*.safetensors"):
        for name, value in load_file(file).items():
            assert value.dtype == torch.float16 and value.isfinite().all(), (file, name)


def test_its_card_says_how_it_came_about() -> None:
    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    for word in ("seed", "steps", "training.recipe", "cores", "Apache-2.0", "v-prediction"):
        assert word in card, word


def test_it_is_what_is_built_without_a_checkpoint(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert miniature_checkpoint() == FOLDER
    monkeypatch.setattr(export.build, "__file__", str(tmp_path / "export" / "build.py"))  # as in an installed package
    with pytest.raises(CheckpointError, match="no --checkpoint is given, .* python -m export.miniature --out CKPT"):
        miniature_checkpoint()


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    """As `make demo` builds it."""
    out = ENGINES / "test-trained"
    command = [sys.executable, "-m", "export.build", "--out", str(out), "--backend", "onnxruntime"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with Engine.load(out, device="cpu") as opened:
        yield opened


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    """Twelve people whom no training saw, with regular faces."""
    return CASTING.table("regular", identities=12, count=12, first=4_000_000)


@pytest.fixture(scope="module")
def pictures(engine: Engine, cases: list[Case]) -> NDArray[np.uint8]:
    return EngineContender(engine).make(cases, "engine")


@pytest.fixture(scope="module")
def judges() -> Judges:
    return Judges(JUDGES_FOLDER, CASTING)


@pytest.fixture(scope="module")
def told(judges: Judges, cases: list[Case], pictures: NDArray[np.uint8]) -> Judgement:
    return judges.judge(cases, pictures)


@with_its_engine
def test_the_engine_makes_the_references_pictures(cases: list[Case], pictures: NDArray[np.uint8]) -> None:
    """Float32, all steps, trained weights: at most a level of 255 apart."""
    torch_made = TorchSampler(Checkpoint.open(FOLDER)).make(cases[:2], "torch")
    assert np.abs(pictures[:2].astype(int) - torch_made).max() <= 1


@with_its_engine
def test_everybody_is_at_their_place_and_recognised(told: Judgement) -> None:
    """The tables in training/results have the shares of hundreds of pictures; twelve must not be far from them."""
    assert told.values["iou"].mean() > 0.7
    assert told.values["rank1"].mean() >= 0.6  # of nine people; by chance 0.11


@with_its_engine
def test_the_sheet_in_the_readme_is_what_it_draws(engine: Engine, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "examples.demo", "--engine", str(ENGINES / "test-trained"), "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with Image.open(ROOT / "docs" / "demo.png") as shown, Image.open(tmp_path / "demo.png") as made:
        apart = np.abs(np.asarray(shown).astype(int) - np.asarray(made))
    assert apart.mean() < 0.1  # levels of 255; other processors round differently, other weights draw other people


@with_its_engine
def test_three_people_do_not_get_mixed_up(engine: Engine, judges: Judges) -> None:
    cases = CASTING.groups(3, 4, (6 / 32, 6 / 32), "apart", identities=40)
    told = judges.judge(cases, EngineContender(engine).make(cases, "three")).values
    assert told["iou"].mean() > 0.7 and told["number"][::3].mean() >= 0.75
    assert told["neighbour"].mean() >= 0.7  # nearer to their own than to both others; by chance 0.33
    assert told["rank1"].mean() >= 0.5


@with_its_engine
def test_the_identity_comes_from_the_photo(engine: Engine, judges: Judges, cases: list[Case], told: Judgement) -> None:
    """Without identity guidance, the same noise, place and words show another person."""
    nobody = EngineContender(engine, options={"id_guidance_scale": 0.0}).make(cases, "λi = 0")
    without = judges.judge(cases, nobody).values
    assert told.values["similarity"].mean() > without["similarity"].mean() + 0.1
