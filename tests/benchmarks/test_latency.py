"""The latency command: what it prints is what was done, and what cannot be meant is refused with a sentence."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import measure
from benchmarks.contenders import check_same_arithmetic, check_same_picture, open_original
from benchmarks.flops import count_networks, flops_per_row, total_flops
from benchmarks.latency import main
from benchmarks.measure import Run, differences, speed_ratio, spread, timed, turns
from benchmarks.options import BASELINES
from benchmarks.report import FAMILIES, table
from export.checkpoint import Checkpoint
from export.checkpoint.classes import meta_module
from export.miniature import make_checkpoint
from export.origins import recall, remember
from realisid_trt import Engine
from realisid_trt.errors import CheckpointError, RequestError
from realisid_trt.manifest import Manifest

ROOT = Path(__file__).resolve().parents[2]
STEPS = 2  # the first without the ID: α is 0.7


def arguments(engine_dir: Path, checkpoint_dir: Path, *more: str) -> list[str]:
    folders = ["--engine", str(engine_dir), "--checkpoint", str(checkpoint_dir)]
    return [*folders, "--steps", str(STEPS), "--runs", "1", "--warmup", "0", "--threads", "1", *more]


@pytest.fixture(scope="module")
def measured(engine_dir: Path, checkpoint_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What --out stores: two cases against every baseline, two rounds."""
    out = tmp_path_factory.mktemp("latency") / "results.json"
    line = arguments(engine_dir, checkpoint_dir, "--baseline", *BASELINES, "--runs", "2", "--out", str(out))
    assert main(line) == 0
    result: dict[str, Any] = json.loads(out.read_text())
    assert result["command"].startswith("python -m benchmarks.latency --engine ")
    return result


def test_the_promised_keys(measured: dict[str, Any]) -> None:
    assert set(measured) == {
        "schema", "date", "commit", "hardware", "versions", "command", "engine", "settings", "cases", "photo",
    }  # fmt: skip
    assert set(measured["engine"]) == {"name", "seal", "backend", "precision"}
    assert re.fullmatch("[0-9a-f]{64}", measured["engine"]["seal"])
    assert (
        measured["hardware"]["threads"] == 1 and measured["hardware"]["ram_bytes"] > 0 and measured["hardware"]["cpu"]
    )
    assert {"python", "torch", "realisid_trt"} <= set(measured["versions"])
    assert measured["settings"]["steps_without_id"] == 1 and measured["settings"]["memory_format"] != "auto"
    assert [case["persons"] for case in measured["cases"]] == [1, 2]
    for case in measured["cases"]:
        assert list(case["contenders"]) == ["engine", "naive", "naive-shared", "naive-no-delay"]
        for contender in case["contenders"].values():
            assert set(contender) == {
                "total_ms", "stages_ms", "step_ms", "step_ms_runs", "rows", "step_rows", "tflop", "step_tflop",
                "cores_busy_elsewhere", "cores_stolen", "gflop_per_s", "stage_gflop_per_s",
            }  # fmt: skip
            assert [len(run) for run in contender["step_ms_runs"]] == [STEPS, STEPS]
            total = contender["total_ms"]
            assert 0 < total["min"] <= total["p50"] <= total["p95"] <= total["max"]
            stages = [ms["min"] for stage, ms in contender["stages_ms"].items() if "." not in stage]
            assert sum(stages) <= total["max"]
        for ratio in case["ratios"].values():
            assert set(ratio) == {"total", "denoise", "flop", "latents_relative_rms"}
            assert ratio["total"]["min"] <= ratio["total"]["median"] <= ratio["total"]["max"]
            assert len(ratio["total"]["pairs"]) == 2
            assert ratio["latents_relative_rms"] < 1e-4


def test_every_case_reads_its_prompt_anew(measured: dict[str, Any]) -> None:
    """The engine remembers prompts, the baselines do not: a second case must not find the first one's."""
    for case in measured["cases"]:
        for contender in case["contenders"].values():
            assert contender["rows"]["text_encoder"] == 1


def test_the_plot_shows_every_stage_once(measured: dict[str, Any]) -> None:
    families = [stage for stages in FAMILIES.values() for stage in stages]
    for case in measured["cases"]:
        for contender in case["contenders"].values():
            stages = list(contender["stages_ms"])
            leaves = [stage for stage in stages if not any(other.startswith(f"{stage}.") for other in stages)]
            assert "denoise" not in leaves
            assert [families.count(stage) for stage in leaves] == [1] * len(leaves), leaves


