"""python -m realisid_trt: the files it writes, the lines it prints, its exit status."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from realisid_trt.__main__ import main
from realisid_trt.backends.onnxruntime import can_use_gpu
from realisid_trt.commands.arguments import parse_person
from realisid_trt.commands.command_line import Outcome, run
from realisid_trt.errors import RealisIDWarning, RequestError
from realisid_trt.manifest import MANIFEST, seal
from realisid_trt.persons.identity import Identity
from tests.conftest import ROOT


def call(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    try:
        status = main([str(argument) for argument in arguments])
    except SystemExit as exit_:  # argparse
        status = int(exit_.code or 0)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_generate_two_persons(capsys: Any, engine_dir: Path, photos: Any, tmp_path: Path) -> None:
    out, boxes = tmp_path / "new folder" / "out.png", tmp_path / "boxes.png"
    status, printed, err = call(
        capsys, "generate", "--engine", engine_dir, "--prompt", "two friends hiking", "--seed", 7, "--steps", 2,
        "--person", f"{photos.astronaut}@4,16,60,72",
        "--person", f"{photos.hopper}@66,20,124,78,pose={photos.astronaut}",
        "--out", out, "--draw-boxes", boxes, "--json",
    )  # fmt: skip
    assert status == 0
    result = json.loads(printed.splitlines()[-1])
    assert result["seed"] == 7 and [p["box"] for p in result["persons"]] == [[4, 16, 60, 72], [68, 20, 128, 80]]
    assert result["rows"]["unet_decoder"] and result["timings_ms"]["denoise"] > 0
    assert "denoising" in err and "unet_decoder" in err  # the bar, and the table, which --json moves to stderr
    picture, drawn = Image.open(out), Image.open(boxes)
    assert picture.size == drawn.size == (128, 128)
    assert drawn.getpixel((68, 40)) == (70, 160, 255) and picture.getpixel((68, 40)) != (70, 160, 255)


def test_generate_several_pictures(capsys: Any, engine_dir: Path, tmp_path: Path) -> None:
    status, printed, _ = call(
        capsys, "generate", "--engine", engine_dir, "--prompt", "a beach", "--num-images", 2, "--steps", 1,
        "--subject-conditioning-ratio", "none", "--out", tmp_path / "beach.jpg",
    )  # fmt: skip
    assert status == 0 and sorted(p.name for p in tmp_path.iterdir()) == ["beach-0.jpg", "beach-1.jpg"]
    assert "beach-1.jpg (seed " in printed


def test_embed_then_generate(capsys: Any, engine_dir: Path, photos: Any, tmp_path: Path) -> None:
    stored = tmp_path / "hopper.safetensors"
    status, printed, _ = call(capsys, "embed", "--engine", engine_dir, photos.hopper, "--out", stored)
    assert status == 0 and "65 ID tokens" in printed
    assert Identity.load(stored).id_tokens.shape == (65, 64)
    arguments = ["generate", "--engine", engine_dir, "--prompt", "x", "--steps", 1, "--seed", 1, "--out"]
    assert call(capsys, *arguments, tmp_path / "a.png", "--person", f"{stored}@10,10,90,90")[0] == 0
    assert call(capsys, *arguments, tmp_path / "b.png", "--person", f"{photos.hopper}@10,10,90,90")[0] == 0
    assert Image.open(tmp_path / "a.png").tobytes() == Image.open(tmp_path / "b.png").tobytes()


def test_inspect_an_engine(capsys: Any, engine_dir: Path) -> None:
    status, printed, _ = call(capsys, "inspect", engine_dir, "--json")
    values = json.loads(printed.splitlines()[-1])
    assert status == 0 and set(values["networks"]) >= {"unet_encoder", "unet_decoder", "local_branch", "vae_decoder"}
    status, printed, _ = call(capsys, "inspect", "--engine", engine_dir)
    assert status == 0
    for word in (
        "every hash verified",
        "unet_decoder",
        "float32",
        "parity",
        "GFLOP/row",
        "rows in 1..96",
        "overlap=sum",
    ):
        assert word in printed


def test_inspect_names_a_network_that_needed_more_than_one_draw(capsys: Any, engine_copy: Path) -> None:
    """`inspect` shows it if a network passed the parity gate only after several draws."""
    manifest = json.loads((engine_copy / MANIFEST).read_text())
    manifest["networks"]["unet_decoder"]["builds"]["onnxruntime-opset20-fp32"]["parity"]["draws"] = 9
    manifest["seal"] = seal(manifest)
    (engine_copy / MANIFEST).write_text(json.dumps(manifest))
    status, printed, _ = call(capsys, "inspect", "--engine", engine_copy)
    told = [line for line in printed.splitlines() if "draws" in line]
    assert status == 0 and len(told) == 1
    assert told[0].startswith("parity: unet_decoder was compared with the worst of 9 draws")


def test_inspect_a_photo(capsys: Any, engine_dir: Path, photos: Any, tmp_path: Path) -> None:
    out = tmp_path / "found.png"
    status, printed, _ = call(capsys, "inspect", "--engine", engine_dir, photos.hopper, "--out", out, "--json")
    result = json.loads(printed.splitlines()[-1])
    assert status == 0 and len(result["faces"]) == 1 and result["mask_source"] == "hull+person"
    sheet = Image.open(out)
    assert sheet.height == 512 and sheet.width > 3 * 400  # photo, crop, drawing


def test_inspect_a_group_shows_the_numbers_to_choose_from(
    capsys: Any, engine_dir: Path, photos: Any, tmp_path: Path
) -> None:
    one = Image.open(photos.hopper).convert("RGB")
    group = Image.new("RGB", (one.width * 2, one.height))
    group.paste(one, (0, 0))
    group.paste(one, (one.width, 0))
    group.save(tmp_path / "group.png")
    status, printed, _ = call(capsys, "inspect", "--engine", engine_dir, tmp_path / "group.png", "--json")
    result = json.loads(printed.splitlines()[-1])
    assert status == 0 and len(result["faces"]) == 2 and "face=0…1" in result["why"]
    assert (tmp_path / "group-found.png").is_file()
    status, printed, _ = call(capsys, "inspect", "--engine", engine_dir, tmp_path / "group.png", "--face", 1, "--json")
    assert json.loads(printed.splitlines()[-1])["chosen"]["box"][0] > one.width


def test_doctor(capsys: Any, engine_dir: Path, tmp_path: Path) -> None:
    status, printed, _ = call(capsys, "doctor", "--engine", engine_dir)
    assert status == 0 and "This machine can make pictures." in printed and "backend onnxruntime" in printed
    status, printed, _ = call(capsys, "doctor", "--engine", tmp_path / "nowhere", "--json")
    result = json.loads(printed.splitlines()[-1])
    assert status == 1 and not result["healthy"]
    assert any(f["state"] == "missing" and "python -m export.build" in f["detail"] for f in result["findings"])


def test_a_doctor_misses_no_backend_that_nobody_needs(
    capsys: Any, engine_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the engine runs on one backend, no other is missing. If it runs on none, onnxruntime is missing."""
    monkeypatch.setattr("realisid_trt.commands.doctor.installed", lambda name: False)
    assert call(capsys, "doctor", "--engine", engine_dir)[0] == 0
    status, printed, _ = call(capsys, "doctor", "--engine", engine_dir / "nowhere")
    assert status == 1 and "MISSING   backend onnxruntime" in printed


