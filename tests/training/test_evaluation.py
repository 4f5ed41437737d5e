"""The evaluation: intervals that contain what they should, and judges that tell a true render from a wrong one."""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import save_file

from export.checkpoint import Checkpoint
from export.reference import Reference, ReferencePerson
from realisid_trt import Engine
from realisid_trt.conditions import id_pixels, pose_image
from realisid_trt.ddim import initial_noise
from realisid_trt.errors import CheckpointError, RequestError
from training.evaluate import main
from training.evaluation.cases import SIZES, Casting, one_person_captions
from training.evaluation.contenders import EngineContender, Truth
from training.evaluation.experiments import CEILING, EXPERIMENTS, FLOOR, Row
from training.evaluation.measures import (
    MEASURES,
    Judgement,
    Judges,
    brow_height,
    face_crop,
    match,
    mouth_opening,
    right_color,
)
from training.evaluation.report import write_report
from training.evaluation.sampler import Sampler
from training.evaluation.statistics import Sample, estimate, frechet, kernel_difference, ratio
from training.evaluation.studio import Asked, Studio
from training.evaluation.tables import between, table
from training.judges import JUDGES
from training.judges.nets import POINTS, Detector, overlap
from training.world import POSE, describe, landmarks

CASTING = Casting()


def covered(inside: int, trials: int, share: float = 0.95) -> bool:
    """Whether `inside` of `trials` is what intervals of 95 % may give: not less than by one chance in ten thousand."""
    chances = (math.comb(trials, k) * share**k * (1 - share) ** (trials - k) for k in range(inside + 1))
    return sum(chances) > 1e-4


def sample(values: NDArray[np.float64], people: NDArray[np.int64]) -> Sample:
    return Sample(values, people, np.arange(len(values)))


def test_intervals_contain_the_truth_as_often_as_they_say() -> None:
    """200 experiments of 40 people with 6 pictures each: 95 % intervals over people contain the mean of all people."""
    rng, people = np.random.default_rng(0), np.repeat(np.arange(40), 6)
    inside = 0
    for trial in range(200):
        values = 0.3 + np.repeat(rng.normal(0, 0.2, 40), 6) + rng.normal(0, 0.1, 240)
        found = estimate(sample(values, people), seed=trial)
        assert found.mean == pytest.approx(values.mean()) and found.low < found.mean < found.high
        inside += found.low <= 0.3 <= found.high
    assert covered(inside, 200, 0.93)  # a bootstrap over 40 is a little narrow


def test_what_is_of_a_picture_counts_once_however_many_people_are_in_it() -> None:
    """Three persons of a picture share its fate: intervals over people alone would be too narrow by half."""
    rng, inside = np.random.default_rng(3), 0
    for trial in range(200):
        pictures = np.repeat(np.arange(100), 3)
        people = np.concatenate([rng.choice(40, 3, replace=False) for _ in range(100)])
        values = np.repeat(rng.normal(0, 1, 100), 3)
        found = estimate(Sample(values, people, pictures), seed=trial)
        inside += found.low <= 0 <= found.high
    assert covered(inside, 200, 0.93)


def test_pairs_are_told_apart_where_means_are_not() -> None:
    rng, people = np.random.default_rng(1), np.repeat(np.arange(30), 4)
    base = np.repeat(rng.normal(0, 1, 30), 4)
    better = base + 0.05 + rng.normal(0, 0.02, 120)
    gain = estimate(sample(better, people) - sample(base, people))
    assert gain.low > 0 and gain.mean == pytest.approx(0.05, abs=0.01)
    assert estimate(sample(better, people)).low < estimate(sample(base, people)).mean  # alone, their intervals overlap
    assert ratio(sample(2 * base + 8, people), sample(base + 4, people)).mean == pytest.approx(2)
    holes = better.copy()
    holes[::7] = np.nan
    assert np.isfinite(estimate(sample(holes, people)).high)
    assert np.isnan(estimate(sample(np.full(120, np.nan), people)).mean)


