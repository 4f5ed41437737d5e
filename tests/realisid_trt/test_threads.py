"""The threads of ONNX Runtime on a CPU: as many as were asked for, and they wait without spinning."""

from __future__ import annotations

import gc
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from realisid_trt import Engine
from realisid_trt.backends import onnxruntime as backend
from tests.realisid_trt.truth import PROMPT, people

TASKS = Path("/proc/self/task")
NETWORKS = 13


def threads() -> int:
    return len(os.listdir(TASKS))


@pytest.mark.skipif(not TASKS.is_dir(), reason="only Linux lists the threads of a process")
def test_every_engine_of_a_process_has_its_own_number_of_threads(engine_dir: Path) -> None:
    """A session of the caller's keeps its own pool, too."""
    Engine.load(engine_dir, device="cpu:1").close()  # the libraries start a thread of their own, once
    gc.collect()  # engines of other tests, whose threads would end meanwhile
    before = threads()
    one = Engine.load(engine_dir, device="cpu:1")
    assert threads() == before
    three = Engine.load(engine_dir, device="cpu:3")
    assert threads() == before + NETWORKS * 2  # the calling thread is one of the three
    options = ort.SessionOptions()
    options.intra_op_num_threads = 4
    file = one.manifest.path / one.manifest.networks(one.manifest.build_for("onnxruntime"))["unet_time"].file
    session = ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    assert threads() == before + NETWORKS * 2 + 3
    with pytest.raises(RuntimeError):  # no such entry: it waits as ONNX Runtime's threads do
        session.get_session_options().get_session_config_entry("session.intra_op.allow_spinning")
    three.close()
    assert threads() == before + 3
    one.close()


def test_waiting_costs_no_processor_time(engine_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the same engine with ONNX Runtime's defaults, in turns: the same latents for less processor time.

    Seen on two cores: a third of it, idle or beside a busy core. Asserted: two thirds.
    """
    quiet = Engine.load(engine_dir, device="cpu:2")

    def defaults(count: int = 0) -> Any:
        options = ort.SessionOptions()
        options.intra_op_num_threads = count
        return options

    with monkeypatch.context() as patched:
        patched.setattr(backend, "session_options", defaults)
        spinning = Engine.load(engine_dir, device="cpu:2")
    taken: dict[str, list[float]] = {"quiet": [], "spinning": []}
    for _ in range(4):  # the first of each warms up
        made = []
        for name, engine in (("quiet", quiet), ("spinning", spinning)):
            start = time.process_time()
            made.append(engine.generate(PROMPT, people(engine, 1), num_inference_steps=4, seed=0, output="latents"))
            taken[name].append(time.process_time() - start)
        assert np.array_equal(made[0].latents, made[1].latents)
    quiet.close()
    spinning.close()
    print({name: [round(seconds, 3) for seconds in values] for name, values in taken.items()})
    assert 1.5 * min(taken["quiet"][1:]) <= min(taken["spinning"][1:])
