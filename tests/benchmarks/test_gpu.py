"""What runs everything on a GPU, where there is none: its parts, and what it says."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.gpu import PARTS, PYTHON, run_part
from tests.kernels.stand_in import build

ROOT = Path(__file__).resolve().parents[2]


def test_parts_that_pass_fail_and_cannot_be() -> None:
    good = run_part(f"""{PYTHON} -c 'print("one")'""")
    assert good["status"] == 0 and "one" in good["output"] and good["command"].startswith("python -c")
    spoken = run_part(f"""{PYTHON} -c 'print("bar"); print("[1, 2]")' --json""")
    assert spoken["result"] == [1, 2] and "bar" not in spoken["output"]
    bad = run_part(f"""{PYTHON} -c 'raise SystemExit("it is broken")' --json""")
    assert bad["status"] == 1 and "it is broken" in bad["output"] and bad["result"] is None
    absent = run_part("no-such-sanitizer --tool memcheck")
    assert absent["status"] is None and absent["output"] == "no-such-sanitizer is not here"


def test_a_part_that_hangs_is_ended_with_all_that_it_started() -> None:
    children = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    start = time.perf_counter()
    hung = run_part(f"""{PYTHON} -c "{children}" """, seconds=1)  # returns when nobody holds the output any more
    assert hung["status"] == -signal.SIGKILL and "stopped after 1 s" in hung["output"]
    assert time.perf_counter() - start < 30


@pytest.mark.parametrize("name", [name for name in PARTS if "check" not in name])
def test_every_part_is_a_command_that_exists(name: str) -> None:
    command = PARTS[name].command.format(python=PYTHON, engine="engines/x", sdxl="engines/y").split()
    module = command[command.index("-m") + 1]
    done = subprocess.run([sys.executable, "-m", module, "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0
    for flag in (word for word in command if word.startswith("--")):
        assert flag in done.stdout


def test_without_a_gpu(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu", "--out", str(tmp_path / "gpu.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "there is no NVIDIA driver here" in done.stderr
    assert not (tmp_path / "gpu.json").exists()


def test_one_file_is_left(tmp_path: Path) -> None:
    """On the stand-in, with the part that needs no more than a driver."""
    environment = {**os.environ, **build(tmp_path)}
    out = tmp_path / "gpu.json"
    command = [sys.executable, "-m", "benchmarks.gpu", "--only", "kernels", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    left = json.loads(out.read_text())
    assert left["gpu"] == "stand-in (sm_90), driver for CUDA 13.2" and left["parts"]["kernels"]["result"]["schema"] == 1
    assert "kernels: passed" in done.stdout