def test_shares_of_other_pictures_of_the_same_people() -> None:
    """People differ and one is missing below: the ratio of means, with an interval around it."""
    rng = np.random.default_rng(5)
    people, more = np.repeat(np.arange(40), 3), np.repeat(np.arange(39), 5)
    level = rng.uniform(0.5, 1, 40)
    found = ratio(sample(0.9 * level[people], people), sample(level[more], more))
    assert found.low < 0.9 < found.high and found.high - found.low < 0.15


def test_frechet_is_the_formula_for_known_normals() -> None:
    rng = np.random.default_rng(2)
    one, other = rng.normal(0, 1, (40000, 3)), rng.normal(0, 2, (40000, 3)) + (3, 0, 0)
    assert frechet(one, one) == pytest.approx(0, abs=1e-9)
    assert frechet(one, other) == pytest.approx(9 + 3 * (2 - 1) ** 2, rel=0.03)


def test_the_kernel_distance_is_its_definition() -> None:
    rng = np.random.default_rng(10)
    one, other, truth = (rng.normal(0, 1 + 0.1 * place, (30, 4)) for place in range(3))

    def squared(x: NDArray[np.float64]) -> float:
        pairs = [(x[i] @ x[j] / 4 + 1) ** 3 for i in range(30) for j in range(30) if i != j]
        return float(np.mean(pairs) - 2 * np.mean([(a @ b / 4 + 1) ** 3 for a in x for b in truth]))

    found = kernel_difference(one, other, truth, np.repeat(np.arange(10), 3))
    assert found.mean == pytest.approx(squared(one) - squared(other))
    assert found.low < found.mean < found.high


def test_models_of_one_law_are_not_told_apart() -> None:
    """In 128 dimensions, one of them following the cases much more closely than the other: zero lies inside."""
    rng, people, inside = np.random.default_rng(11), np.repeat(np.arange(40), 5), 0
    for _ in range(60):
        cases, truth = rng.normal(0, 1, (200, 128)), rng.normal(0, 1, (200, 128))
        close, loose = (r * cases + np.sqrt(1 - r * r) * rng.normal(0, 1, cases.shape) for r in (0.95, 0.3))
        found = kernel_difference(close, loose, truth, people)
        inside += found.low <= 0 <= found.high
    assert covered(inside, 60, 0.93)
    far = kernel_difference(cases * 1.3, loose, truth, people)
    assert 0 < far.low < far.mean < far.high


def judgement(rng: np.random.Generator, persons: int = 1, **means: float) -> Judgement:
    """Of 40 pictures of 20 people; every measure 0.5 where no other mean is given."""
    people, pictures = np.tile(np.arange(20.0), 2 * persons), np.repeat(np.arange(40.0), persons)
    values = {name: means.get(name, 0.5) + rng.normal(0, 0.02, len(people)) for name in MEASURES}
    return Judgement(people, pictures, values, rng.normal(0, 1, (40, 4)))


def test_leads_that_grow_as_faces_shrink() -> None:
    rng = np.random.default_rng(6)
    rows = {"full": 0.8, "same": 0.7, "worse": 0.7}
    large = {name: judgement(rng, similarity=mean) for name, mean in rows.items()}
    small = {name: judgement(rng, similarity=rows[name] - (name == "worse") * 0.3) for name in rows}
    told = between({"table3-8": large, "table3-4": small})
    assert list(told) == ["table3-growth"]
    grown = {name: told["table3-growth"]["rows"][name]["similarity"] for name in ("worse", "same")}
    assert grown["worse"][0] == pytest.approx(0.3, abs=0.03) and grown["worse"][1] > 0.25
    assert abs(grown["same"][0]) < 0.03


