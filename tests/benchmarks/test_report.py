"""Figures → the report that people read."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.latency import main
from benchmarks.measure import Run
from benchmarks.report import colours_of, families, summarise, table


def test_the_table(measured: dict[str, Any]) -> None:
    shown = table(measured)
    assert "local 2, global 2, encoder 2, decoder 3" in shown and "local 3, global 3, unet 3" in shown
    total = measured["cases"][0]["contenders"]["engine"]["total_ms"]
    assert f"{total['p50']:.1f} ({total['min']:.1f}–{total['max']:.1f})" in shown  # two values have no percentiles


def test_the_plot_shows_every_stage_once(measured: dict[str, Any]) -> None:
    stages_of = families(measured)
    assert list(stages_of) == [
        "text", "conditions, time", "local branch", "global branch", "UNet", "between networks", "VAE",
    ]  # fmt: skip
    drawn = [stage for stages in stages_of.values() for stage in stages]
    for case in measured["cases"]:
        for contender in case["contenders"].values():
            stages = list(contender["stages_ms"])
            leaves = [stage for stage in stages if not any(other.startswith(f"{stage}.") for other in stages)]
            assert "denoise" not in leaves
            assert [drawn.count(stage) for stage in leaves] == [1] * len(leaves), leaves


def test_a_branch_has_one_colour_in_every_plot() -> None:
    stages = ["text", "denoise.local_branch", "denoise.open_pose_2_branch", "denoise.controlnet_depth", "denoise.unet"]
    few = {"stages_ms": dict.fromkeys(["text", "denoise.controlnet_depth", "denoise.unet_encoder"])}
    cases = [{"contenders": {"engine": few}}, {"contenders": {"naive": {"stages_ms": dict.fromkeys(stages)}}}]
    found = families({"cases": cases})
    names = [name.removesuffix(" branch") for name in found if name.endswith(" branch")]
    assert names == ["local", "open_pose_2", "depth"]
    assert found["depth branch"] == ("denoise.depth_branch", "denoise.controlnet_depth")
    colours = colours_of(found)
    assert len(set(colours.values())) == len(found) and colours["local branch"] == "C2" and colours["UNet"] == "C4"


def test_a_plot(
    engine_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    line = ["--engine", str(engine_dir), "--baseline", "none", "--steps", "2", "--runs", "1", "--warmup", "0"]
    assert main([*line, "--plot", str(tmp_path / "plot.png")]) == 0
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert main([*line, "--plot", str(tmp_path / "plot.docx")]) == 2
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main([*line, "--plot", str(tmp_path / "plot.png")]) == 2
    assert "which is not installed. pip install 'realisid_trt[dev]'" in capsys.readouterr().err


def test_the_unit_is_the_machine_s(measured: dict[str, Any]) -> None:
    """GFLOP/s on a CPU, TFLOP/s on a GPU; the GPU's name is the first line."""
    speed = measured["cases"][0]["contenders"]["engine"]["gflop_per_s"]
    [shown] = [line for line in table(measured).splitlines() if line.startswith("GFLOP/s")][:1]
    assert shown.split()[1] == f"{speed:.3g}"
    gpu = measured | {
        "hardware": measured["hardware"] | {"gpu": "some GPU"},
        "engine": measured["engine"] | {"backend": "onnxruntime on cuda:0"},
    }
    [shown, *_] = [line for line in table(gpu).splitlines() if line.startswith("TFLOP/s")]
    assert shown.split()[1] == f"{speed / 1e3:.3g}" and table(gpu).startswith("some GPU\n")


def test_every_engine_beside_every_baseline() -> None:
    latents = np.zeros((1, 4, 2, 2), np.float32)

    def runs(*ms: float) -> list[Run]:
        return [Run(one, {"denoise": one / 2}, [one], {"unet": 1}, [{"unet": 1}], latents, {}) for one in ms]

    taken = {"engine:a": runs(10, 10), "engine:b": runs(20, 20), "naive": runs(40, 60)}
    per_row = dict.fromkeys(("without_id", "with_id"), {"unet": 10**12})
    case = summarise(1, taken, {("engine:a", "naive"): 1e-3, ("engine:b", "naive"): 2e-3}, 0, per_row)
    assert {key: ratio["total"]["median"] for key, ratio in case["ratios"].items()} == {
        "naive / engine:a": 5.0,
        "naive / engine:b": 2.5,
    }
    assert all((r["engine"], r["baseline"]) == tuple(key.split(" / ")[::-1]) for key, r in case["ratios"].items())


def test_operations_before_and_after_the_switch() -> None:
    """Three steps, the first without the ID: its rows have fewer tokens. What runs once counts once."""
    latents, rows = np.zeros((1, 4, 2, 2), np.float32), {"unet": 6, "vae": 1, "guidance": 3}
    run = Run(40, {"denoise": 30, "denoise.unet": 20, "vae": 4}, [10] * 3, rows, [{"unet": 2}] * 3, latents, {})
    per_row = {"without_id": {"unet": 10**9, "vae": 10**8}, "with_id": {"unet": 3 * 10**9, "vae": 10**8}}
    found = summarise(1, {"naive": [run]}, {}, 1, per_row)["contenders"]["naive"]
    assert found["tflop"] == pytest.approx((2 * 1 + 4 * 3 + 0.1) / 1e3)
    assert found["step_tflop"] == pytest.approx({"without_id": 2e-3, "with_id": 6e-3})
    assert found["stage_gflop_per_s"] == pytest.approx({"denoise.unet": 14 / 20e-3, "vae": 0.1 / 4e-3})
    alone = summarise(0, {"naive": [run]}, {}, 1, per_row)["contenders"]["naive"]
    assert alone["tflop"] == pytest.approx((6 + 0.1) / 1e3) and alone["step_tflop"]["with_id"] is None
    with pytest.raises(KeyError, match="refiner"):
        summarise(1, {"naive": [dataclasses.replace(run, rows={**rows, "refiner": 1})]}, {}, 1, per_row)
