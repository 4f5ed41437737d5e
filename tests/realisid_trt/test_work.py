"""Works: any of them take a step together, in any order, and each becomes the picture of its own run, bit for bit."""

from __future__ import annotations

import random
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from realisid_trt import Control, Engine, Person, Request, Work
from realisid_trt.errors import BackendError, NumericsError, RequestError, ShapeError
from realisid_trt.loop.samplers import Sampler
from tests.methods import built_method
from tests.realisid_trt.test_outcomes import overflowing
from tests.realisid_trt.truth import people

SAMPLERS = (
    "ddim", "euler", "euler-a", "heun", "dpmpp-2m-karras", "dpmpp-2m-sde", "dpmpp-sde", "unipc", "lcm", "tcd",
)  # fmt: skip
POOL = 16  # distinct requests of an engine
Asked = tuple[Request, dict[str, Any]]


@lru_cache(maxsize=1)
def opened(path: str, device: str) -> Engine:
    return Engine.load(path, device=device)


def person_of(engine: Engine, draw: random.Random, side: int) -> Person:
    """A person that every method takes: ID tokens or an embedding, a box, a drawing where one is used."""
    rng, least = np.random.default_rng(draw.randrange(100)), engine.model.vae_scale_factor << (engine.model.levels - 1)
    if engine.config.unet_tokens == "text_and_id":
        at = draw.randrange(side // 4, side * 3 // 4), draw.randrange(side // 4, side * 3 // 4)
        embedding = rng.standard_normal(engine.model.face_encoder["output_dim"]).astype(np.float32)
        return Person(embedding=20 * embedding, at=at)
    tokens = rng.standard_normal((engine.model.num_id_tokens, engine.model.cross_attention_dim)).astype(np.float32)
    pose = rng.random((3, engine.model.default_size, engine.model.default_size)).astype(np.float32)
    x, y = draw.randrange(0, side - 3 * least), draw.randrange(0, side - 3 * least)
    return Person(id_tokens=0.3 * tokens, pose_image=pose, box=(x, y, x + 3 * least, y + 3 * least))


def asked(engine: Engine, number: int) -> Asked:
    """A request and its options, drawn by its number."""
    draw, options = random.Random(number), dict[str, Any]()
    side = draw.choice([engine.model.default_size, engine.model.default_size * 3 // 4])
    has_persons = engine.config.id_input != "none"
    persons = [person_of(engine, draw, side) for _ in range(draw.randrange(4) if has_persons else 0)]
    given = {name: draw.choice([None, 1.0, 5.0]) for name in ("guidance_scale", "id_guidance_scale")}
    if draw.random() < 0.3:
        given["guidance_interval"] = (0.3, 6.0)
    if draw.random() < 0.6:
        given["subject_conditioning_ratio"] = draw.choice([None, 0.5, 0.3])
    names = [branch.name for branch in engine.config.table]
    controls = {name: Control(scale=draw.choice([0.0, 0.5, 1.0]), end=draw.choice([0.5, 1.0])) for name in names}
    for branch in engine.config.table:
        if branch.condition in ("image", "id_patches") or not has_persons:
            image = np.random.default_rng(number).random((branch.channels, side, side), np.float32)
            controls[branch.name] = Control(image, draw.choice([0.5, 1.0]))
    steps, sampler = draw.randrange(2, 6), draw.choice(SAMPLERS)
    if sampler == "tcd" and draw.random() < 0.5:
        sampler = Sampler("tcd", eta=0.7)
    options |= {"num_inference_steps": steps, "sampler": sampler, "height": side, "width": side}
    negative, images = draw.choice([None, "blurry"]), draw.choice([1, 1, 2])
    request = Request(
        f"picture {number % 5}", persons, negative, images, seed=number, controls=controls, **given,  # type: ignore[arg-type]
    )  # fmt: skip
    return request, options


class Alone:
    """The latents of requests that are made alone, remembered."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.known = engine, dict[int, NDArray[np.float32]]()

    def __call__(self, number: int) -> NDArray[np.float32]:
        if number not in self.known:
            request, options = asked(self.engine, number)
            [result] = self.engine.generate_batch([request], output="latents", **options)
            self.known[number] = result.latents
        return self.known[number]


def follow(engine: Engine, alone: Alone, seed: int) -> int:
    """One random schedule of joins, pauses and drops, whose pictures are compared. Returns how many were finished."""
    draw, waiting = random.Random(seed), list[tuple[int, int, int | None]]()
    for _ in range(4):
        number = draw.randrange(POOL)
        steps = asked(engine, number)[1]["num_inference_steps"]
        waiting.append((draw.randrange(5), number, draw.randrange(1, steps) if draw.random() < 0.2 else None))
    live, finished, tick = list[tuple[Work, int, int | None]](), 0, 0
    while waiting or live:
        for joins in [each for each in waiting if each[0] <= tick]:
            waiting.remove(joins)
            request, options = asked(engine, joins[1])
            live.append((engine.begin(request, **options), *joins[1:]))
        draw.shuffle(live)
        engine.step([work for work, _, _ in live[: draw.randrange(len(live) + 1)]])
        for work, number, leaves in list(live):
            if leaves is not None and work.steps_done >= leaves:
                engine.drop(work)
            elif work.is_done:
                np.testing.assert_array_equal(engine.finish(work, "latents").latents, alone(number))
                finished += 1
            else:
                continue
            live.remove((work, number, leaves))
        tick += 1
    return finished


@pytest.mark.parametrize("device", ["cpu:1", "cpu:2"])
@pytest.mark.parametrize(
    ("method", "schedules"),
    [
        ("realisid", range(8)),
        pytest.param("realisid", range(8, 26), marks=pytest.mark.slow),
        pytest.param("controlnet", range(26, 34), marks=pytest.mark.slow),
        pytest.param("idpatch", range(34, 50), marks=pytest.mark.slow),
    ],
)
def test_a_picture_of_a_random_schedule_is_that_of_its_own_run(
    engine_dir: Any, method: str, schedules: range, device: str
) -> None:
    engine = opened(str(engine_dir if method == "realisid" else built_method(method).engine), device)
    alone = Alone(engine)
    finished = [follow(engine, alone, seed) for seed in schedules]
    assert sum(finished) > 2 * len(schedules)


def takes(engine: Engine, *works: Work) -> None:
    while not all(work.is_done for work in works):
        engine.step(works)


def test_a_work_says_how_far_it_is_and_what_it_took(engine: Engine) -> None:
    """Rows are the work's own, whoever ran with it; milliseconds are those of its passes."""
    first, second = (Request("a beach", people(engine, n), seed=n, subject_conditioning_ratio=None) for n in (2, 1))
    alone = engine.generate_batch([first], num_inference_steps=3)[0]
    works = engine.begin(first, num_inference_steps=3), engine.begin(second, num_inference_steps=2, sampler="heun")
    assert [(work.steps, work.steps_done, work.is_done, work.seed) for work in works] == [
        (3, 0, False, 2),
        (3, 0, False, 1),  # heun: two evaluations in the first of two steps, one in the last
    ]
    engine.step(works)
    assert [work.steps_done for work in works] == [1, 1]
    takes(engine, *works)
    result, other = (engine.finish(work) for work in works)
    assert result.images[0].tobytes() == alone.images[0].tobytes()
    loop = ("unet_encoder", "unet_decoder", "local_branch", "global_branch", "crop_upsample", "relocate_merge")
    for name in (*loop, "guide_step", "unet_time", "local_condition", "vae_decoder"):
        assert result.rows[name] == alone.rows[name], name
    assert list(result.rows) == [name for name in alone.rows if name in result.rows]
    assert (other.rows["local_branch"], other.rows["guide_step"]) == (3 * 2, 3)
    assert len(result.step_ms) == 3 and all(ms > 0 for ms in result.step_ms)
    assert result.timings["denoise"] == pytest.approx(sum(result.step_ms))
    assert 0 < result.timings["denoise.unet_encoder"] < result.timings["denoise"]
    assert list(result.timings)[:5] == ["persons", "text", "time", "conditions", "denoise"]
    assert list(result.timings)[-1] == "vae" and result.timings.keys() == alone.timings.keys()


def test_a_work_that_is_done_stays_as_it_is(engine: Engine) -> None:
    short, long = (engine.begin(Request("a beach", seed=1), num_inference_steps=steps) for steps in (1, 3))
    for _ in range(5):
        engine.step([short, long])
    assert (short.steps_done, long.steps_done) == (1, 3)
    for work, steps in ((short, 1), (long, 3)):
        expected = engine.generate("a beach", seed=1, num_inference_steps=steps, output="latents").latents
        np.testing.assert_array_equal(engine.finish(work, "latents").latents, expected)
    engine.step([])


def test_pictures_made_between_the_steps_change_nothing(engine: Engine, photos: Any) -> None:
    """`generate` in another size, `embed`, and a work that is dropped, while one waits."""
    request = Request("a street", people(engine, 2), seed=5, num_images=2)
    [expected] = engine.generate_batch([request], num_inference_steps=4, sampler="unipc", output="latents")
    work = engine.begin(request, num_inference_steps=4, sampler="unipc")
    for _ in range(4):
        engine.step([work])
        side = engine.model.default_size // 2
        engine.generate("a beach", num_inference_steps=1, height=side, width=side)
        engine.embed(photos.astronaut)
        engine.drop(engine.begin(Request("a forest", people(engine, 1)), num_inference_steps=1))
    np.testing.assert_array_equal(engine.finish(work, "latents").latents, expected.latents)


def test_one_picture_s_numbers_fail_alone(engine: Engine) -> None:
    good = Request("a beach", people(engine, 1), seed=1)
    bad = Request("x", [overflowing(engine)], subject_conditioning_ratio=None)
    works = [engine.begin(request, num_inference_steps=2) for request in (good, bad, good)]
    takes(engine, *works)
    [expected] = engine.generate_batch([good], num_inference_steps=2, output="latents")
    for work in (works[0], works[2]):
        np.testing.assert_array_equal(engine.finish(work, "latents").latents, expected.latents)
    with pytest.raises(NumericsError, match="the final latents holds"):
        engine.finish(works[1])
    with pytest.raises(RequestError, match="was finished or dropped"):
        engine.finish(works[1])


def test_a_failed_step_loses_those_that_ran_with_it(engine_dir: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with Engine.load(engine_dir) as engine:
        side, run = engine.model.default_size, engine.backend.run
        beside, lost = (
            engine.begin(Request("a beach", seed=1), num_inference_steps=2, height=size, width=size)
            for size in (side // 2, side)
        )
        engine.step([beside])

        def failing(network: str, inputs: Any) -> Any:
            if network == "unet_decoder":
                raise BackendError("no memory")
            return run(network, inputs)

        monkeypatch.setattr(engine.backend, "run", failing)
        with pytest.raises(BackendError, match="no memory"):
            engine.step([lost])
        monkeypatch.undo()
        engine.step([beside])  # which did not run with it
        alone = engine.generate(
            "a beach", seed=1, num_inference_steps=2, height=side // 2, width=side // 2, output="latents"
        )
        np.testing.assert_array_equal(engine.finish(beside, "latents").latents, alone.latents)
        for call in (lambda: engine.step([lost]), lambda: engine.finish(lost)):
            with pytest.raises(BackendError, match="a step of this work failed, and its pictures are lost"):
                call()
        engine.drop(lost)


def test_previews_are_the_predicted_clean_latents(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the last step of ddim they are the final latents; before, x̂₀ restated from latents and prediction. They
    change nothing of the picture."""
    request = Request("a beach", people(engine, 1), seed=3, num_images=2)
    [expected] = engine.generate_batch([request], num_inference_steps=3, output="latents")
    seen, backend = list[tuple[Any, ...]](), engine.backend
    guide_step = type(backend).guide_step

    def watched(
        self: Any, latents: Any, kept: Any, step: Any, predicted: Any, of: Any, weights: Any, *rest: Any
    ) -> None:
        seen.append((latents.copy(), predicted.copy(), of.copy(), weights.copy()))
        guide_step(self, latents, kept, step, predicted, of, weights, *rest)

    monkeypatch.setattr(type(backend), "guide_step", watched)
    work = engine.begin(request, num_inference_steps=3, previews=True)
    with pytest.raises(RequestError, match="took no step yet"):
        engine.preview(work)
    levels = work.plan.sampler.levels
    for number in range(3):
        engine.step([work])
        latents, predicted, of, weights = seen[-1]
        found = engine.preview(work, "latents")
        for picture in range(2):
            rows = zip(weights[picture], of[picture], strict=True)
            noise = sum(weight * predicted[row].astype(np.float64) for weight, row in rows if row >= 0)
            alpha = np.sqrt(levels[number])
            clean = (latents[picture] - np.sqrt(1 - levels[number]) * noise) / alpha
            np.testing.assert_allclose(found[picture], clean, atol=1e-5 * np.abs(clean).max())
    assert [picture.size for picture in engine.preview(work)] == [(engine.model.default_size,) * 2] * 2
    other = engine.begin(Request("a street", seed=1), num_inference_steps=1)
    engine.step([other])  # its pass follows, and the preview stays
    np.testing.assert_array_equal(engine.preview(work, "latents"), found)
    with pytest.raises(RequestError, match=r"has no previews. Begin it with previews=True"):
        engine.preview(other)
    np.testing.assert_array_equal(engine.finish(work, "latents").latents, expected.latents)
    engine.drop(other)


def test_wrong_calls_are_refused_and_lose_nothing(engine: Engine) -> None:
    work = engine.begin(Request("a beach", seed=1), num_inference_steps=2)
    wrong: Any
    for wrong in (work, None, ["work"], [work, None]):
        with pytest.raises(RequestError, match="is not a list of what Engine.begin returned"):
            engine.step(wrong)
    with pytest.raises(RequestError, match="a work stands twice in the list"):
        engine.step([work, work])
    with pytest.raises(RequestError, match="0 of 2 steps were taken. Call step until is_done, or drop the work"):
        engine.finish(work)
    takes(engine, work)
    with pytest.raises(RequestError, match="output is 'jpeg'"):
        engine.finish(work, "jpeg")
    engine.finish(work)
    engine.drop(work)
    for call in (lambda: engine.step([work]), lambda: engine.finish(work), lambda: engine.preview(work)):
        with pytest.raises(RequestError, match="this work was finished or dropped. Begin the request again"):
            call()
    with Engine.load(engine.manifest.path) as other:
        foreign = other.begin(Request("a beach"), num_inference_steps=1)
        for refused in (lambda: engine.step([foreign]), lambda: engine.drop(foreign), lambda: engine.preview(foreign)):
            with pytest.raises(RequestError, match="a work is of another engine"):
                refused()
        other.step([foreign])
        other.drop(foreign)
    for wrong in (None, [work], "work"):
        with pytest.raises(RequestError, match="is not a list of what Engine.begin returned"):
            engine.drop(wrong)
    assert repr(work) == "Work(2 of 2 steps)"
    with pytest.raises(RequestError, match="is not a Request"):
        engine.begin("a beach")  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match="height is 30"):
        engine.begin(Request("a beach"), height=30)


def test_a_closed_engine(engine_dir: Any) -> None:
    engine = Engine.load(engine_dir)
    work = engine.begin(Request("a beach", seed=1), num_inference_steps=2)
    engine.step([work])
    engine.close()
    for call in (lambda: engine.step([work]), lambda: engine.finish(work), lambda: engine.begin(Request("x"))):
        with pytest.raises(BackendError, match="this engine was closed"):
            call()
    engine.drop(work)


@pytest.mark.slow
def test_works_with_one_stage_s_networks_at_a_time(engine: Engine, engine_dir: Any) -> None:
    """memory="low": each call loads what it needs."""
    request = Request("a beach", people(engine, 2), seed=1)
    [expected] = engine.generate_batch([request], num_inference_steps=2, output="np")
    with Engine.load(engine_dir, device=engine.backend.device, memory="low") as low:
        first, second = (low.begin(request, num_inference_steps=2) for _ in range(2))
        low.step([first])
        low.step([first, second])
        low.step([second])
        for work in (first, second):
            np.testing.assert_array_equal(low.finish(work, "np").images[0], expected.images[0])


@pytest.mark.parametrize("count", [3, 5])
def test_more_works_than_fit_run_in_several_passes(engine: Engine, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine built for two pictures of one person."""
    limit, check = 2, engine.backend.check

    def checked(network: str, shapes: dict[str, tuple[int, ...]]) -> None:
        if network == "unet_encoder" and shapes["latents"][0] > 2 * limit:
            raise ShapeError("too many rows")
        check(network, shapes)

    monkeypatch.setattr(engine.backend, "check", checked)
    ran, run = list[int](), engine.backend.run

    def counted(network: str, inputs: Any) -> Any:
        if network == "unet_encoder":
            ran.append(len(inputs["latents"]))
        return run(network, inputs)

    monkeypatch.setattr(engine.backend, "run", counted)
    works = [engine.begin(Request("a beach", seed=seed), num_inference_steps=2) for seed in range(count)]
    engine.step(works)
    assert ran == [4] * (count // 2) + [2]
    takes(engine, *works)
    for seed, work in enumerate(works):
        expected = engine.generate("a beach", seed=seed, num_inference_steps=2, output="latents").latents
        np.testing.assert_array_equal(engine.finish(work, "latents").latents, expected)
