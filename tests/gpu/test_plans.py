"""TensorRT plans on a GPU: parity, capture, memory and refusals, for each flavour that this card runs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from realisid_trt import Engine
from realisid_trt.config import RealisIDConfig
from realisid_trt.errors import BackendError, EngineMismatch, RealisIDWarning, ShapeError
from realisid_trt.loop.denoise import loop_networks
from realisid_trt.manifest import MANIFEST, seal
from tests.gpu.conftest import REHEARSAL
from tests.gpu.support import captures, person, relative_rms
from tests.gpu.test_engine import BOXES, latents

LOOP_NETWORKS = loop_networks(RealisIDConfig(branch_pooled_text="zeros").table)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_it_makes_the_cpu_s_pictures(cpu_engine: Engine, plans: Engine, bounds: dict[str, float], count: int) -> None:
    expected, found = (latents(engine, count, output="np") for engine in (cpu_engine, plans))
    assert plans.backend.precision == "float16" and found.backend.startswith("tensorrt")
    assert relative_rms(found.latents, expected.latents) < bounds["float16"]
    assert np.abs(found.images[0] - expected.images[0]).max() < 0.05
    loop = [name for name in LOOP_NETWORKS if name in expected.rows]
    assert [found.rows[name] for name in loop] == [expected.rows[name] for name in loop]


@pytest.mark.slow
def test_the_plans_are_gated_by_themselves_and_as_a_whole(
    plans_engine: Path, checkpoint_dir: Path, flavour: str
) -> None:
    """The checks of a build on a machine with a GPU, before it publishes: every plan, the engine, and one guided ε."""
    from export.checkpoint import Checkpoint
    from export.truth.verify_engine import verify_engine

    found = verify_engine(plans_engine, Checkpoint.open(checkpoint_dir))
    [figures] = [figures for figures in found.values() if figures["backend"] == flavour]
    assert len(figures["networks"]) == 13 and all(parity["ratio"] <= 4 for parity in figures["networks"].values())
    assert figures["ratio"] <= 4 and 0 < figures["rms_noise_pred"] < 0.05
    assert all(sum(layers.values()) > 0 for layers in figures["layers"].values())


def test_an_identity_from_a_photo(cpu_engine: Engine, plans: Engine, id_bounds: dict[str, float], photos: Any) -> None:
    expected, found = (engine.embed(photos.astronaut) for engine in (cpu_engine, plans))
    assert relative_rms(found.id_tokens, expected.id_tokens) < id_bounds["float16"]


@pytest.mark.slow
def test_a_captured_step_serves_later_requests(
    plans: Engine, plans_replayed: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other boxes, scales and seeds of the same shapes are replayed, not captured again, and give the same pictures."""
    engine, found = plans_replayed, captures(plans_replayed, monkeypatch)

    def both(boxes: Any, **options: Any) -> None:
        people = [person(engine.model, 7 + i, box) for i, box in enumerate(boxes)]
        options = {"num_inference_steps": 12, "output": "latents", **options}
        ours, plain = (each.generate("two friends", people, **options).latents for each in (engine, plans))
        assert np.array_equal(ours, plain)

    both(BOXES[:2], seed=1)
    both(BOXES[:2], seed=2)  # the first one's memory was in pieces
    warm = len(found)
    assert warm >= 2  # without the ID, and with it
    both(BOXES[1:], seed=3, local_scale=0.5, guidance_scale=3.0)
    both(BOXES[::-1][:2], seed=4, negative_prompt="blurry")
    assert len(found) == warm
    both(BOXES[:1], seed=5)
    both(BOXES[:2], seed=6, width=192)
    assert len(found) > warm