def test_three_people_over_one() -> None:
    rng = np.random.default_rng(7)
    one = {name: judgement(rng, rank1=0.8) for name in ("full", CEILING)}
    three = {name: judgement(rng, 3, rank1=0.4 if name == "full" else 0.8) for name in ("full", CEILING)}
    told = between({"persons-1-apart": one, "persons-3-apart": three})["persons-kept"]["rows"]
    assert told["full"]["rank1"][0] == pytest.approx(0.5, abs=0.02)
    assert told[CEILING]["rank1"][0] == pytest.approx(1, abs=0.02)


MADE = {
    "steps": 9, "guidance_scale": 3.0, "id_guidance_scale": 2.0, "subject_conditioning_ratio": 0.8,
    "backend": {"name": "onnxruntime", "device": "cpu", "precision": "fp32"},
    "training": {"steps": 7, "batch_size": 5}, "versions": {"torch": "1"},
}  # fmt: skip


def test_the_report_shows_every_table_and_what_is_certain(tmp_path: Path) -> None:
    """Differences whose interval leaves zero out are in bold, others are not; curves where there are several places."""
    rng = np.random.default_rng(8)
    for name in ("table2-small", "table3-8", "table3-4"):
        full, noise = judgement(rng, iou=0.9), np.repeat([1e-3, -1e-3], 20)
        worse = {key: value + noise - 0.4 * (key == "iou") for key, value in full.values.items()}
        twin = Judgement(full.people, full.pictures, worse, full.features)
        rows = {CEILING: judgement(rng), "full": full, "uncropped twin": twin}
        told = table(EXPERIMENTS[name], rows, 40, rng.normal(0, 1, (40, 4)))
        (tmp_path / f"{name}.json").write_text(
            json.dumps({**told, "made": MADE, "left_out": {"a row": "for a reason"}})
        )
    write_report(tmp_path)
    page = (tmp_path / "README.md").read_text()
    assert page.count("9 steps of DDIM, λt 3.0") == 1 and "7 steps of 5" in page and "onnxruntime on cpu" in page
    assert page.count("| uncropped twin |") == 9 and page.count("Left out: a row, for a reason.") == 3
    assert "**-0.4" in page and "(sizes.png)" in page and "persons.png" not in page
    minus = [line for line in page.splitlines() if line.startswith("| uncropped twin | ") and "[" in line]
    assert len(minus) == 3 and all(line.count("**") == 2 for line in minus)
    with Image.open(tmp_path / "sizes.png") as plot:
        assert plot.width > 3 * 300 and len(plot.convert("RGB").getcolors(2**24)) > 20
    # tables that were made otherwise say so, each
    other = json.loads((tmp_path / "table3-4.json").read_text()) | {"made": {**MADE, "steps": 4}}
    (tmp_path / "table3-4.json").write_text(json.dumps(other))
    write_report(tmp_path)
    page = (tmp_path / "README.md").read_text()
    assert page.count("9 steps of DDIM") == 2 and page.count("4 steps of DDIM") == 1
    (tmp_path / "table3-8.json").write_text("[]")
    with pytest.raises(RequestError, match="table3-8.json is no table of this version"):
        write_report(tmp_path)


def test_cases_are_what_is_asked_for() -> None:
    cases = CASTING.table("small", identities=2, count=12)
    assert len(cases) == 12 and [case.identities[0] for case in cases] == [0, 1] * 6
    assert len({case.seed for case in cases}) == 12 and len({case.scene.caption for case in cases}) == 7
    low, high = SIZES["small"]
    for case in cases:
        side = (case.picture.boxes[0, 2] - case.picture.boxes[0, 0]) / 128
        assert low - 1 / 32 <= side <= high + 1 / 32
        assert describe(case.scene.caption).hats == (None,)
        assert case.crops[0].shape == (64, 64, 3) and case.scene.actors[0].identity.name[0] == "unseen"
    assert len(set(one_person_captions(35))) == 35
    again = CASTING.table("small", identities=2, count=8)[7]
    assert np.array_equal(again.picture.rgb, cases[7].picture.rgb) and np.array_equal(again.crops[0], cases[7].crops[0])
    pair = CASTING.groups(2, 3, (1 / 5, 1 / 4), "overlap", 40)[0]
    boxes = pair.picture.boxes
    assert len(set(pair.identities)) == 2 and boxes[1, 0] < boxes[0, 2]


