"""Claims about `python -m export.miniature`: every flag counts, statuses, JSON, help."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from export.checkpoint import Checkpoint
from export.miniature.__main__ import main

ROOT = Path(__file__).resolve().parents[3]


def test_every_flag_ends_up_in_a_config(tmp_path: Path) -> None:
    flags = (
        "--seed 3 --vae-factor 8 --prediction v_prediction --projection resampler --id-tokens 5 "
        "--branch-pooled-text per_row --null-id file --subject-conditioning-ratio none --relocate-mode area "
        "--overlap priority --box-snap 32 --face-margin 1.5 --guidance-scale 4 --id-guidance-scale 2.5 "
        "--num-inference-steps 12 --no-force-zeros-for-empty-prompt"
    )
    assert main(["--out", str(tmp_path / "made"), *flags.split()]) == 0
    checkpoint = Checkpoint.open(tmp_path / "made")
    assert json.loads((tmp_path / "made" / "realisid_config.json").read_text()) == {
        "branch_pooled_text": "per_row", "null_id": "file", "subject_conditioning_ratio": None,
        "relocate_mode": "area", "overlap": "priority", "box_snap": 32, "face_margin": 1.5,
        "pose_style": "realisid-v1", "guidance_scale": 4.0, "id_guidance_scale": 2.5, "num_inference_steps": 12,
        "force_zeros_for_empty_prompt": False,
    }  # fmt: skip
    assert (checkpoint.vae_scale_factor, checkpoint.num_id_tokens) == (8, 5)
    assert checkpoint.scheduler_config["prediction_type"] == "v_prediction"
    assert checkpoint.components["id_projection"].config["class"] == "resampler"
    assert json.loads((tmp_path / "made" / "model_index.json").read_text())["_recipe"]["seed"] == 3
    file = tmp_path / "made" / "unet" / "diffusion_pytorch_model.safetensors"
    assert file.stat().st_mode & 0o044 == (tmp_path / "made").stat().st_mode & 0o044  # as readable as the folder


def test_the_last_line_of_stdout_is_json_and_prose_goes_elsewhere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "made"
    assert main(["--out", str(out), "--json"]) == 0
    said = capsys.readouterr()
    (line,) = said.out.splitlines()
    values = json.loads(line)
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    assert (values["path"], values["bytes"]) == (str(out), size)
    assert f"{out}: {size / 1e6:.1f} MB in " in said.err
    assert main(["--out", str(out), "--force"]) == 0
    assert capsys.readouterr().out.startswith(f"{out}: ")


@pytest.mark.parametrize("json_flag", [[], ["--json"]])
def test_statuses_and_errors_are_those_of_every_command(
    json_flag: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("mine")
    cases = (
        (["--out", str(tmp_path / "file")], 2, "file exists and is not a checkpoint made by export.miniature"),
        (["--out", str(tmp_path / "file" / "made")], 1, "file cannot be written (File exists). Choose another --out"),
        (["--out", str(tmp_path / ("long" * 80))], 1, "could not be written"),
        (["--out", str(tmp_path / "made"), "--guidance-scale", "inf"], 2, "options: guidance_scale is inf"),
        (
            ["--out", str(tmp_path / "made"), "--subject-conditioning-ratio", "some"],
            2,
            "--subject-conditioning-ratio is 'some', expected a number from 0 to 1, or none",
        ),
    )
    for flags, status, sentence in cases:
        assert main([*flags, *json_flag]) == status
        said = capsys.readouterr()
        assert said.out == "" and said.err.startswith("error: ") and sentence in said.err
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_flags_that_do_not_exist_and_help(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--out", str(tmp_path), "--prediction", "sample"])
    assert caught.value.code == 2
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    assert "python -m export.miniature --out" in capsys.readouterr().out.rstrip().splitlines()[-1]


def test_the_package_is_the_command(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "export.miniature", "--out", "made", "--seed", "-1"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: seed is -1, expected a whole number of at least 0.\n"
