"""An engine from a caller's side: rows, batches, seeds, scales, outputs."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from realisid_trt import Engine, Person, Request
from realisid_trt.config import RealisIDConfig
from realisid_trt.errors import BackendError, RealisIDWarning, RequestError
from realisid_trt.loop.denoise import loop_networks
from realisid_trt.loop.rows import PictureRows
from tests.realisid_trt.truth import PROMPT, Scene, checkpoint_with, errors, people

LOOP_NETWORKS = loop_networks(RealisIDConfig(branch_pooled_text="zeros").table)

STEP_NETWORKS = ("unet_encoder", "unet_decoder", "local_branch", "global_branch")


def latents_of(engine: Engine, persons: list[Person], **options: Any) -> np.ndarray:
    options = {"seed": 1, "num_inference_steps": 3, "subject_conditioning_ratio": None, **options}
    return engine.generate(PROMPT, persons, output="latents", **options).latents


def close(a: np.ndarray, b: np.ndarray) -> bool:
    """Equal to rounding: the networks' sums run in another order when a batch has another size.

    Plain torch in float32 errs about 2e-6 of the latents' RMS in these few steps (test_truth.py); one element may err
    8.57 times as much in guidance. A bound of 32 times is far below any change of the request.
    """
    return bool(np.abs(a - b).max() <= 32 * 2e-6 * np.sqrt(np.mean(a**2)))


@pytest.mark.parametrize("persons", [1, 2, 3, 4])
def test_rows_over_thirty_steps_are_the_table_of_the_design(engine: Engine, persons: int) -> None:
    rows = engine.generate(PROMPT, people(engine, persons), num_inference_steps=30, output="latents", seed=0).rows
    before, after = 10, 20
    assert {name: rows[name] for name in STEP_NETWORKS} == {
        "unet_encoder": 2 * (before + after),
        "unet_decoder": 2 * before + 3 * after,
        "local_branch": persons * before + 2 * persons * after,
        "global_branch": persons * before + 2 * persons * after,
    }
    assert {name: rows[name] for name in ("local_condition", "global_condition")} == dict.fromkeys(
        ("local_condition", "global_condition"), persons
    )
    assert (rows["unet_time"], rows["local_time"], rows["global_time"]) == (60, 30, 30)


def test_rows_of_the_per_row_branches(engine_dir: Path, with_config: Callable[..., Path]) -> None:
    engine = Engine.load(with_config(engine_dir, branch_pooled_text="per_row"))
    rows = engine.generate(PROMPT, people(engine, 2), num_inference_steps=30, output="latents", seed=0).rows
    assert rows["local_branch"] == rows["global_branch"] == 10 * 4 + 20 * 6


@pytest.mark.parametrize(
    ("scales", "rows_per_step"),
    [
        ({"guidance_scale": 5.0, "id_guidance_scale": 5.0}, (2, 2, 4)),  # λi = λt: none + full
        ({"guidance_scale": 1.0, "id_guidance_scale": 5.0}, (1, 2, 4)),  # λt = 1: text + full, one encoder row
        ({"guidance_scale": 7.5, "id_guidance_scale": 0.0}, (2, 2, 2)),  # λi = 0: none + text
        ({"guidance_scale": 1.0, "id_guidance_scale": 1.0}, (1, 1, 2)),  # full alone
    ],
)
def test_rows_without_weight_are_saved_and_the_result_is_right(
    engine: Engine, checkpoint_dir: Path, scales: dict[str, float], rows_per_step: tuple[int, int, int]
) -> None:
    side = engine.model.default_size
    scene = Scene.make(engine, "apart", side, side)
    settings = {"num_inference_steps": 4, "subject_conditioning_ratio": None, **scales}
    result = engine.generate(PROMPT, scene.persons(engine), latents=scene.latents, output="latents", **settings)
    encoder, decoder, branch = (result.rows[name] for name in ("unet_encoder", "unet_decoder", "local_branch"))
    assert (encoder, decoder, branch) == tuple(4 * n for n in rows_per_step)
    ours, plain = errors(engine, checkpoint_with(checkpoint_dir), scene, **settings)
    assert ours <= 4 * plain


def test_without_persons_no_branch_runs(engine: Engine) -> None:
    result = engine.generate("an empty beach", num_inference_steps=2, seed=0)
    assert not {"local_branch", "global_branch", "local_condition", "id_encoder"} & set(result.rows)
    assert result.images[0].size == (engine.model.default_size,) * 2


@pytest.mark.parametrize("branch", ["local", "global"])
def test_a_branch_without_scale_does_not_run(engine: Engine, branch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The picture is to the bit that of a branch that runs for nothing; also beside a picture with the branch."""
    off, on = {f"{branch}_scale": 0.0}, {"local_scale": 0.5, "global_scale": 0.25}
    options: dict[str, Any] = {"num_inference_steps": 3, "output": "latents"}
    common: dict[str, Any] = {"seed": 2, "subject_conditioning_ratio": None}
    batch = [Request("a", people(engine, 2), **common, **off), Request("b", people(engine, 1, 3), **common, **on)]

    def made() -> tuple[Any, Any, Any]:
        alone = engine.generate("a", people(engine, 2), **common, **off, **options)
        return alone, *engine.generate_batch(batch, **options)

    alone, *beside = made()
    rows = alone.rows
    assert not {f"{branch}_branch", f"{branch}_time", f"{branch}_condition"} & set(rows)
    assert rows[f"{'global' if branch == 'local' else 'local'}_branch"] == 3 * 4
    assert f"{branch}_branch" not in beside[0].rows and beside[1].rows[f"{branch}_branch"] == 3 * 2
    assert ("crop_upsample" in rows) == (branch == "global")
    monkeypatch.setattr(
        "realisid_trt.loop.planning.PictureRows", lambda *given: PictureRows(*given[:3], (True, True), given[4])
    )
    evaluated, *beside_evaluated = made()
    assert evaluated.rows[f"{branch}_branch"] == 3 * 4 and beside_evaluated[0].rows[f"{branch}_branch"] == 3 * 4
    assert np.array_equal(alone.latents, evaluated.latents)
    assert all(close(a.latents, b.latents) for a, b in zip(beside, beside_evaluated, strict=True))  # other batch sizes