def test_a_gpu_that_cannot_be_asked_for_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime is built for a GPU, but cuda-python is not installed."""
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CUDAExecutionProvider"])
    for module in [name for name in sys.modules if name.split(".")[0] == "cuda"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "cuda", None)
    assert not can_use_gpu()


def test_a_photo_may_have_any_name(tmp_path: Path) -> None:
    (tmp_path / "me@2x.jpg").touch()
    assert parse_person(str(tmp_path / "me@2x.jpg")).photo == str(tmp_path / "me@2x.jpg")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.jpg", ("a.jpg", None, None, None)),
        ("a.jpg@1,2,3,4", ("a.jpg", (1, 2, 3, 4), None, None)),
        ("me@home.jpg@1,2,3.5,4,pose=b c.jpg,face=1", ("me@home.jpg", (1, 2, 3.5, 4), "b c.jpg", 1)),
        ("me@home.jpg", ("me@home.jpg", None, None, None)),
        ("me@2x.jpg@1,2,3,4", ("me@2x.jpg", (1, 2, 3, 4), None, None)),
        ("@2024/me.jpg@1,2,3,4,face=1", ("@2024/me.jpg", (1, 2, 3, 4), None, 1)),
        ("a.jpg@-1,2,3,4,pose=b@c.jpg", ("a.jpg", (-1, 2, 3, 4), "b@c.jpg", None)),
        ("a.jpg@pose=b.jpg", ("a.jpg", None, "b.jpg", None)),
    ],
)
def test_persons_on_the_command_line(text: str, expected: tuple[Any, ...]) -> None:
    person = parse_person(text)
    assert (person.photo, person.box, person.pose, person.face) == expected


def test_the_anchor_of_a_person_on_the_command_line() -> None:
    for text, at, box in (
        ("a.jpg@at=312:240.5", (312, 240.5), None),
        ("me@home.jpg@1,2,3,4,at=-3:2e2,face=1", (-3, 200), (1, 2, 3, 4)),
    ):
        person = parse_person(text)
        assert (person.at, person.box) == (at, box) and str(person.photo).endswith(".jpg")
    with pytest.raises(RequestError, match="at=1 is not x:y: two numbers in pixels"):
        parse_person("a.jpg@at=1,2")
    with pytest.raises(RequestError, match="at=x:y is not x:y: two numbers in pixels"):
        parse_person("a.jpg@at=x:y")


@pytest.mark.parametrize(
    "text",
    [
        "a.jpg@1,2,3",
        "a.jpg@1,2,x,4",
        "a.jpg@1,2,3,4,5",
        "a.jpg@1,2,3,4,mood=sad",
        "a.jpg@face=left",
        "a.jpg@face=²",
        "a.jpg@pose=",
        "a.jpg@at=",
        "a.jpg@at=3",
        "a.jpg@at=1:2:3",
        "a.jpg@at=1:b",
    ],
)
def test_persons_that_are_not_understood(text: str) -> None:
    with pytest.raises(RequestError, match="--person a.jpg@"):
        parse_person(text)


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["generate"], 2, "--prompt"),
        (["generate", "--prompt", "x", "--out", "o.png", "--engine", "nowhere"], 1, "no such engine directory"),
        (["generate", "--prompt", "x", "--out", "o.psd2"], 2, "is not a picture format. Use .png, .jpg or .webp"),
        (["generate", "--prompt", "x", "--out", "o.psd"], 2, "is not a picture format"),
        (["generate", "--prompt", "a \udcff beach", "--out", "o.png"], 2, "contains an unpaired surrogate"),
        (["generate", "--prompt", "x", "--out", "new/o.png", "--engine", "nowhere"], 1, "no such engine directory"),
        (["generate", "--prompt", "x", "--out", "o.png", "--engine", ""], 1, "holds no manifest.json"),
        (["inspect", "typo.jpg"], 1, "typo.jpg"),
        (["generate", "--prompt", "x", "--out", "noending"], 2, "no ending"),
        (["generate", "--prompt", "x", "--out", "{hopper}/o.png"], 2, "cannot be written"),
        (["generate", "--prompt", "x", "--out", "o.png", "--person", "a.jpg@1,2"], 2, "four numbers in pixels"),
        (["generate", "--prompt", "x", "--out", "o.png", "--steps", "many"], 2, "invalid int value"),
        (["generate", "--prompt", "x", "--out", "o.png", "--steps", "0"], 2, "num_inference_steps is 0"),
        (["generate", "--prompt", "x", "--out", "o.png", "--height", "99"], 2, "multiple of 16 px"),
        (["generate", "--prompt", "x", "--out", "o.png", "--subject-conditioning-ratio", "off"], 2, "or none"),
        (
            ["generate", "--prompt", "x", "--out", "o.png", "--backend", "magic"],
            1,
            "is unknown. Known: auto, tensorrt, tensorrt-rtx, onnxruntime",
        ),
        (["generate", "--prompt", "x", "--out", "o.png", "--person", "nowhere.jpg@0,0,64,64"], 1, "nowhere.jpg"),
        (["generate", "--prompt", "x", "--out", "o.png", "--person", "{hopper}@0,0,4,4"], 2, "the face would vanish"),
        (["embed", "nowhere.jpg", "--out", "a.safetensors"], 1, "nowhere.jpg"),
        (["embed", "{hopper}", "--out", "a.txt"], 2, "does not end in .safetensors"),
        (["embed", "{hopper}", "--out", "a.safetensors", "--box", "1,2"], 2, "four numbers in pixels"),
        (["embed", "{hopper}", "--out", "a.safetensors", "--face", "4"], 1, "face=4 was asked for"),
        (["inspect", "nowhere"], 1, "no such engine directory"),
        (["inspect", __file__], 1, "not a picture that can be read"),
        (["dance"], 2, "invalid choice"),
        ([], 2, "COMMAND"),
    ],
)
def test_bad_usage_ends_in_one_sentence(
    capsys: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, engine_dir: Path, photos: Any,
    arguments: list[str], status: int, message: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    given = [argument.format(hopper=photos.hopper) if argument.startswith("{") else argument for argument in arguments]
    if given and "--engine" not in given and given[0] in ("generate", "embed", "inspect"):
        given += ["--engine", str(engine_dir)]
    ended, _, err = call(capsys, *given)
    assert ended == status and message in err and "Traceback" not in err
    assert list(tmp_path.iterdir()) == []  # nothing half-written


def test_help_ends_in_examples(capsys: Any) -> None:
    for command in ("generate", "inspect", "embed", "doctor"):
        status, printed, _ = call(capsys, command, "--help")
        assert status == 0 and "examples:\n  python -m realisid_trt" in printed


def test_the_module_runs(engine_dir: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "realisid_trt", "inspect", str(engine_dir / "nowhere")], capture_output=True, text=True
    )
    assert done.returncode == 1 and done.stderr.startswith("error: ") and "Traceback" not in done.stderr


# -- its own output ends no command ------------------------------------------------------------------------------------


def started(*words: str, encoding: str | None = None, **options: Any) -> subprocess.CompletedProcess[bytes]:
    environment = {**os.environ, **({"PYTHONIOENCODING": encoding} if encoding else {})}
    return subprocess.run([sys.executable, "-m", *words], cwd=ROOT, env=environment, **options)


COMMANDS = (
    "realisid_trt", "export.build", "export.miniature", "training.train", "training.prepare", "training.start",
    "training.recipe", "training.validate", "training.evaluate", "training.paper_metrics", "training.world",
    "benchmarks.latency", "benchmarks.kernels", "benchmarks.gpu", "benchmarks.kit", "benchmarks.training",
    "benchmarks.backends", "benchmarks.machine",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("module", COMMANDS)
def test_help_in_an_encoding_that_lacks_its_characters(module: str) -> None:
    done = started(module, "--help", encoding="ascii", capture_output=True)
    assert done.returncode == 0 and done.stderr == b"" and b"usage" in done.stdout


@pytest.mark.parametrize("encoding", ["cp1252", "latin-1", "ascii"])
def test_output_that_is_not_utf_8(engine_dir: Path, tmp_path: Path, encoding: str) -> None:
    done = started("realisid_trt", "inspect", str(engine_dir), encoding=encoding, capture_output=True)
    assert done.returncode == 0 and b"Traceback" not in done.stderr and b"unet_decoder" in done.stdout
    done = started("realisid_trt", "generate", "--help", encoding=encoding, capture_output=True)
    assert done.returncode == 0 and b"--prompt" in done.stdout
    out = tmp_path / "фото.png"
    done = started(
        "realisid_trt", "generate", "--engine", str(engine_dir), "--prompt", "λ", "--steps", "1", "--out", str(out),
        encoding=encoding, capture_output=True,
    )  # fmt: skip
    assert done.returncode == 0 and out.is_file() and rb"\u0444\u043e\u0442\u043e.png" in done.stdout
    assert b"seed" in done.stdout


@pytest.mark.parametrize("words", [("inspect",), ("inspect", "--json"), ("--help",), ("doctor", "--engine")])
def test_a_closed_pipe_is_met_quietly(engine_dir: Path, words: tuple[str, ...]) -> None:
    read, write = os.pipe()
    os.close(read)
    given = [*words[:1], *([str(engine_dir)] if words[0] == "inspect" else []), *words[1:]]
    given += [str(engine_dir)] if words[0] == "doctor" else []
    done = started("realisid_trt", *given, stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert b"Traceback" not in done.stderr and b"Exception ignored" not in done.stderr and b"error:" not in done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("words", [("inspect",), ("inspect", "--json"), ("--help",)])
def test_a_full_disk_behind_stdout_is_one_line(engine_dir: Path, words: tuple[str, ...]) -> None:
    given = [*words[:1], *([str(engine_dir)] if words[0] == "inspect" else []), *words[1:]]
    with open("/dev/full", "w") as full:
        done = started("realisid_trt", *given, stdout=full, stderr=subprocess.PIPE)
    lines = done.stderr.decode().strip().splitlines()
    said = "error: the output could not be written (No space left on device)."
    assert lines[-1] == said and (lines == [said] or "--json" in words)  # which moves the lines for people to stderr
    assert done.returncode == 1


def test_a_picture_that_was_made_stays_when_nobody_listens(engine_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.png"
    with open("/dev/full", "w") as full:
        done = started(
            "realisid_trt", "generate", "--engine", str(engine_dir), "--prompt", "x", "--steps", "1", "--out", str(out),
            stdout=full, stderr=subprocess.PIPE,
        )  # fmt: skip
    assert Image.open(out).size == (128, 128) and done.returncode == 1 and b"Traceback" not in done.stderr


def test_other_people_s_warnings_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    def command() -> Outcome:
        warnings.warn("ours", RealisIDWarning, stacklevel=2)
        warnings.warn("theirs", UserWarning, stacklevel=2)
        return Outcome({})

    shown: list[str] = []
    before = warnings.showwarning
    try:
        warnings.showwarning = lambda message, *rest, **options: shown.append(str(message))  # type: ignore[assignment]
        own = warnings.showwarning
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.showwarning = own
            assert run(command, as_json=False) == 0
            assert warnings.showwarning is own  # as it was before
    finally:
        warnings.showwarning = before
    assert shown == ["theirs"] and capsys.readouterr().err == "note: ours\n"


@pytest.mark.parametrize(("closed", "status"), [(">&-", 1), ("2>&-", 0)])
def test_a_stream_that_was_never_there(engine_dir: Path, closed: str, status: int) -> None:
    line = f"{sys.executable} -m realisid_trt inspect {engine_dir} --json {closed}"
    done = subprocess.run(line, shell=True, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == status and "Traceback" not in done.stdout + done.stderr
    if closed == "2>&-":
        json.loads(done.stdout)  # one object, and no lines for people