def test_every_person_meets_every_caption_equally_often() -> None:
    """Of the full table, without drawing it: 40 people, 35 captions, twice."""
    casting = Casting()
    object.__setattr__(casting, "case", lambda number, who, caption, face: (*who, caption))
    met = Counter(casting.table("regular", 40, 2800))
    assert len(met) == 40 * 35 and set(met.values()) == {2}
    some = Counter(caption for _, caption in casting.table("regular", 40, 400))
    assert len(some) == 35


def test_the_like_and_the_unlike_of_a_case() -> None:
    case = CASTING.case(5, (3, 7), None, (1 / 5, 1 / 4))
    again, other = CASTING.again(case), CASTING.somebody_else(case)
    assert len(again.boxes) == 2 and not np.array_equal(again.rgb, case.picture.rgb)
    assert np.array_equal(other.boxes, case.picture.boxes)
    assert np.abs(other.landmarks - case.picture.landmarks).mean() > 0.02
    assert not np.array_equal(other.color("neck", 0), case.picture.color("neck", 0))


def test_a_face_found_counts_for_one_box() -> None:
    asked = np.array([(0, 0, 10, 10), (4, 0, 14, 10), (50, 50, 60, 60)], float)
    first, second, third = match(asked, [(3.0, 0.0, 13.0, 10.0), (90.0, 90.0, 99.0, 99.0)])
    assert second[0] == pytest.approx(9 / 11) and second[1] == (3.0, 0.0, 13.0, 10.0)
    assert first == third == (0.0, None)


def test_colours_under_the_face_are_checked_where_the_truth_shows_them() -> None:
    case = CASTING.case(3, (5,), "a person in a red shirt in the park", (1 / 3, 1 / 3))
    rgb = case.picture.rgb
    assert right_color(case, 0, rgb, "shirt") == right_color(case, 0, rgb, "neck") == 1.0
    bluish = rgb[..., ::-1].copy()
    assert right_color(case, 0, bluish, "shirt") == 0.0
    assert right_color(case, 0, np.roll(rgb, 64, axis=1), "shirt") == 0.0


def test_readouts_follow_the_face() -> None:
    world = CASTING.world
    factors = world.identity(3).factors[None]
    pose = np.zeros((1, 9))
    wide = pose.copy()
    wide[0, list(POSE).index("mouth")] = 1.0
    points, opened = landmarks(factors, pose)[0][list(POINTS)], landmarks(factors, wide)[0][list(POINTS)]
    assert mouth_opening(opened) > mouth_opening(points) + 0.02
    assert brow_height(points) == pytest.approx(brow_height(opened), abs=0.02)