def test_after_a_warm_up_nothing_is_captured(plans_engine: Path, flavour: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with Engine.load(plans_engine, backend=flavour, cuda_graph=True) as engine:
        engine.warm_up(2, num_inference_steps=12)
        found = captures(engine, monkeypatch)
        latents(engine, 2, num_inference_steps=12)
        assert not found


@pytest.mark.skipif(not REHEARSAL, reason="a real plan says for itself")
def test_a_plan_that_cannot_be_captured(
    plans: Engine, plans_engine: Path, flavour: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.gpu import plans_on_the_cpu

    monkeypatch.setattr(plans_on_the_cpu, "CAPTURABLE", False)
    with (
        Engine.load(plans_engine, backend=flavour, cuda_graph=True) as engine,
        pytest.warns(RealisIDWarning, match="does not let .* be captured.*steps run one launch at a time"),
    ):
        found = latents(engine, 1, num_inference_steps=8).latents
    assert np.array_equal(found, latents(plans, 1, num_inference_steps=8).latents)


def test_shapes_outside_of_the_profile(plans: Engine) -> None:
    with pytest.raises(ShapeError, match="expected .* with .*rows in 1\\.\\.8.* larger --batch"):
        plans.generate("a crowd", num_images=5, num_inference_steps=1)
    with pytest.raises(ShapeError, match="or rebuild with a larger --batch, --persons or --resolution"):
        plans.generate("a wide street", width=512, num_inference_steps=1)


def test_one_scratch_memory_for_all_networks(plans: Engine) -> None:
    latents(plans, 2)
    contexts: Any = plans.backend._runner  # type: ignore[attr-defined]
    sizes = [bound.scratch_bytes for kept in contexts._bound.values() for bound in kept.values()]
    assert len(sizes) > 10 and contexts._scratch.size >= max(sizes)
    assert contexts._scratch.size < sum(sizes)


def test_a_gpu_that_is_full(plans: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every request for memory fails with an error of ours that says what to do."""

    def full(nbytes: int) -> Any:
        raise RuntimeError("CUDA_ERROR_OUT_OF_MEMORY")

    contexts: Any = plans.backend._runner  # type: ignore[attr-defined]
    latents(plans, 1)
    with monkeypatch.context() as patched:
        patched.setattr(contexts._gpu, "allocate", full)
        with pytest.raises(
            BackendError, match=r"could not be allocated \(CUDA_ERROR_OUT_OF_MEMORY\).* Make fewer or smaller pictures"
        ):
            contexts._scratch_of(contexts._scratch.size + 1)
    assert latents(plans, 1).latents.size


@pytest.mark.skipif(not REHEARSAL, reason="asks the stand-in's contexts what they were told")
def test_a_smaller_scratch_memory_at_the_same_address(plans: Engine) -> None:
    """An allocator may return it after a refusal. Every context gets the size of its memory before it runs."""
    contexts: Any = plans.backend._runner  # type: ignore[attr-defined]
    expected = latents(plans, 1).latents
    contexts._scratch_of(contexts._scratch.size + 4096)
    assert np.array_equal(latents(plans, 1).latents, expected)
    large, ran = contexts._scratch, set[int]()

    class Smaller:
        handle, size = large.handle, large.size - 4096

    contexts._scratch = Smaller()
    try:
        assert np.array_equal(latents(plans, 1).latents, expected)
        for kept in contexts._bound.values():
            for bound in kept.values():
                address, size = bound.context.scratch
                if size == Smaller.size and address == int(large.handle):
                    ran.add(bound.number)
        assert len(ran) >= len(LOOP_NETWORKS) - 3  # all networks of the loop; the kernels need none
    finally:
        contexts._scratch = large


@pytest.mark.slow
def test_memory_does_not_grow(plans_replayed: Engine, device_bytes: Callable[[], int]) -> None:
    """200 pictures of changing sizes and numbers of persons, in batches of four, captured where a shape comes again."""
    model, held, warm = plans_replayed.model, [], 3 * 12
    for turn in range(warm + 50):
        side = (64, 80, 96, 128)[turn % 4]
        people = [person(model, turn, (0, 0, side / 2, side / 2))] * (turn % 3)
        options = {"num_images": 4, "num_inference_steps": 4, "height": 64, "width": side, "output": "latents"}
        plans_replayed.generate("a beach", people, seed=turn, **options)
        held.append(device_bytes())
    assert max(held[warm:]) <= max(held[:warm])


def test_what_was_unloaded_is_loaded_again(plans: Engine, device_bytes: Callable[[], int]) -> None:
    expected = latents(plans, 1).latents
    engines = plans.backend._runner._engines  # type: ignore[attr-defined]
    plans.unload()
    assert set(engines) == {name for name in LOOP_NETWORKS if name in plans.manifest.values["networks"]}
    assert np.array_equal(latents(plans, 1).latents, expected)
    assert "id_encoder" not in engines  # it was not needed


def test_what_was_compiled_is_kept_beside_the_engine(plans_engine: Path, flavour: str, tmp_path: Path) -> None:
    if flavour != "tensorrt-rtx":
        pytest.skip("tensorrt compiles nothing where a plan runs")
    own = Path(shutil.copytree(plans_engine, tmp_path / "engine", ignore=shutil.ignore_patterns("*.cache")))

    def use() -> bytes:
        with Engine.load(own, backend=flavour) as engine:
            latents(engine, 1)
        engine.manifest.check_files()  # the cache is not a file of the manifest
        [file] = (own / "plans" / flavour).glob("*.cache")
        return file.read_bytes()

    first = use()
    assert len(first) > 50 and use().startswith(first[:9])
    [file] = (own / "plans" / flavour).glob("*.cache")
    file.write_bytes(b"another version's")  # is written anew
    assert len(use()) > 50


def test_a_server_that_is_told_to_end_has_kept_it(
    plans_engine: Path, flavour: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing runs after SIGTERM. If the engine's folder cannot be written, the cache is kept in the user's folder."""
    if flavour != "tensorrt-rtx":
        pytest.skip("tensorrt compiles nothing where a plan runs")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    own = Path(shutil.copytree(plans_engine, tmp_path / "engine", ignore=shutil.ignore_patterns("*.cache")))
    engine = Engine.load(own, backend=flavour)
    engine.warm_up(1, num_inference_steps=1, output="latents")
    [file] = (own / "plans" / flavour).glob("*.cache")  # before anything was closed
    content = file.read_bytes()
    assert len(content) > 50
    engine.close()
    file.unlink()
    file.mkdir()  # a place that cannot be written
    with Engine.load(own, backend=flavour) as second:
        second.warm_up(1, num_inference_steps=1, output="latents")
        [kept] = (tmp_path / "cache" / "realisid_trt" / "compiled").iterdir()
        assert kept.name.endswith(file.name) and len(kept.read_bytes()) > 50


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda build: build["versions"].update({package: "1.2.3" for package in build["versions"]}),
            "was built with tensorrt.* 1.2.3; .* is installed, .* python -m export.build .* --backend tensorrt",
        ),
        (
            lambda build: build.update(architecture="sm_75"),
            "plans for sm_75; this is .*, sm_.* python -m export.build .* --backend tensorrt",
        ),
    ],
    ids=["version", "architecture"],
)
def test_an_engine_that_claims_something_else(
    plans_engine: Path, flavour: str, tmp_path: Path, change: Callable[[Any], object], message: str
) -> None:
    engine = Path(shutil.copytree(plans_engine, tmp_path / "engine"))
    manifest = json.loads((engine / MANIFEST).read_text())
    [build] = [build for build in manifest["builds"].values() if build["backend"] == flavour]
    change(build)
    (engine / MANIFEST).write_text(json.dumps(manifest | {"seal": seal(manifest)}))
    with pytest.raises(EngineMismatch, match=message):
        Engine.load(engine, backend=flavour)


