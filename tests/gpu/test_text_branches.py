"""Branches that read the text, on a GPU in half precision: alone, beside RealisID's, inside and outside of windows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from export.checkpoint import Checkpoint
from export.truth.reference import ReferenceControl
from realisid_trt import Control, Engine
from realisid_trt.kernels.launch import Kernels
from realisid_trt.loop.denoise import loop_networks
from realisid_trt.loop.stages import networks_of_stages
from tests.gpu.conftest import REHEARSAL
from tests.gpu.support import captures
from tests.methods import built_method
from tests.realisid_trt.truth import NEGATIVE, PROMPT, Scene, latent_errors

pytestmark = pytest.mark.slow("controlnet")  # builds engines of other tables

STEPS = 12
ALPHA = {"mixed": 0.7, "controlnet": None}
WORST_RATIO = 2.0  # of the error of plain torch in float16
Window = tuple[float, float, float]  # scale, start, end


@dataclass(frozen=True)
class Case:
    """One request of an engine of tests.methods.

    shown:  the branches that are shown a picture.
    passes: the steps of each pass. merges: of all steps, those in which a branch acts.
    """

    name: str
    place: str
    shown: dict[str, Window]
    passes: tuple[int, ...]
    merges: int


CASES = {
    # With α = 0.7 the ID begins in step 4. The window of mixed's openpose ends after step 6.
    "persons": Case("mixed", "overlapping", {"openpose": (0.8, 0.0, 0.6)}, (4, 3, 5), 12),
    "nobody": Case("mixed", "nobody", {"openpose": (0.8, 0.0, 0.6)}, (7, 5), 7),
    "no picture": Case("mixed", "one", {}, (4, 8), 12),
    # An engine without identities. Its depth has no attention, as the published `-small` nets.
    "two nets": Case("controlnet", "nobody", {"openpose": (0.7, 0.0, 0.6), "depth": (1.1, 0.3, 1.0)}, (4, 3, 5), 12),
    "no net": Case("controlnet", "nobody", {}, (12,), 0),
}
EACH_CASE = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@lru_cache
def opened(name: str, cuda_graph: bool = False) -> Engine:
    return Engine.load(built_method(name).engine, "onnxruntime", "cuda", cuda_graph=cuda_graph)


@pytest.fixture(scope="module", autouse=True)
def forgotten() -> Iterator[None]:
    """Lets the engines go after the last test: others count the device's memory."""
    yield
    opened.cache_clear()


def picture(side: int, seed: int) -> NDArray[np.float32]:
    return np.random.default_rng(seed).random((3, side, side), dtype=np.float32)


def made(engine: Engine, case: Case, seed: int = 7, **options: Any) -> Any:
    """The case's result. seed: of the pictures that are shown."""
    settings = {"num_inference_steps": STEPS, "subject_conditioning_ratio": ALPHA[case.name], "output": "latents"}
    side = engine.model.default_size
    scene = Scene.make(engine, case.place, side, side)
    controls = {
        name: Control(picture(side, seed + number), *window) for number, (name, window) in enumerate(case.shown.items())
    }
    return engine.generate(
        PROMPT, scene.persons(opened(case.name)), negative_prompt=NEGATIVE, latents=scene.latents, controls=controls,
        **{**settings, **options},
    )  # fmt: skip


@EACH_CASE
def test_it_errs_at_most_twice_as_much_as_torch(case: Case) -> None:
    """Final latents against the reference in float64; torch's networks in float16, its sums in float32."""
    engine, checkpoint = opened(case.name), Checkpoint.open(built_method(case.name).checkpoint)
    assert engine.backend.precision == "float16"
    side = engine.model.default_size
    scene = Scene.make(engine, case.place, side, side)
    controls = {
        name: ReferenceControl(torch.from_numpy(picture(side, 7 + number)), *window)
        for number, (name, window) in enumerate(case.shown.items())
    }
    settings: dict[str, Any] = {"num_inference_steps": STEPS // 2, "subject_conditioning_ratio": ALPHA[case.name]}
    ours, plain = latent_errors(
        made(engine, case, **settings).latents, checkpoint, scene.reference_persons(), scene.latents, PROMPT,
        torch.float16, negative_prompt=NEGATIVE, controls=controls, **settings,
    )  # fmt: skip
    print(f"{case.name}, {case.place}, {', '.join(case.shown)}: engine {ours:.2e}, torch in float16 {plain:.2e}")
    assert 1e-4 < ours <= WORST_RATIO * plain  # 2⁻¹¹ is one rounding: so half precision ran


@EACH_CASE
def test_each_step_merges_in_one_launch(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all branches; and in none where no branch acts."""
    launched, launch = [], Kernels.relocate_merge
    monkeypatch.setattr(Kernels, "relocate_merge", lambda *given: (launched.append(1), launch(*given))[1])
    made(opened(case.name), case)
    assert len(launched) == case.merges


@pytest.mark.skipif(not REHEARSAL, reason="ONNX Runtime's CUDA sessions cannot be captured")
@EACH_CASE
def test_a_window_s_end_is_captured_anew(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each pass once. Replayed steps make the same latents, and so do later requests with other pictures, which
    capture nothing."""
    from tests.kernels.stand_in import Counters

    plain, engine = opened(case.name), opened(case.name, cuda_graph=True)
    expected, found = made(plain, case), captures(engine, monkeypatch)
    before = Counters().graph_launches
    ours = made(engine, case)
    assert np.array_equal(ours.latents, expected.latents)
    assert len(found) == len(case.passes)
    assert Counters().graph_launches - before == sum(steps - 2 for steps in case.passes)
    loop = loop_networks(engine.manifest.config.table)
    assert [ours.rows.get(name) for name in loop] == [expected.rows.get(name) for name in loop]
    made(engine, case)  # until all addresses have settled
    settled, before = len(found), Counters().graph_launches
    again = made(engine, case, seed=70)
    assert len(found) == settled
    assert Counters().graph_launches - before == sum(steps - 1 for steps in case.passes)
    assert np.array_equal(again.latents, made(plain, case, seed=70).latents)
    assert np.array_equal(again.latents, expected.latents) == (not case.shown)


@EACH_CASE
def test_one_stage_at_a_time_makes_the_same_picture(case: Case) -> None:
    """memory="low", with replayed steps where they can be."""
    expected = made(opened(case.name), case, output="np")
    folder = built_method(case.name).engine
    with Engine.load(folder, "onnxruntime", "cuda", memory="low", cuda_graph=REHEARSAL) as engine:
        sessions: Any = engine.backend._runner._sessions  # type: ignore[attr-defined]
        ours = made(engine, case, output="np")
        assert np.array_equal(ours.latents, expected.latents)
        assert np.array_equal(ours.images[0], expected.images[0])
        assert set(sessions) in [set(names) for names in networks_of_stages(engine.manifest).values()]