def test_a_detector_gives_every_face_once() -> None:
    """A map in which two faces are marked by nine cells each, and a faint third."""
    told = torch.full((1, 5, 32, 32), -8.0)
    for row, column, logit in ((10, 8, 3.0), (20, 24, 2.0), (5, 28, -1.5)):
        for dy in (-1, 0, 1):
            for dx in (-1, 0, 1):
                told[0, 0, row + dy, column + dx] = logit - 0.1 * (abs(dx) + abs(dy))
                told[0, 1:, row + dy, column + dx] = torch.tensor([4 + dx, 4 + dy, 4 - dx, 4 - dy]).float()
    detector = Detector()
    detector.forward = lambda pictures: told  # type: ignore[method-assign]
    [found] = detector.boxes(torch.zeros(1, 3, 128, 128))
    assert [round(box[1]) for box in found] == [18, 82] and found[0][0] > found[1][0]
    assert overlap((0, 0, 10, 10), (5, 0, 15, 10)) == pytest.approx(1 / 3)


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Judges that know nothing: every number has its form."""
    folder = tmp_path_factory.mktemp("judges")
    for name, kind in JUDGES.items():
        torch.manual_seed(0)
        save_file({key: value.half() for key, value in kind().state_dict().items()}, folder / f"{name}.safetensors")
    return folder


def test_judges_see_truth_and_galleries(untrained: Path) -> None:
    """Who is compared with whom, and what counts once."""
    judges = Judges(untrained, CASTING)
    cases = [CASTING.case(1, (0,)), CASTING.case(2, (1, 2), None, (1 / 6, 1 / 5))]
    told = judges.judge(cases, np.stack([case.picture.rgb for case in cases]))
    assert set(told.values) == set(MEASURES) and all(column.shape == (3,) for column in told.values.values())
    assert told.features.shape == (2, 128) and told.people.tolist() == [0, 1, 2] and told.pictures.tolist() == [1, 2, 2]
    assert told.first_people.tolist() == [0, 1]
    assert (np.abs(told.values["similarity"]) <= 1 + 1e-6).all() and set(told.values["rank1"]) <= {0.0, 1.0}
    assert np.isfinite(told.values["text"]).tolist() == [True, True, False]
    assert np.isfinite(told.values["neighbour"]).tolist() == [False, True, True]
    others = judges._distractors(0, (0,))
    assert len(others) == 8 and all(np.linalg.norm(other) == pytest.approx(1) for other in others)
    assert not any(np.allclose(other, judges._gallery(0)) for other in others)
    assert not np.allclose(judges._gallery(0), judges._gallery(0, 1))
    assert face_crop(cases[0].picture.rgb, cases[0].picture.boxes[0]).shape == (48, 48, 3)


def test_what_the_judges_cannot_see_is_refused(untrained: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="know pictures of 128 px, these are of 256 px"):
        Judges(untrained, Casting(size_px=256))
    with pytest.raises(CheckpointError, match="recogniser.safetensors is missing"):
        Judges(tmp_path, CASTING)
    for path in untrained.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes()[:-7])
    with pytest.raises(CheckpointError, match="holds no recogniser of this version"):
        Judges(tmp_path, CASTING)


@pytest.mark.parametrize("persons", [1, 2])
def test_the_sampler_makes_the_references_pictures(built, persons: int) -> None:
    """Batched, with matrices, in float32: the reference's pictures of every case, to a level of 255."""
    checkpoint = Checkpoint.open(built["x4"].checkpoint)
    reference, steps = Reference(checkpoint), 3
    cases = [CASTING.case(number, tuple(range(number, number + persons)), None, (1 / 6, 1 / 5)) for number in (4, 9)]
    made = Sampler(checkpoint, steps=steps).make(cases, "test")
    for case, picture in zip(cases, made, strict=True):
        people = [
            ReferencePerson(
                torch.from_numpy(pose_image(points.astype(np.float32), 128)),
                tuple(box),
                torch.from_numpy(id_pixels(crop, checkpoint.image_mean, checkpoint.image_std)),
            )
            for points, box, crop in zip(case.picture.landmarks, case.picture.boxes, case.crops, strict=True)
        ]
        latents = reference.generate(
            case.scene.caption, people, torch.from_numpy(initial_noise(case.seed, (4, 32, 32)))[None],
            num_inference_steps=steps, subject_conditioning_ratio=checkpoint.config.subject_conditioning_ratio,
        )  # fmt: skip
        true = ((reference.decode(latents)[0].clamp(-1, 1) + 1) * 127.5).permute(1, 2, 0).numpy()
        assert np.abs(picture - true).max() < 1.0


