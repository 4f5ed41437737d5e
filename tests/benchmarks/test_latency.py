"""The latency command prints what it measured."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.latency import main
from benchmarks.options import BASELINES
from tests.benchmarks.support import STEPS

ROOT = Path(__file__).resolve().parents[2]


def test_the_promised_keys(measured: dict[str, Any]) -> None:
    assert set(measured) == {
        "schema", "date", "commit", "hardware", "versions", "command", "engine", "engines", "left_out", "settings",
        "cases", "photo",
    }  # fmt: skip
    assert set(measured["engine"]) == {"name", "seal", "backend", "precision"}
    assert re.fullmatch("[0-9a-f]{64}", measured["engine"]["seal"])
    assert (
        measured["hardware"]["threads"] == 1 and measured["hardware"]["ram_bytes"] > 0 and measured["hardware"]["cpu"]
    )
    assert {"python", "torch", "realisid_trt"} <= set(measured["versions"])
    settings = measured["settings"]
    assert settings["steps_without_id"] == 1 and settings["memory_format"] != "auto"
    assert settings["baseline"] == "NaivePipeline"
    assert [case["persons"] for case in measured["cases"]] == [1, 2]
    for case in measured["cases"]:
        assert list(case["contenders"]) == ["engine", *BASELINES]
        for contender in case["contenders"].values():
            assert set(contender) == {
                "total_ms", "stages_ms", "step_ms", "step_ms_runs", "rows", "step_rows", "tflop", "step_tflop",
                "cores_busy_elsewhere", "cores_stolen", "gflop_per_s", "stage_gflop_per_s",
                "resting_memory_bytes", "peak_memory_bytes",
            }  # fmt: skip
            assert [len(run) for run in contender["step_ms_runs"]] == [STEPS, STEPS]
            total = contender["total_ms"]
            assert 0 < total["min"] <= total["p50"] <= total["p95"] <= total["max"]
            stages = [ms["min"] for stage, ms in contender["stages_ms"].items() if "." not in stage]
            assert sum(stages) <= total["max"]
        for baseline, ratio in case["ratios"].items():
            assert (ratio["engine"], ratio["baseline"]) == ("engine", baseline)
            assert set(ratio) == {"engine", "baseline", "total", "denoise", "flop", "latents_relative_rms"}
            assert ratio["total"]["min"] <= ratio["total"]["median"] <= ratio["total"]["max"]
            assert len(ratio["total"]["pairs"]) == 2
            assert ratio["latents_relative_rms"] < 1e-4


def test_every_case_reads_its_prompt_anew(measured: dict[str, Any]) -> None:
    """The engine remembers prompts, the baselines do not: a second case must not use the first one's prompt."""
    for case in measured["cases"]:
        for contender in case["contenders"].values():
            assert contender["rows"]["text_encoder"] == 1


def test_the_engine_alone_and_a_photo(engine_dir: Path, photos: Any, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["--engine", str(engine_dir), "--steps", "2", "--runs", "1", "--warmup", "0", "--threads", "1"]
    line += ["--baseline", "none", "--persons", "0", "--width", "192", "--photo", str(photos.astronaut), "--json"]
    assert main(line) == 0
    shown, said = capsys.readouterr()
    result = json.loads(shown.splitlines()[-1])
    assert list(result["photo"]) == ["decode", "detect+landmarks", "crop", "id_encoder", "pose_image"]
    assert all(ms["p50"] > 0 for ms in result["photo"].values())
    [case] = result["cases"]
    engine = case["contenders"]["engine"]
    assert case["ratios"] == {} and engine["tflop"] is None and engine["step_ms"]["with_id"] is None
    assert engine["step_rows"] == {"without_id": {"unet_encoder": 2, "unet_decoder": 2}, "with_id": None}
    assert "No operations are counted" in said
    assert "0 persons" in said and "detect+landmarks" in said


def test_an_engine_by_itself_is_measured_without_torch(engine_dir: Path) -> None:
    program = (
        "import sys; from benchmarks.latency import main; status = main(sys.argv[1:]); "
        "sys.exit(status or 'torch' in sys.modules)"
    )
    line = ["--engine", str(engine_dir), "--baseline", "none", "--steps", "1", "--runs", "1", "--warmup", "0"]
    subprocess.run([sys.executable, "-c", program, *line], check=True, cwd=ROOT, capture_output=True)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--persons", "9"], "--persons 9: an engine takes 0 to 8."),
        (["--runs", "0"], "--runs is 0, expected at least 1."),
        (["--steps", "0"], "--steps is 0, expected at least 1."),
        (["--threads", "0"], "--threads is 0, expected at least 1."),
        (["--threads", "1", "--device", "cpu:2"], "--threads 1 is for --device cpu. Leave it out for cpu:2."),
        (["--baseline", "none", "naive"], "--baseline none naive: expected some of naive, naive-shared"),
        (["--backend", "auto", "tensorrt"], "--backend auto tensorrt: expected different names, or auto or all alone."),
        (["--baseline", "naive-compiled"], "--warmup is 0, expected at least 1: else naive-compiled is compiled in a"),
        (["--height", "100"], "--height is 100, expected a multiple of 16 px."),
        (["--device", "abacus"], "device 'abacus' is unknown"),
        (["--photo", "nobody.jpg"], "--photo nobody.jpg: no such file."),
        (["--out", "nowhere/results.json"], "--out nowhere/results.json: expected a file in a folder that exists."),
        (["--steps", "1001"], "num_inference_steps is 1001, expected 1 to 1000"),
    ],
)
def test_bad_flags(
    engine_dir: Path, checkpoint_dir: Path, capsys: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    line = ["--engine", str(engine_dir), "--checkpoint", str(checkpoint_dir), "--runs", "1", "--warmup", "0", *more]
    assert main(line) == 2
    shown, said = capsys.readouterr()
    assert shown == "" and message in said and "Traceback" not in said


@pytest.mark.parametrize("line", [["--help"], ["--engine", "x", "--baseline", "fast"], []])
def test_usage(line: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(line)
    assert stopped.value.code == (0 if line == ["--help"] else 2)
    if line == ["--help"]:
        assert capsys.readouterr().out.rstrip().splitlines()[-1].startswith("  python -m benchmarks.latency --engine")


def test_no_engine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--engine", str(tmp_path / "none"), "--baseline", "none"]) == 1
    assert "no such engine directory" in capsys.readouterr().err
