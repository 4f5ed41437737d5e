"""Two processes equal one. Processes that cannot work together are refused, and none waits for ever."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from export.files import locked
from realisid_trt.errors import RequestError
from tests.training.runs import command
from training.log import read_log
from training.processes import accelerator_of
from training.train import main


@pytest.mark.slow
def test_two_processes_are_one_with_twice_the_batch(start: Path, data: Path, tmp_path: Path) -> None:
    """Half a batch each, gradients averaged: the same up to rounding (float32, six steps)."""
    alone, pair = tmp_path / "alone", tmp_path / "pair"
    more = ("--steps", "6", "--precision", "no")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m",
              "training.train"]  # fmt: skip
    environment = os.environ | {"ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"}
    # Its loss is a mean over examples, so the mean of two halves is the whole's; a contrast's is not.
    for steps in ("3", "6"):  # stopped and gone on with
        both = [*launch, *command("branches", start, data, pair, *more[2:], "--steps", steps, "--decay", "0")]
        subprocess.run([*both, "--workers", "1"], check=True, env=environment, timeout=300, stderr=subprocess.DEVNULL)
    assert main(command("branches", start, data, alone, *more, "--decay", "0")) == 0
    ones, twos = (read_log(run / "log.jsonl") for run in (alone, pair))
    for one, two in zip(ones, twos, strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-4), one["step"]


@pytest.mark.slow
def test_machines_that_see_different_folders_are_refused(start: Path, data: Path, tmp_path: Path) -> None:
    """Each would go on from a state of its own. All processes end, and none waits for another."""
    script = tmp_path / "machine.py"
    arguments = command("face-points", start, data, tmp_path / "run", "--steps", "2")
    script.write_text(
        "import os, sys\nfrom training.train import main\n"
        f"sys.exit(main([word + os.environ['RANK'] * word.endswith('run') for word in {arguments!r}]))"
    )
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    environment = os.environ | {"ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()}
    ended = subprocess.run(launch, check=False, env=environment, timeout=300, capture_output=True, text=True)
    assert ended.returncode != 0 and "is not the same folder on all machines" in ended.stderr
    assert not (tmp_path / "run0" / "state").exists()


ONE_HANGS = """
import sys, time
from datetime import timedelta
from training import processes

processes.WAIT_IN_STEP = timedelta(seconds=5)
accelerator = processes.accelerator_of(cpu=True)
with processes.by_one(accelerator, lambda held: time.sleep(8)):
    if accelerator.is_main_process:
        time.sleep(8)
    processes.wait_for_all()
with processes.main_first():
    if accelerator.is_main_process:
        time.sleep(8)
print("patient", flush=True)
if not accelerator.is_main_process:
    time.sleep(1000)
since = time.monotonic()
try:
    processes.in_all(accelerator, True)
except RuntimeError:
    print(f"noticed after {time.monotonic() - since:.0f} s", flush=True)
    raise
"""


@pytest.mark.slow
def test_one_that_works_alone_is_waited_for_and_one_that_hangs_in_a_step_is_noticed(tmp_path: Path) -> None:
    """A process that works alone for all may take longer than a step. One that hangs in a step ends all of them."""
    (script := tmp_path / "hangs.py").write_text(ONE_HANGS)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    environment = os.environ | {"ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()}
    ended = subprocess.run(launch, check=False, env=environment, timeout=300, capture_output=True, text=True)
    assert ended.returncode != 0 and ended.stdout.count("patient") == 2, ended.stderr
    assert re.search(r"noticed after [4-9] s", ended.stdout), ended.stdout + ended.stderr


def test_one_process_at_a_time_trains_in_a_folder(
    start: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A forked worker of a process that has ended does not keep the folder locked."""
    told = command("face-points", start, data, tmp_path / "run", "--steps", "1")
    with locked(tmp_path / ".run.lock", RequestError()):
        assert main(told) == 2
        assert "another process is training in" in capsys.readouterr().err and not (tmp_path / "run").exists()
        read, write = os.pipe()
        if not (child := os.fork()):
            os.read(read, 1)
            os._exit(0)
    assert main(told) == 0
    os.write(write, b"x")
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize("name", ["FSDP", "DEEPSPEED"])
def test_weights_that_are_shared_out_are_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    with pytest.raises(RequestError, match=f"accelerate is set to {name}, but every process"):
        accelerator_of(cpu=True)


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "true"),
    ],
)
def test_a_launcher_s_variable_changes_no_step_in_silence(
    variable: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(RequestError, match=f"{variable} is {value}, which changes what a step computes"):
        accelerator_of(cpu=True)
    monkeypatch.setenv(variable, {"4": "1", "INDUCTOR": "NO", "true": "false"}[value])  # as accelerate launch sets it
    assert accelerator_of(cpu=True).gradient_accumulation_steps == 1