def test_the_table(measured: dict[str, Any]) -> None:
    shown = table(measured)
    assert "local 2, global 2, encoder 2, decoder 3" in shown and "local 3, global 3, unet 3" in shown
    total = measured["cases"][0]["contenders"]["engine"]["total_ms"]
    assert f"{total['p50']:.1f} ({total['min']:.1f}–{total['max']:.1f})" in shown  # two values have no percentiles


def test_operations_are_the_design_s_arithmetic(measured: dict[str, Any], engine_dir: Path) -> None:
    per_row = {name: network["flops_per_row"] for name, network in Manifest.read(engine_dir).values["networks"].items()}
    encoder, decoder = per_row["unet_encoder"], per_row["unet_decoder"]
    branches = per_row["local_branch"] + per_row["global_branch"]
    unet = encoder + decoder + per_row["unet_time"]
    both = branches + sum(
        per_row[f"{branch}_{part}"] for branch in ("local", "global") for part in ("condition", "time")
    )
    once = sum(per_row[name] for name in measured["cases"][0]["contenders"]["naive"]["rows"] if "text_encoder" in name)
    once += per_row["vae_decoder"]
    times = 2 * STEPS * per_row["unet_time"] + STEPS * (per_row["local_time"] + per_row["global_time"])
    for case in measured["cases"]:
        n, contenders = case["persons"], case["contenders"]
        conditions = n * (per_row["local_condition"] + per_row["global_condition"])
        ours = {
            "without_id": 2 * encoder + 2 * decoder + n * branches,
            "with_id": 2 * encoder + 3 * decoder + 2 * n * branches,
        }
        two, three = (rows * (unet + n * both) for rows in (2, 3))
        for name, without_id, with_id, before in (
            ("engine", ours["without_id"], ours["with_id"], times + conditions),
            ("naive", two, three, 0),
            ("naive-shared", two - n * both, three - n * both, 0),
            ("naive-no-delay", three, three, 0),
        ):
            found = {phase: tflop * 1e12 for phase, tflop in contenders[name]["step_tflop"].items()}
            assert found == pytest.approx({"without_id": without_id, "with_id": with_id}, rel=1e-12)
            assert contenders[name]["tflop"] * 1e12 == pytest.approx(once + before + without_id + with_id, rel=1e-12)
        tflop = {name: contender["tflop"] for name, contender in contenders.items()}
        assert tflop["engine"] < tflop["naive-shared"] < tflop["naive"] < tflop["naive-no-delay"]
        for name, ratio in case["ratios"].items():
            assert ratio["flop"] == pytest.approx(tflop[name] / tflop["engine"])


def test_a_network_that_nobody_counted_is_no_free_one() -> None:
    assert total_flops({"unet": 3, "crop": 5, "guide_step": 1}, {"unet": 7}) == 21
    with pytest.raises(KeyError, match="refiner"):
        total_flops({"unet": 3, "refiner": 1}, {"unet": 7})


def test_a_naive_row_is_a_forward_of_diffusers(engine_dir: Path, checkpoint_dir: Path) -> None:
    checkpoint = Checkpoint.open(checkpoint_dir)
    per_row = flops_per_row(Manifest.read(engine_dir), 128, 128, None)
    side = checkpoint.sample_size
    with torch.device("meta"), torch.no_grad():
        latents = torch.zeros(3, checkpoint.latent_channels, side, side)
        added = {"text_embeds": torch.zeros(3, checkpoint.pooled_dim), "time_ids": torch.zeros(3, 6)}
        text = torch.zeros(3, 77, checkpoint.cross_attention_dim)
        tokens = torch.zeros(3, checkpoint.num_id_tokens, checkpoint.cross_attention_dim)
        calls = {
            "unet": {"encoder_hidden_states": text},
            "controlnet_local": {"encoder_hidden_states": tokens, "controlnet_cond": torch.zeros(3, 3, 128, 128)},
            "controlnet_global": {"encoder_hidden_states": tokens, "controlnet_cond": torch.zeros(3, 1, 128, 128)},
        }
        for name, inputs in calls.items():
            module = meta_module(checkpoint.components[name]).eval()
            with FlopCounterMode(display=False) as counter:
                module(latents, torch.tensor(1), added_cond_kwargs=added, **inputs)
            # The module embeds its one timestep once for all rows; a row's share of that is counted per row.
            assert counter.get_total_flops() == pytest.approx(3 * per_row[name], rel=1e-3)


