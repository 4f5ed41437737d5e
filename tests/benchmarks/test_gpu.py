"""benchmarks.gpu without a GPU: its parts, the parts that it leaves out, and its messages."""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

from benchmarks import gpu_parts
from benchmarks.gpu import Session
from benchmarks.gpu_parts import EXPORTER, PARTS, PYTHON, SANITIZER_FAULT, Part, placeholders, run_part
from realisid_trt.errors import BackendError
from realisid_trt.manifest import Manifest
from tests.benchmarks.support import for_onnxruntime
from tests.kernels.stand_in import build

ROOT = Path(__file__).resolve().parents[2]
LENT = ROOT / "tests" / "benchmarks" / "lent_machine"
HERE = {"torch": "2.13.0", "diffusers": "0.42.1", "tflite": "2.18.0", "onnxscript": "0.7.2"}


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a process that shall have a GPU."""
    return {**os.environ, **build(tmp_path_factory.mktemp("stand-in"))}


def run(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.gpu", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_parts_that_pass_fail_and_cannot_be(tmp_path: Path) -> None:
    good = run_part(f"""{PYTHON} -c 'print("one")'""")
    assert good["status"] == 0 and "one" in good["output"] and good["command"].startswith("python -c")
    values = run_part(f"""{PYTHON} -c 'print("bar"); print("[1, 2]")' --json""")
    assert values["result"] == [1, 2] and "bar" not in values["output"]
    bad = run_part(f"""{PYTHON} -c 'raise SystemExit("it is broken")' --json""")
    assert bad["status"] == 1 and "it is broken" in bad["output"] and bad["result"] is None
    absent = run_part("no-such-sanitizer --tool memcheck")
    assert absent["status"] is None and absent["output"] == "no-such-sanitizer is not here"


def test_a_sanitizer_that_refuses_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This is not our failure; any other error of the sanitizer is."""
    program = tmp_path / "compute-sanitizer"
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    for said, status in (("Device not supported. Please refer to …", None), ("1 error", 1)):
        program.write_text(f"#!/bin/sh\necho '========= {said}'\nexit 1\n")
        program.chmod(0o755)
        part = run_part("compute-sanitizer --tool memcheck python")
        assert part["status"] == status and said in part["output"]


def test_a_part_that_hangs_is_ended_with_all_that_it_started() -> None:
    children = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    start = time.perf_counter()
    hung = run_part(f"""{PYTHON} -c "{children}" """, seconds=1)  # returns when no process holds the output any more
    assert hung["status"] == -signal.SIGKILL and "stopped after 1 s" in hung["output"]
    assert time.perf_counter() - start < 30


@pytest.mark.parametrize("name", [name for name in PARTS if "check" not in name])
def test_every_part_is_a_command_that_exists(name: str) -> None:
    both = (placeholders("engines/x", "engines/y", brief=brief, kit=brief, versions=HERE) for brief in (False, True))
    long, brief = (PARTS[name].command.format_map(values).split() for values in both)
    module = long[long.index("-m") + 1]
    assert brief[brief.index("-m") + 1] == module
    for flag in (word for word in long + brief if word.startswith("--")):
        assert flag in shown_by_help(module)