def test_a_plan_that_tensorrt_does_not_open(plans_engine: Path, flavour: str, tmp_path: Path) -> None:
    """A plan was altered together with its hashes. Only TensorRT can notice it."""
    from realisid_trt.files import file_sha256

    engine = Path(shutil.copytree(plans_engine, tmp_path / "engine"))
    file = f"plans/{flavour}/unet_time.plan"
    content = bytearray((engine / file).read_bytes())
    content[len(content) // 2 :] = content[: len(content) - len(content) // 2]
    (engine / file).write_bytes(content)
    manifest = json.loads((engine / MANIFEST).read_text())
    manifest["files"][file]["sha256"] = file_sha256(engine / file)
    (engine / MANIFEST).write_text(json.dumps(manifest | {"seal": seal(manifest)}))
    with pytest.raises(BackendError, match=r"cannot open .*unet_time\.plan: .*[Ss]erializ.* Build it again"):
        Engine.load(engine, backend=flavour)


@pytest.mark.skipif(not REHEARSAL, reason="the stand-in's own test")
def test_the_stand_in_says_when_a_graph_is_stale(plans_replayed: Engine) -> None:
    """The addresses of a context change after its capture: a replay then fails in the rehearsal."""
    from tests.gpu import plans_on_the_cpu

    steps = {"num_inference_steps": 12, "subject_conditioning_ratio": None}
    latents(plans_replayed, 1, **steps)
    backend: Any = plans_replayed.backend
    *_, latest = backend._steps.graphs.values()
    latest.captured.launch(backend._gpu.stream)
    backend._gpu.wait()
    assert not plans_on_the_cpu.failures
    for bound in backend._runner._bound["unet_encoder"].values():
        bound.context.reached = -1
    latest.captured.launch(backend._gpu.stream)
    backend._gpu.wait()
    assert any("a stale graph of unet_encoder" in line for line in plans_on_the_cpu.failures)
    plans_on_the_cpu.failures.clear()
