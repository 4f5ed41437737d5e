"""Works on a GPU: their pictures are those of their own runs, and a loop without an end takes no more memory."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from realisid_trt import Engine, Person, Request
from realisid_trt.backends.cuda_graphs import GRAPHS
from realisid_trt.errors import BackendError, NumericsError, RealisIDError
from tests.gpu.conftest import REHEARSAL
from tests.gpu.support import captures, relative_rms
from tests.gpu.test_engine import persons
from tests.realisid_trt.test_outcomes import overflowing
from tests.realisid_trt.test_work import POOL, Alone, asked

TICKS = 125  # of one round: about 250 steps


def run(engine: Engine, alone: Alone | None, ticks: int) -> list[float]:
    """A loop that goes on: up to three works, any of which take the next steps; some are dropped. Returns how far the
    finished latents are from their own runs, relative to their RMS."""
    draw, live, errors = random.Random(1), list[tuple[Any, int]](), list[float]()
    for _ in range(ticks):
        while len(live) < 3 and draw.random() < 0.7:
            number = draw.randrange(POOL)
            request, options = asked(engine, number)
            live.append((engine.begin(request, **options), number))
        draw.shuffle(live)
        chosen = [work for work, _ in live[: draw.randrange(len(live) + 1)]]
        for _ in range(draw.choice([1, 1, 4])):  # a pass of some steps, which may be captured
            engine.step(chosen)
        for work, number in list(live):
            if work.is_done:
                found = engine.finish(work, "latents").latents
                errors += [] if alone is None else [relative_rms(found, alone(number))]
            elif draw.random() < 0.03:
                engine.drop(work)
            else:
                continue
            live.remove((work, number))
    for work, _ in live:
        engine.drop(work)
    return errors


def test_pictures_are_those_of_their_own_runs(half: Engine, half_replayed: Engine, bounds: dict[str, float]) -> None:
    """In half precision, with and without replayed steps. Another company may have other tiles on a real GPU."""
    for engine in (half, half_replayed):
        errors = run(engine, Alone(half), 60)
        assert len(errors) > 10
        assert max(errors) <= (0 if REHEARSAL else bounds["float16"])


def test_one_picture_s_numbers_fail_alone(half: Engine) -> None:
    good, bad = (
        half.begin(request, num_inference_steps=3)
        for request in (
            Request("a beach", seed=1),
            Request("x", [overflowing(half)], subject_conditioning_ratio=None),
        )
    )
    for _ in range(3):
        half.step([good, bad])
    with pytest.raises(NumericsError, match="the final latents"):
        half.finish(bad)
    alone = half.generate("a beach", seed=1, num_inference_steps=3, output="latents")
    found = half.finish(good, "latents").latents
    assert relative_rms(found, alone.latents) <= (0 if REHEARSAL else 0.01)


@pytest.mark.parametrize("memory", ["normal", "low"])
def test_networks_that_are_unloaded_between_two_steps(
    engine_dir: Path, half: Engine, memory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the caller, or by a preview where only one stage's networks are held. A captured step goes with them."""
    request = Request("a beach", seed=1)
    expected = half.generate(request.prompt, seed=1, num_inference_steps=9, output="latents").latents
    with Engine.load(engine_dir, "onnxruntime", "cuda", memory=memory, cuda_graph=REHEARSAL) as engine:
        found, work = captures(engine, monkeypatch), engine.begin(request, num_inference_steps=9, previews=True)
        for count in (1, 2):
            for _ in range(4):
                engine.step([work])
            assert len(found) == (count if REHEARSAL else 0)
            graphs = engine.backend._steps.graphs  # type: ignore[attr-defined]
            assert len(graphs) == (1 if REHEARSAL else 0)
            engine.unload() if memory == "normal" else engine.preview(work)
            assert not graphs
        engine.step([work])
        assert np.array_equal(engine.finish(work, "latents").latents, expected)