def test_without_both_branches_it_is_the_picture_of_nobody(engine: Engine) -> None:
    persons = people(engine, 2)
    nobody, both = latents_of(engine, []), latents_of(engine, persons, local_scale=0, global_scale=0)
    assert np.array_equal(both, nobody)
    rows = engine.generate(PROMPT, persons, local_scale=0, global_scale=0, num_inference_steps=2, output="latents").rows
    assert (rows["unet_encoder"], rows["unet_decoder"]) == (4, 4)
    assert not {"local_branch", "global_branch", "relocate_merge"} & set(rows)


def test_permuted_persons_make_the_same_picture_to_rounding(engine_dir: Path, with_config: Callable[..., Path]) -> None:
    """The branch rows change places in their batch and the sums their order: equal to rounding, not to the bit."""
    for overlap in ("sum", "average"):
        engine = Engine.load(with_config(engine_dir, overlap=overlap))
        persons = people(engine, 3)
        assert close(latents_of(engine, persons), latents_of(engine, persons[::-1]))
    engine = Engine.load(with_config(engine_dir, overlap="priority"))
    assert not close(latents_of(engine, people(engine, 3)), latents_of(engine, people(engine, 3)[::-1]))


def test_a_request_alone_and_in_a_batch_of_four(engine: Engine) -> None:
    """Different prompts, seeds, scales, delays and numbers of persons, 0 to 8, in one pass."""
    requests = [
        Request("a garden", people(engine, 2), seed=3),
        Request("a street at night", (), seed=4, guidance_scale=3.0),
        Request("a garden", people(engine, 8, 1), negative_prompt="rain", seed=5, subject_conditioning_ratio=0.5),
        Request(
            "snow", people(engine, 1, 2), seed=6, num_images=2, id_guidance_scale=2.0, local_scale=0.5, global_scale=2.0
        ),
    ]
    together = engine.generate_batch(requests, num_inference_steps=4, output="latents")
    for request, result in zip(requests, together, strict=True):
        [alone] = engine.generate_batch([request], num_inference_steps=4, output="latents")
        assert result.latents.shape == alone.latents.shape and result.seed == alone.seed == request.seed
        assert close(result.latents, alone.latents)
        assert len(result.persons) == len(request.persons)