def test_an_engine_makes_the_samplers_pictures(built) -> None:
    """What the tables are about is what users run."""
    cases = [CASTING.case(number, (number,)) for number in (2, 3)]
    with Engine.load(built["x4"].engine, backend="onnxruntime", device="cpu") as engine:
        one = EngineContender(engine, steps=3, batch=2).make(cases, "engine")
    other = Sampler(Checkpoint.open(built["x4"].checkpoint), steps=3).make(cases, "sampler")
    assert np.abs(one.astype(int) - other).max() <= 1


def test_truth_is_the_worlds_and_its_ceiling_the_vaes(built) -> None:
    cases = [CASTING.case(number, (number,)) for number in (2, 3)]
    assert np.array_equal(Truth().make(cases, "truth")[1], cases[1].picture.rgb)
    assert Truth(Checkpoint.open(built["x4"].checkpoint)).make(cases, "vae").shape == (2, 128, 128, 3)


def test_the_command_makes_tables_and_makes_no_picture_twice(
    built, untrained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache, out = tmp_path / "cache", tmp_path / "results"
    arguments = [
        "--engine", str(built["x4"].engine), "--checkpoint", str(built["x4"].checkpoint), "--judges", str(untrained),
        "--pictures", "4", "--steps", "2", "--backend", "onnxruntime", "--device", "cpu", "--cache", str(cache),
        "--runs", str(tmp_path), "--out", str(out), "--json",
    ]  # fmt: skip
    assert main([*arguments, "--experiment", "table2-small", "--experiment", "placement"]) == 0
    told = capsys.readouterr()
    tables = json.loads(told.out.splitlines()[-1])["tables"]
    rows = tables["table2-small"]["rows"]
    assert list(rows) == ["true renders", CEILING, FLOOR, "full", "without local branch", "without global branch"]
    assert "retrained is left out" in told.err and "| full |" in told.err
    assert list(tables["table2-small"]["left_out"]) == [f"without {b} branch, retrained" for b in ("local", "global")]
    assert rows["true renders"]["means"]["neck"] == [1.0, 1.0, 1.0] and rows["full"]["persons"] == 4
    assert (
        rows[CEILING]["of ceiling"]["similarity"] == [1.0, 1.0, 1.0] == rows["true renders"]["of truth"]["similarity"]
    )
    assert rows["without local branch"]["minus full"]["similarity"] != [0.0, 0.0, 0.0]
    assert rows["full"]["frechet"] > 0 and "kid" in rows["without local branch"]["minus full"]
    assert list(tables["placement"]["rows"]) == ["full", "relocate_mode area", "box_snap 16 px"]
    written = json.loads((out / "placement.json").read_text())
    made = written.pop("made")
    assert made["steps"] == 2 and made["backend"]["device"].startswith("cpu") and written == tables["placement"]
    page = (out / "README.md").read_text()
    assert "2 steps of DDIM" in page and "| box_snap 16 px |" in page and "**Branches, small faces" in page
    pictures = {path: path.stat().st_mtime_ns for path in cache.iterdir()}
    loaded = [np.load(path) for path in pictures]
    assert len(pictures) == 9 and all(one.shape == (4, 128, 128, 3) and one.dtype == np.uint8 for one in loaded)
    assert len({one.tobytes() for one in loaded}) == 9  # every row made other pictures
    next(iter(pictures)).write_bytes(b"cut off")  # and what is not whole is made again
    assert main([*arguments, "--experiment", "table2-small", "--experiment", "placement"]) == 0
    assert [np.load(path).tobytes() for path in pictures] == [one.tobytes() for one in loaded]
    again = {path: path.stat().st_mtime_ns for path in cache.iterdir()}
    assert [path for path in pictures if again[path] != pictures[path]] == [next(iter(pictures))]


def test_pictures_made_otherwise_are_other_pictures(built, tmp_path: Path) -> None:
    """Every part of what decides a picture is part of its file's name."""
    checkpoint = Checkpoint.open(built["x4"].checkpoint)

    def named(row: Row, **asked: Any) -> Path:
        told = {
            "engine": built["x4"].engine,
            "checkpoint": checkpoint,
            "device": "cpu",
            "runs": tmp_path,
            "cache": tmp_path,
        }
        studio = Studio(Asked(**(told | asked)), CASTING)
        return studio._path(studio._decides(row), cases)

    cases = [CASTING.case(2, (2,))]
    config = dataclasses.replace(checkpoint.config, guidance_scale=3.25)
    names = [named(Row()), named(Row(), steps=7), named(Row("ceiling")), named(Row("truth"))]
    names += [named(Row(options={"local_scale": 0.0})), named(Row(config={"overlap": "average"}))]
    assert len(set(names)) == len(names) and named(Row()) == names[0]
    with pytest.raises(RequestError, match="another checkpoint than .*: guidance_scale. Build it again"):
        named(Row(), checkpoint=dataclasses.replace(checkpoint, config=config))
    steps = dict(checkpoint.scheduler_config) | {"timestep_spacing": "trailing"}
    with pytest.raises(RequestError, match="another checkpoint than .*: scheduler"):
        named(Row(), checkpoint=dataclasses.replace(checkpoint, scheduler_config=steps))


def test_only_designs_that_were_trained_alike_are_compared(built, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(built["x4"].checkpoint)
    asked = Asked(engine=built["x4"].engine, checkpoint=checkpoint, device="cpu", runs=tmp_path, cache=tmp_path)
    studio, row = Studio(asked, CASTING), Row("uncropped")
    assert "uncropped.safetensors is missing" in studio.cannot(row)
    own = tmp_path / "branches-uncropped"
    (own / "weights").mkdir(parents=True)
    (own / "weights" / "uncropped.safetensors").write_bytes(b"")
    run = {"stage": "branches-uncropped", "steps": 9, "seed": 0, "weights": {"vae": checkpoint.weights_key("vae")}}
    (own / "run.json").write_text(json.dumps(run))
    assert "nothing says that both were trained alike" in studio.cannot(row)
    (tmp_path / "branches").mkdir()
    for full, why in (
        ({**run, "stage": "branches"}, ""),
        ({**run, "steps": 10}, "trained otherwise than the full model (steps)"),
        ({**run, "weights": {"vae": "0"}}, "trained otherwise than the full model (weights)"),
    ):
        (tmp_path / "branches" / "run.json").write_text(json.dumps(full))
        assert why in studio.cannot(row) and bool(why) == bool(studio.cannot(row))
    for name in ("branches", "branches-uncropped"):
        (tmp_path / name / "run.json").write_text(json.dumps({**run, "weights": {"vae": "0"}}))
    assert "trained on another vae" in studio.cannot(row)
    with pytest.raises(CheckpointError, match="is not of this checkpoint"):
        studio.pictures([CASTING.case(2, (2,))], row, "test")


def test_what_cannot_be_evaluated_is_said_first(
    built, untrained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def evaluate(*more: str, engine: str = "x4") -> tuple[int, str]:
        arguments = [
            "--engine",
            str(built[engine].engine),
            "--checkpoint",
            str(built["x4"].checkpoint),
            "--device",
            "cpu",
        ]
        paths = ["--judges", str(untrained), "--cache", str(tmp_path), "--runs", str(tmp_path), "--out", str(tmp_path)]
        return main([*arguments, *paths, *more]), capsys.readouterr().err

    assert "was built from another checkpoint" in evaluate(engine="x8")[1]
    status, said = evaluate("--experiment", "precision")
    assert status == 2 and "precision compares nothing here: no GPU runs the engine" in said
    for flag in ("pictures", "steps", "batch"):
        status, said = evaluate(f"--{flag}", "0")
        assert status == 2 and f"--{flag} is 0, expected at least" in said
    assert not list(tmp_path.iterdir())