def test_another_picture_size_is_counted_anew(engine_dir: Path, checkpoint_dir: Path) -> None:
    manifest, checkpoint = Manifest.read(engine_dir), Checkpoint.open(checkpoint_dir)
    listed = {name: network["flops_per_row"] for name, network in manifest.values["networks"].items()}
    counted = count_networks(checkpoint, 128, 128)
    assert set(counted) == {"unet_encoder", "unet_decoder", "global_condition", "global_branch", "vae_decoder"}
    assert counted == {name: listed[name] for name in counted}
    larger = flops_per_row(manifest, 128, 192, checkpoint)
    assert larger["local_branch"] == listed["local_branch"]  # its canvas does not grow with the picture
    assert larger["global_condition"] == 1.5 * listed["global_condition"]  # convolutions only
    assert larger["unet_encoder"] > 1.5 * listed["unet_encoder"]  # attention grows faster
    with pytest.raises(RequestError, match=r"a 192×128 px picture .* Give --checkpoint too"):
        flops_per_row(manifest, 128, 192, None)


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
        (["--threads", "1", "--device", "cpu:2"], "--threads 1 is for --device cpu; cpu:2 says for itself."),
        (["--baseline", "none", "naive"], "--baseline none naive: expected some of naive, naive-shared"),
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


def test_different_pictures_are_not_compared() -> None:
    latents = np.random.default_rng(0).standard_normal((1, 4, 8, 8)).astype(np.float32)
    one, rounded, other = (
        Run(1, {}, [], {}, [], final, {}) for final in (latents, latents * (1 + 1e-6), latents + 0.01)
    )
    assert check_same_picture(one, rounded) == pytest.approx(1e-6, rel=0.1)
    with pytest.raises(CheckpointError, match="make different pictures: their final latents differ by"):
        check_same_picture(one, other)


@pytest.mark.parametrize(("device", "precision"), [("cuda:0", "float32"), ("cpu:2", "float16"), ("cuda", "bfloat16")])
def test_other_arithmetic_is_not_compared(device: str, precision: str) -> None:
    with pytest.raises(RequestError, match=f"this engine {precision} on {device}: .* --baseline none"):
        check_same_arithmetic(device, precision)


def test_a_baseline_beside_a_half_precision_engine_is_bad_usage(
    engine: Engine, engine_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine.backend, "precision", "float16")  # what such an engine says of itself on a GPU
    monkeypatch.setattr(Engine, "load", lambda *_, **__: engine)
    assert main(["--engine", str(engine_dir)]) == 2
    assert "--baseline none" in capsys.readouterr().err


def test_contenders_take_turns() -> None:
    """Each is first, second and third equally often."""
    orders = [turns(("a", "b", "c"), number) for number in range(3)]
    assert orders == [["a", "b", "c"], ["b", "c", "a"], ["c", "a", "b"]]
    assert turns(("alone",), 7) == ["alone"]


def test_cores_that_were_lacking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a second, another process took half a core and the host a quarter; elsewhere than on Linux nobody knows."""
    stat, tick = tmp_path / "stat", measure.os.sysconf("SC_CLK_TCK")
    monkeypatch.setattr(measure, "STAT", stat)
    monkeypatch.setattr(measure.os, "times", lambda: measure.os.times_result((0, 0, 0, 0, 0)))
    clock = iter([10.0, 11.0])
    monkeypatch.setattr(measure.time, "perf_counter", lambda: next(clock))

    def write(user: float, steal: float) -> None:
        stat.write_text(f"cpu  {user * tick:.0f} 0 0 900 9 0 0 {steal * tick:.0f} 0 0\ncpu0 1 2 3\n")

    write(1, 2)
    assert timed(lambda: write(1.5, 2.25)) == (None, 1000.0, {"cores_busy_elsewhere": 0.5, "cores_stolen": 0.25})
    stat.unlink()
    clock = iter([0.0, 1.0])
    assert timed(lambda: "made") == ("made", 1000.0, {})


def test_the_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if (ROOT / ".git").exists():
        assert re.fullmatch(r"[\w.-]+", measure.commit() or "")
    monkeypatch.setattr(measure, "__file__", str(tmp_path / "measure.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert measure.commit() is None


def test_a_ratio_is_taken_within_each_round() -> None:
    ratio = speed_ratio([200.0, 900.0, 260.0], [100.0, 300.0, 200.0])
    assert ratio == {"median": 2.0, "min": 1.3, "max": 3.0, "pairs": [2.0, 3.0, 1.3]}


def test_spread_and_differences() -> None:
    assert spread([float(n) for n in range(101)]) == {
        "p50": 50.0, "p95": 95.0, "min": 0.0, "max": 100.0, "count": 101,
    }  # fmt: skip
    counts = [{"a": 2, "text": 1}, {"a": 4, "b": 3, "text": 1}]
    assert differences(counts, ("a", "b")) == [{"a": 2}, {"a": 2, "b": 3}]