def test_several_pictures_are_those_of_the_next_seeds(engine: Engine) -> None:
    persons = people(engine, 1)
    both = latents_of(engine, persons, seed=8, num_images=2)
    assert close(both[:1], latents_of(engine, persons, seed=8))
    assert close(both[1:], latents_of(engine, persons, seed=9))
    assert not close(both[:1], both[1:])


def test_the_same_seed_in_two_processes(engine_dir: Path, photos: Any) -> None:
    script = (
        "import sys, hashlib; from realisid_trt import Engine, Person; e = Engine.load(sys.argv[1]);"
        "p = [Person(sys.argv[2], box=(4, 16, 60, 72)), Person(sys.argv[3], box=(66, 20, 124, 78))];"
        "r = e.generate('a beach', p, seed=11, num_inference_steps=4);"
        "print(hashlib.sha256(r.latents.tobytes() + r.images[0].tobytes()).hexdigest())"
    )
    command = [sys.executable, "-c", script, str(engine_dir), *map(str, photos)]
    digests = {subprocess.run(command, capture_output=True, text=True, check=True).stdout for _ in range(2)}
    assert len(digests) == 1


def test_a_drawn_seed_is_returned_and_repeats(engine: Engine) -> None:
    first = engine.generate(PROMPT, num_inference_steps=2, output="latents")
    again = engine.generate(PROMPT, num_inference_steps=2, output="latents", seed=first.seed)
    np.testing.assert_array_equal(first.latents, again.latents)
    assert first.seed != engine.generate(PROMPT, num_inference_steps=2, output="latents").seed


def test_given_latents_override_the_noise_and_stay_untouched(engine: Engine) -> None:
    cells = engine.model.sample_size
    noise = np.random.default_rng(0).standard_normal((1, 4, cells, cells)).astype(np.float32)
    before = noise.copy()
    a = latents_of(engine, [], latents=noise)
    assert not close(a, latents_of(engine, [], seed=1))
    np.testing.assert_array_equal(noise, before)


def test_persons_pose_place_prompt_and_scales_are_seen(engine: Engine) -> None:
    """No part of a request is ignored."""
    persons = people(engine, 1)
    base = latents_of(engine, persons)
    other = people(engine, 1, seed=1)[0]
    p = persons[0]
    changed = {
        "identity": [Person(id_tokens=other.id_tokens, box=p.box, pose_image=p.pose_image)],
        "pose": [Person(id_tokens=p.id_tokens, box=p.box, pose_image=other.pose_image)],
        "place": [Person(id_tokens=p.id_tokens, box=[v + 24 for v in p.box], pose_image=p.pose_image)],  # type: ignore[union-attr]
    }
    for what, given in changed.items():
        assert not close(base, latents_of(engine, given)), what
    for option in (
        {"negative_prompt": "rain"}, {"negative_prompt": ""}, {"guidance_scale": 3.0}, {"id_guidance_scale": 1.0},
        {"subject_conditioning_ratio": 0.5}, {"local_scale": 0.2}, {"global_scale": 0.2},
    ):  # fmt: skip
        assert not close(base, latents_of(engine, persons, **option)), option
    assert not close(base, engine.generate("snow", persons, output="latents", seed=1, num_inference_steps=3,
                                           subject_conditioning_ratio=None).latents)  # fmt: skip


def test_null_id_as_id_makes_the_full_row_the_text_row(engine: Engine) -> None:
    """Then λi has no effect, whatever it is."""
    person = people(engine, 1)[0]
    null = Person(id_tokens=engine.manifest.constants["null_id_tokens"], box=person.box, pose_image=person.pose_image)
    a, b = (latents_of(engine, [null], id_guidance_scale=scale) for scale in (0.0, 5.0))
    assert close(a, b)