@functools.cache
def shown_by_help(module: str) -> str:
    done = subprocess.run([sys.executable, "-m", module, "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0
    return done.stdout


def test_without_a_gpu(tmp_path: Path) -> None:
    done = run(dict(os.environ), "--out", str(tmp_path / "gpu.json"))
    assert done.returncode == 1 and "error: there is no NVIDIA driver here" in done.stderr
    assert not (tmp_path / "gpu.json").exists()


def test_one_file_is_left(stand_in: dict[str, str], tmp_path: Path) -> None:
    """On the stand-in, with the part that needs only a driver."""
    out = tmp_path / "gpu.json"
    done = run(stand_in, "--only", "kernels", "--out", str(out))
    assert done.returncode == 0, done.stderr
    left = json.loads(out.read_text())
    assert left["gpu"] == "stand-in (sm_90), driver for CUDA 13.2" and left["parts"]["kernels"]["result"]["schema"] == 1
    assert left["hardware"]["gpu"].startswith("stand-in (sm_90), ")
    assert left["versions"]["torch"] == importlib.metadata.version("torch")
    assert left["command"] == f"python -m benchmarks.gpu --only kernels --out {out}" and left["running"] is None
    assert "kernels: passed" in done.stdout


def session(tmp_path: Path, minutes: float | None, versions: dict[str, str] | None = None) -> Session:
    options = argparse.Namespace(
        json=True, kit=None, minutes=minutes, engine="engines/x", sdxl="engines/y", out=tmp_path / "gpu.json"
    )
    made = Session(options, ["--minutes", str(minutes)])
    made.values["versions"] = HERE if versions is None else versions
    return made


def test_minutes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A part that would take longer is not begun. A part that runs out of minutes is stopped, and has not failed."""
    sleep = f"{PYTHON} -c 'import time; time.sleep(60)'"
    parts = {
        "quick": Part(f"{PYTHON} -c pass", min_seconds=1),
        "greedy": Part(sleep, min_seconds=1, share_seconds=1),
        "endless": Part(sleep, min_seconds=0),
        "long": Part(sleep, min_seconds=30),
    }
    monkeypatch.setattr("benchmarks.gpu.PARTS", parts)
    made = session(tmp_path, 12 / 60)
    made.run("long")
    assert "s of --minutes are left, and it takes about 30 s or more" in made.left_out["long"]
    for name in ("quick", "greedy", "endless"):
        made.run(name)
    assert re.fullmatch(r"stopped after \d+ s, when its share of --minutes was over", made.left_out["greedy"])
    assert made.parts["quick"]["status"] == 0 and made.parts["endless"]["status"] is None
    assert "when --minutes were over" in made.left_out["endless"]
    assert [parts["greedy"].share_of(minutes) for minutes in (3, 12, 60, None)] == [1, 1, 5, float("inf")]
    without = session(tmp_path, None)
    assert without.seconds_left() == float("inf") and without.obstacle("long") is None


def test_what_a_part_needs(tmp_path: Path) -> None:
    made = session(tmp_path, None, {"torch": "2.11.0", "onnxscript": "0.7.2"})
    assert made.obstacle("build") == (
        "torch 2.11.0 is installed here, expected 2.13; diffusers is not installed here; tflite is not installed here"
    )
    assert made.obstacle("kernels") is None and "--baseline none" in made.command("latency")
    made.left_out["build"] = "…"
    assert made.obstacle("latency") == "build was left out"
    made.left_out.clear()
    made.parts["build"] = {"status": 1}
    assert made.obstacle("latency") == "build failed"
    made.left_out["checkpoint-sdxl"] = "…"
    assert made.obstacle("training-sdxl") == (
        "diffusers is not installed here; accelerate is not installed here; checkpoint-sdxl was left out"
    )
    made = session(tmp_path, None)
    assert made.obstacle("latency") is None and "--baseline naive naive-compiled" in made.command("latency")
    made.parts["backends"] = {"status": 0, "result": {"backends": {"onnxruntime": {"left_out": "…"}}}}
    assert made.obstacle("latency") == "no backend opens on this GPU: see the part backends"
    made.parts["backends"]["result"]["backends"]["tensorrt"] = {"pictures": []}
    assert made.obstacle("latency") is None


def test_what_a_sanitizer_found_is_a_failure_though_it_was_stopped() -> None:
    said = "========= COMPUTE-SANITIZER\n..\n"
    assert not SANITIZER_FAULT.search(said)
    assert SANITIZER_FAULT.search(said + "========= Invalid __global__ write of size 4 bytes\n")
    assert SANITIZER_FAULT.search(said + "========= Error: Race reported between Write access at\n")


def test_a_result_is_kept_of_a_part_that_failed() -> None:
    command = f"""{PYTHON} -c 'print("bar"); print("[1, 2]"); raise SystemExit(1)' --json"""
    part = run_part(command)
    assert part["status"] == 1 and part["result"] == [1, 2] and "bar" in part["output"]


def test_a_gpu_that_does_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hung = {"result": None, "status": -signal.SIGKILL, "output": "opening the driver\nstopped after 7 s"}
    limits = list[float]()
    monkeypatch.setattr("benchmarks.gpu.run_part", lambda command, limit, environment: (limits.append(limit), hung)[1])
    with pytest.raises(BackendError, match="did not answer within .* nvidia-smi .* opening the driver"):
        session(tmp_path, 12 / 60).describe()
    assert 0 < limits[0] <= 7  # 5 of 12 are for writing and ending


def test_the_exporter_needs_what_setup_asks_for() -> None:
    requirements = [Requirement(line) for line in importlib.metadata.requires("realisid_trt") or ()]
    asked = {r.name: r.specifier for r in requirements if r.marker and r.marker.evaluate({"extra": "export"})}
    for package, version in EXPORTER.items():
        assert asked[package].contains(importlib.metadata.version(package))
        if version:
            major, minor = map(int, version.split("."))
            assert importlib.metadata.version(package).startswith(f"{version}.")
            assert not asked[package].contains(f"{major}.{minor + 1}.0")


def test_minutes_ask_for_less() -> None:
    values = placeholders("x", "y", brief=True, kit=False, versions=HERE)
    commands = {name: part.command.format_map(values) for name, part in PARTS.items()}
    assert "naive-compiled" not in str(commands) and "--memory" not in str(commands)
    assert "-k 'float16 and not bfloat16'" in commands["memcheck"] and "-k" not in commands["kernel-tests"].split()


def test_a_killed_run_leaves_its_file(stand_in: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    line = [
        sys.executable,
        "-m",
        "benchmarks.gpu",
        "--only",
        "kernels",
        "backends",
        "--out",
        str(out),
        "--minutes",
        "5",
    ]
    with subprocess.Popen(line, cwd=ROOT, env=stand_in, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        while process.poll() is None and (not out.is_file() or json.loads(out.read_text())["running"] is None):
            time.sleep(0.05)
        process.kill()  # and then the part that it had started, which is a session of its own
        subprocess.run(["pkill", "-KILL", "--parent", str(process.pid)], check=False)
    left = json.loads(out.read_text())
    assert left["running"] == "kernels" and left["minutes"] == 5 and left["gpu"].startswith("stand-in")


def test_bad_usage(tmp_path: Path) -> None:
    done = run(dict(os.environ), "--minutes", "0")
    assert done.returncode == 2 and "--minutes is 0, expected at least 1" in done.stderr
    done = run(dict(os.environ), "--kit", str(tmp_path))
    assert done.returncode == 2 and "holds no part of a kit" in done.stderr


@pytest.fixture(scope="module")
def kit(engine_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A kit of the items that need no network, made by the command; its parts were copied. It holds no wheel."""
    folder = tmp_path_factory.mktemp("kit")
    engine = for_onnxruntime(engine_dir, folder / "engine")
    items = "--items", "cubins", "miniature"
    done = run(dict(os.environ), "--prepare", str(folder / "made"), *items, "--engine", str(engine), "--json")
    assert done.returncode == 0, done.stderr
    parts = json.loads(done.stdout.splitlines()[-1])["part_bytes"]
    for part in parts:
        shutil.copytree(folder / "made" / part, folder / "kit" / part)
    return folder / "kit"


def lent(stand_in: dict[str, str], **variables: str) -> dict[str, str]:
    """The environment variables of a lent machine, as lent_machine/sitecustomize.py imitates it."""
    return stand_in | {"PYTHONPATH": str(LENT)} | variables


def test_a_machine_that_is_lent(kit: Path, stand_in: dict[str, str], tmp_path: Path) -> None:
    """No network, torch 2.11, no diffusers, ONNX Runtime for the CPU: one file, with reasons for the parts left out."""
    out, engine = tmp_path / "gpu.json", tmp_path / "engine"
    only = [name for name in PARTS if name != "kernel-tests"]  # which test_through_cuda rehearses
    line = ["--kit", str(kit), "--minutes", "12", "--engine", str(engine), "--sdxl", str(tmp_path / "sdxl")]
    done = run(lent(stand_in), *line, "--out", str(out), "--only", *only)
    assert done.returncode == 0, done.stdout + done.stderr
    left: dict[str, Any] = json.loads(out.read_text())
    assert left["versions"]["torch"] == "2.11.0" and "diffusers" not in left["versions"]
    assert {name for name, part in left["parts"].items() if part["status"] == 0} == {"kernels", "build", "backends"}
    assert left["kit"]["cubins"] == str(kit / "cubins")
    Manifest.read(engine).check_files()
    reasons = left["left_out"]
    for name, reason in {
        "tensorrt": "its libraries are gigabytes",
        "tensorrt-rtx": "this is sm_90",
        "onnxruntime-gpu": f"{kit} was prepared without onnxruntime-gpu",
        "engine-tests": "no backend opens on this GPU",
        "latency": "no backend opens on this GPU",
        "pictures": "diffusers is not installed here",
        "checkpoint-sdxl": f"diffusers is not installed here; {kit} was prepared without sdxl-checkpoint",
        "latency-sdxl-graph": "tensorrt is not installed here; build-sdxl was left out",
        "build-sdxl": "torch 2.11.0 is installed here, expected 2.13; diffusers is not installed here",
        "latency-sdxl-1": "build-sdxl was left out",
        "training-sdxl": "checkpoint-sdxl was left out",
        "baselines": "diffusers is not installed here",
    }.items():
        assert reason in reasons[name], name
    assert "runs on the CPU only" in left["parts"]["backends"]["result"]["backends"]["onnxruntime"]["left_out"]
    assert set(left["parts"]) | set(reasons) >= set(only)


@pytest.mark.long
def test_a_machine_that_is_lent_with_an_onnxruntime_for_its_gpu(
    kit: Path, stand_in: dict[str, str], tmp_path: Path
) -> None:
    """The same where the engine opens: every test and figure of the miniature, in half precision. The minutes are more
    than a machine needs that does other work too."""
    out = tmp_path / "gpu.json"
    line = [
        "--kit",
        str(kit),
        "--minutes",
        "60",
        "--engine",
        str(tmp_path / "engine"),
        "--sdxl",
        str(tmp_path / "sdxl"),
    ]
    done = run(lent(stand_in, STAND_IN_SESSIONS="1"), *line, "--out", str(out))
    left = json.loads(out.read_text())
    assert done.returncode == 0, json.dumps(left["parts"], indent=1)
    passed = {name for name, part in left["parts"].items() if part["status"] == 0}
    assert passed == {"kernel-tests", "kernels", "build", "backends", "engine-tests", "latency"}
    opened = left["parts"]["backends"]["result"]["backends"]["onnxruntime"]
    assert opened["precision"] == "float16" and [picture["persons"] for picture in opened["pictures"]] == [0, 1, 2]
    assert all(0 < picture["levels_mean"] < 1 for picture in opened["pictures"])
    [one, two] = left["parts"]["latency"]["result"]["cases"]
    assert one["contenders"]["engine:onnxruntime"]["total_ms"]["count"] == 5 and two["persons"] == 2


def test_every_part_has_its_place() -> None:
    """Parts are in the order of their worth, and after the parts that they need."""
    names = list(PARTS)
    for name, part in PARTS.items():
        assert all(names.index(other) < names.index(name) for other in part.after)
    assert names[:4] == ["kernel-tests", "kernels", "memcheck", "racecheck"] and gpu_parts.ROOT == ROOT
