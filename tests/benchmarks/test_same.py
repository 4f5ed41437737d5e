"""Contenders that cannot be compared are refused with a sentence."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from benchmarks.latency import main
from benchmarks.measure import Run
from benchmarks.same import SAME, check_same_arithmetic, check_same_picture, open_original
from export.building.origins import recall, remember
from export.miniature import make_checkpoint
from realisid_trt import Engine
from realisid_trt.errors import CheckpointError, RequestError
from realisid_trt.manifest import Manifest
from tests.benchmarks.support import arguments


def test_a_baseline_finds_the_checkpoint_or_asks_for_it(
    engine_copy: Path,
    checkpoint_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    short = ["--persons", "0", "--steps", "1", "--runs", "1", "--warmup", "0", "--memory-format", "contiguous"]
    assert main(["--engine", str(engine_copy), *short]) == 0
    assert "engine is faster by" in capsys.readouterr().out
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another machine"))
    assert main(["--engine", str(engine_copy), *short]) == 1
    assert "Give --checkpoint CKPT, or --baseline none." in capsys.readouterr().err
    assert main(["--engine", str(engine_copy), "--checkpoint", str(checkpoint_dir), *short]) == 0


def test_a_folder_that_is_gone_is_nobody_s_memory(
    engine_dir: Path, checkpoint_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    manifest, checkpoint = Manifest.read(engine_dir), tmp_path / "checkpoint"
    checkpoint.mkdir()
    remember(manifest.values, checkpoint=checkpoint, base_model="owner/model", variant=None)
    origin = {"path": str(checkpoint), "base_model": "owner/model", "variant": None}
    assert recall(manifest.values) == origin
    [record] = (tmp_path / "cache").rglob("origins/*.json")
    record.write_text(json.dumps(origin | {"variant": "fp16", "local_files_only": True}))  # of a later version
    assert recall(manifest.values) == origin | {"variant": "fp16"}
    for other in ("[]", "{}", json.dumps(origin | {"path": 7}), "no JSON"):
        record.write_text(other)
        assert recall(manifest.values) == {}
    record.write_text(json.dumps(origin))
    checkpoint.rmdir()
    assert recall(manifest.values) == {}
    with pytest.raises(CheckpointError, match="is not known on this machine.* Give --checkpoint CKPT"):
        open_original(manifest, None)


def test_a_checkpoint_opens_with_the_base_model_and_variant_given(
    engine_dir: Path, checkpoint_dir: Path, tmp_path: Path
) -> None:
    """Its own parts here, those of the base model there, under the names of a variant."""
    own, base = tmp_path / "own", tmp_path / "base"
    shutil.copytree(checkpoint_dir, own, copy_function=os.link)
    base.mkdir()
    (own / "unet").rename(base / "unet")
    for weights in (base / "unet").glob("*.safetensors"):
        weights.rename(weights.with_suffix(".fp16.safetensors"))
    line = arguments(engine_dir, own, "--persons", "0", "--memory-format", "contiguous")
    assert main([*line, "--base-model", str(base), "--variant", "fp16"]) == 0
    assert main([*line, "--base-model", str(own)]) == 1


def test_another_model_is_refused(
    engine_dir: Path, checkpoint_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another seed's checkpoint, and one with only its UNet swapped."""
    other = make_checkpoint(tmp_path / "other", seed=1)
    assert main(arguments(engine_dir, other)) == 1
    assert "was not built from" in capsys.readouterr().err
    swapped = tmp_path / "swapped"
    shutil.copytree(checkpoint_dir, swapped)
    shutil.rmtree(swapped / "unet")
    shutil.copytree(other / "unet", swapped / "unet")
    assert main(arguments(engine_dir, swapped, "--persons", "0")) == 1
    assert "was not built from" in capsys.readouterr().err


def test_different_pictures_are_not_compared() -> None:
    latents = np.random.default_rng(0).standard_normal((1, 4, 8, 8)).astype(np.float32)
    one, rounded, other = (
        Run(1, {}, [], {}, [], final, {}) for final in (latents, latents * (1 + 1e-6), latents + 0.01)
    )
    assert check_same_picture(one, rounded) == pytest.approx(1e-6, rel=0.1)
    with pytest.raises(CheckpointError, match="make different pictures: their final latents differ by"):
        check_same_picture(one, other)


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_half_precision_is_a_stated_distance(precision: str) -> None:
    latents = np.random.default_rng(0).standard_normal((1, 4, 8, 8)).astype(np.float32)
    one, near, far = (
        Run(1, {}, [], {}, [], latents * (1 + error), {})
        for error in (0, 0.99 * SAME[precision], 1.01 * SAME[precision])
    )
    assert check_same_picture(near, one, precision) == pytest.approx(0.99 * SAME[precision], rel=1e-3)
    with pytest.raises(CheckpointError, match=f"where {precision} arithmetic leaves less than"):
        check_same_picture(far, one, precision)


@pytest.mark.parametrize(("device", "precision"), [("cpu:2", "float16"), ("cpu", "bfloat16"), ("abacus", "float32")])
def test_other_arithmetic_is_not_compared(device: str, precision: str) -> None:
    with pytest.raises(RequestError, match=f"this engine computes {precision} on {device}: .* --baseline none"):
        check_same_arithmetic(device, precision)


@pytest.mark.parametrize("precision", ["float32", "float16", "bfloat16"])
def test_on_a_gpu_a_baseline_computes_as_the_engine_does(precision: str) -> None:
    check_same_arithmetic("cuda:1", precision)


def test_a_baseline_beside_a_half_precision_engine_is_bad_usage(
    engine: Engine, engine_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine.backend, "precision", "float16")  # the precision that such an engine reports on a GPU
    monkeypatch.setattr(Engine, "load", lambda *_, **__: engine)
    assert main(["--engine", str(engine_dir)]) == 2
    assert "--baseline none" in capsys.readouterr().err