def test_the_delay_is_zero_id_guidance_until_the_switch(engine: Engine) -> None:
    persons = people(engine, 1)
    delayed = latents_of(engine, persons, num_inference_steps=4, subject_conditioning_ratio=0.25)  # i <= 3: all four
    assert close(delayed, latents_of(engine, persons, num_inference_steps=4, id_guidance_scale=0.0))


def test_outputs(engine: Engine) -> None:
    steps: list[tuple[int, int]] = []
    pil = engine.generate(PROMPT, seed=2, num_inference_steps=2, progress=lambda *step: steps.append(step))
    arrays = engine.generate(PROMPT, seed=2, num_inference_steps=2, output="np")
    latents = engine.generate(PROMPT, seed=2, num_inference_steps=2, output="latents")
    side = engine.model.default_size
    assert pil.images[0].size == (side, side) and pil.images[0].mode == "RGB"
    assert arrays.images[0].shape == (side, side, 3) and arrays.images[0].dtype == np.float32
    assert arrays.images[0].min() >= 0 and arrays.images[0].max() <= 1
    np.testing.assert_array_equal(np.asarray(pil.images[0]), (arrays.images[0] * 255).round().astype(np.uint8))
    assert latents.images == [] and "vae_decoder" not in latents.rows
    np.testing.assert_array_equal(latents.latents, pil.latents)
    assert steps == [(1, 2), (2, 2)] and len(pil.step_ms) == 2
    stages = ("persons", "text", "time", "conditions", "denoise", "vae")
    assert tuple(key for key in pil.timings if "." not in key) == stages
    inside = sum(ms for key, ms in pil.timings.items() if key.startswith("denoise."))
    assert 0.5 * pil.timings["denoise"] < inside <= pil.timings["denoise"]
    assert pil.backend == "onnxruntime on cpu, float32"