def failing(engine: Engine, network: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(name: str, *given: Any, **named: Any) -> Any:
        if name == network:
            raise BackendError("no memory")
        return original(name, *given, **named)

    original = engine.backend.run
    monkeypatch.setattr(engine.backend, "run", run)


@pytest.mark.parametrize("case", ["progress", "numbers", "photo", "begin", "step", "generate", "result"])
def test_nothing_stays_on_the_device(half: Engine, case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever ends a request: what it kept is freed at once."""
    backend: Any = half.backend
    good = Request("a beach", persons(half.model, 1), seed=1, num_images=2, subject_conditioning_ratio=None)
    bad = Request("x", [overflowing(half)], subject_conditioning_ratio=None)
    options: Any = {"num_inference_steps": 3, "output": "np"}
    if case == "progress":
        with pytest.raises(KeyboardInterrupt):
            half.generate_batch([good, good], progress=lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()), **options)
    elif case in ("numbers", "photo"):
        wrong = bad if case == "numbers" else Request("x", [Person(tmp_path / "none.jpg")])
        assert [
            isinstance(each, RealisIDError) for each in half.generate_batch([good, wrong], errors="return", **options)
        ]
        with pytest.raises(RealisIDError):
            half.generate_batch([good, wrong], **options)
    elif case in ("generate", "begin"):
        failing(half, "unet_decoder" if case == "generate" else "global_condition", monkeypatch)
        with pytest.raises(BackendError, match="no memory"):
            half.generate_batch([good], **options) if case == "generate" else half.begin(good)
    elif case == "step":
        works = [half.begin(good, num_inference_steps=3) for _ in range(2)]
        assert backend._kept
        failing(half, "unet_decoder", monkeypatch)
        with pytest.raises(BackendError, match="no memory"):
            half.step(works)
    else:
        work = half.begin(good, num_inference_steps=1)
        half.step([work])
        failing(half, "vae_decoder", monkeypatch)
        with pytest.raises(BackendError, match="no memory"):
            half.finish(work)
    assert not backend._kept and half._passes._current is None


@pytest.mark.skipif(not REHEARSAL, reason="counts what the stand-in replays")
def test_after_other_calls_a_captured_step_is_compared_again(
    plans_engine: Path, flavour: str, plans: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They may have moved the scratch memory that the graph holds. What is the same is replayed from the next step."""
    from tests.kernels.stand_in import Counters

    expected = plans.generate("a beach", seed=1, num_inference_steps=8, output="latents").latents
    with Engine.load(plans_engine, backend=flavour, cuda_graph=True) as engine:
        for _ in range(3):  # until all addresses have settled
            engine.generate("a beach", seed=1, num_inference_steps=8, output="latents")
        found, replays = captures(engine, monkeypatch), list[int]()
        work = engine.begin(Request("a beach", seed=1), num_inference_steps=8)
        for count in range(8):
            before = Counters().graph_launches
            engine.step([work])
            engine.backend._gpu.wait()  # type: ignore[attr-defined]
            replays.append(Counters().graph_launches - before)
            if count == 4:
                engine.drop(engine.begin(Request("a street")))
        assert replays == [0, 1, 1, 1, 1, 0, 1, 1] and not found
        assert np.array_equal(engine.finish(work, "latents").latents, expected)


@pytest.mark.slow
@pytest.mark.skipif(not REHEARSAL, reason="counts what the stand-in allocates")
def test_a_thousand_steps_take_no_more_than_hundreds(engine_dir: Path) -> None:
    """Arenas, kept arrays, pinned memory, events: after four rounds of one schedule what they were after two."""
    from tests.kernels.stand_in import Counters

    with Engine.load(engine_dir, "onnxruntime", "cuda", cuda_graph=True) as engine:
        backend: Any = engine.backend
        sizes = list[tuple[int, ...]]()
        for _ in range(4):
            run(engine, None, TICKS)
            counters, gpu = Counters(), backend._gpu
            assert not backend._kept and 0 < len(backend._steps.graphs) <= GRAPHS == 16
            sizes.append((gpu.calls.nbytes, gpu.passes.nbytes, gpu.pinned_bytes, counters.device_bytes,
                         counters.pinned_bytes, counters.events))  # fmt: skip
        assert sizes[3] == sizes[2] == sizes[1]
        assert np.all(np.array(sizes) < 2**28)