def test_oblong_pictures(engine: Engine) -> None:
    side = engine.model.default_size
    result = engine.generate(
        PROMPT, people(engine, 2), height=side * 3 // 4, width=side * 5 // 4, num_inference_steps=2
    )
    assert result.images[0].size == (side * 5 // 4, side * 3 // 4)


def test_a_warm_up_and_an_unloading_change_nothing(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = engine.generate("a beach", seed=3, num_inference_steps=2, output="latents").latents
    warmed, run = list[int](), engine.backend.run
    with monkeypatch.context() as patch:
        note = lambda name, inputs: warmed.append(len(inputs["latents"])) if name == "local_branch" else None  # noqa: E731
        patch.setattr(engine.backend, "run", lambda name, inputs: (note(name, inputs), run(name, inputs))[1])
        engine.warm_up(2, num_inference_steps=1, num_images=2, width=96)
    assert warmed == [2 * 2, 2 * 2]  # twice, two persons in two pictures, with the null ID
    engine.unload()
    sessions = engine.backend._sessions  # type: ignore[attr-defined]
    assert set(sessions) == {name for name in LOOP_NETWORKS if name in engine.manifest.values["networks"]}
    found = engine.generate("a beach", seed=3, num_inference_steps=2)  # the texts are remembered
    assert np.array_equal(found.latents, expected)
    assert "vae_decoder" in sessions and "id_encoder" not in sessions  # it was not needed


def test_a_closed_engine_says_so(engine_dir: Path, photos: Any) -> None:
    with Engine.load(engine_dir, device="cpu:1") as engine:
        with pytest.raises(RequestError, match="a progress callback called the engine that runs it"):
            engine.generate(PROMPT, num_inference_steps=1, progress=lambda step, total: engine.close())
        engine.generate(PROMPT, num_inference_steps=1)
    engine.close()  # once more does nothing
    for use in (lambda: engine.generate(PROMPT), lambda: engine.embed(photos.astronaut)):
        with pytest.raises(BackendError, match=r"this engine was closed\. Load it again: Engine\.load"):
            use()


def test_photos_poses_and_stored_identities(engine_dir: Path, photos: Any, tmp_path: Path) -> None:
    """photo → Identity → file → picture: the same picture as from the photo; the second time from the caches."""
    engine = Engine.load(engine_dir)  # with empty caches
    boxes = [(4, 16, 60, 72), (66, 20, 124, 78)]
    options: dict[str, Any] = {"num_inference_steps": 2, "seed": 3, "output": "latents"}
    first = engine.generate(
        PROMPT,
        [Person(photos.astronaut, box=boxes[0]), Person(str(photos.hopper), box=boxes[1], pose=photos.astronaut)],
        **options,
    )
    assert first.rows["id_encoder"] == 2 and [p.mask_source for p in first.persons] == ["hull+person"] * 2
    hopper = engine.embed(photos.hopper)
    hopper.save(tmp_path / "hopper.safetensors")
    again = engine.generate(
        PROMPT,
        [Person(photos.astronaut.read_bytes(), box=boxes[0]),
         Person(tmp_path / "hopper.safetensors", box=boxes[1], pose=engine.embed(photos.astronaut))],
        **options,
    )  # fmt: skip
    np.testing.assert_array_equal(first.latents, again.latents)
    assert "id_encoder" not in again.rows and "text_encoder" not in again.rows
    assert again.timings["persons"] < first.timings["persons"]


def test_without_a_box_the_face_stays_where_it_is_in_the_photo(engine: Engine, photos: Any) -> None:
    identity, side = engine.embed(photos.astronaut), engine.model.default_size
    [placed] = engine.generate(PROMPT, [Person(identity)], num_inference_steps=1, output="latents").persons
    expected = np.array(identity.box) * side / 512
    assert np.abs(np.array(placed.box) - expected).max() <= engine.model.vae_scale_factor


def test_own_face_boxes_and_landmarks(engine: Engine, photos: Any) -> None:
    """Drawn characters have no MTCNN box: the caller's box is used, and the caller's landmarks if given."""
    found = engine.embed(photos.hopper)
    boxed = engine.embed(photos.hopper, box=found.box)
    assert np.abs(boxed.landmarks - found.landmarks).max() < 0.05
    own = engine.embed(photos.hopper, box=found.box, landmarks=found.landmarks)
    np.testing.assert_array_equal(own.landmarks, found.landmarks)
    drawn = engine.generate(PROMPT, [Person(found, box=(10, 10, 80, 80), landmarks=found.landmarks)],
                            num_inference_steps=1, seed=0, output="latents")  # fmt: skip
    plain = engine.generate(
        PROMPT, [Person(found, box=(10, 10, 80, 80))], num_inference_steps=1, seed=0, output="latents"
    )
    np.testing.assert_array_equal(drawn.latents, plain.latents)


def test_long_prompts_are_cut_with_a_warning_that_says_what(engine: Engine) -> None:
    long = "a red house and a green tree " * 30 + "the very last words"
    with pytest.warns(RealisIDWarning, match="more than the 77 tokens .* cut off: .*the very last words"):
        engine.generate(long, num_inference_steps=1, output="latents")


def test_one_engine_from_two_threads(engine: Engine) -> None:
    """Batches queue up, one whole after the other; every thread gets its own picture."""
    expected = {seed: latents_of(engine, people(engine, 1), seed=seed) for seed in (1, 2)}
    found: dict[int, np.ndarray] = {}
    steps: list[int] = []

    def make(seed: int) -> None:
        found[seed] = latents_of(engine, people(engine, 1), seed=seed, progress=lambda *_: steps.append(seed))

    threads = [threading.Thread(target=make, args=(seed,)) for seed in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed, latents in expected.items():
        np.testing.assert_array_equal(found[seed], latents)
    half = len(steps) // 2
    assert half > 1 and len(set(steps[:half])) == len(set(steps[half:])) == 1


def test_threads_of_the_device(engine_dir: Path) -> None:
    one = Engine.load(engine_dir, device="cpu:1")
    assert one.backend.device == "cpu:1"
    assert close(latents_of(one, people(one, 1)), latents_of(Engine.load(engine_dir), people(one, 1)))


def test_caches_forget_the_oldest() -> None:
    from realisid_trt.persons.recent import RecentCache

    made: list[int] = []
    recent: RecentCache[int] = RecentCache(2)
    for key in (1, 2, 1, 3, 1, 2):
        recent.get(key, lambda key=key: made.append(key) or key)  # type: ignore[misc]
    assert made == [1, 2, 3, 2]
