"""The evaluation: intervals that contain what they should, and judges that tell a true render from a wrong one."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from export.checkpoint import Checkpoint
from export.reference import Reference, ReferencePerson
from realisid_trt import Engine
from realisid_trt.conditions import id_pixels, pose_image
from realisid_trt.ddim import initial_noise
from training.evaluate import main
from training.evaluation.cases import SIZES, Casting, one_person_captions
from training.evaluation.contenders import EngineContender, Truth
from training.evaluation.experiments import CEILING, EXPERIMENTS
from training.evaluation.measures import Judgement, Judges, brow_height, face_crop, mouth_opening, right_color
from training.evaluation.report import write_report
from training.evaluation.sampler import Sampler
from training.evaluation.statistics import difference, estimate, frechet, frechet_difference, ratio
from training.evaluation.tables import MEASURES, between, table
from training.judges import JUDGES
from training.judges.nets import POINTS, Detector, overlap
from training.world import POSE, describe, landmarks

CASTING = Casting()


def test_intervals_contain_the_truth_as_often_as_they_say() -> None:
    """200 experiments of 20 people with 6 pictures each: 95 % intervals over people contain the mean of all people."""
    rng, groups = np.random.default_rng(0), np.repeat(np.arange(20), 6)
    inside = 0
    for trial in range(200):
        values = 0.3 + np.repeat(rng.normal(0, 0.2, 20), 6) + rng.normal(0, 0.1, 120)
        found = estimate(values, groups, seed=trial)
        assert found.mean == pytest.approx(values.mean()) and found.low < found.mean < found.high
        inside += found.low <= 0.3 <= found.high
    assert 176 <= inside <= 198  # a bootstrap over 20 is a little narrow; 95 % would be 190


def test_pairs_are_told_apart_where_means_are_not() -> None:
    rng, groups = np.random.default_rng(1), np.repeat(np.arange(30), 4)
    base = np.repeat(rng.normal(0, 1, 30), 4)
    better = base + 0.05 + rng.normal(0, 0.02, 120)
    gain = difference(better, base, groups)
    assert gain.low > 0 and gain.mean == pytest.approx(0.05, abs=0.01)
    assert estimate(better, groups).low < estimate(base, groups).mean  # alone, their intervals overlap
    assert ratio(2 * base + 8, base + 4, groups).mean == pytest.approx(2)
    holes = better.copy()
    holes[::7] = np.nan
    assert np.isfinite(estimate(holes, groups).mean)


def test_frechet_is_the_formula_for_known_normals() -> None:
    rng = np.random.default_rng(2)
    one, other = rng.normal(0, 1, (40000, 3)), rng.normal(0, 2, (40000, 3)) + (3, 0, 0)
    assert frechet(one, one) == pytest.approx(0, abs=1e-9)
    assert frechet(one, other) == pytest.approx(9 + 3 * (2 - 1) ** 2, rel=0.03)


def test_shares_of_other_pictures_of_the_same_people() -> None:
    """People differ and one person is missing below: the ratio of means, with an interval around it."""
    rng = np.random.default_rng(5)
    people, more = np.repeat(np.arange(40), 3), np.repeat(np.arange(39), 5)
    level = rng.uniform(0.5, 1, 40)
    found = ratio(0.9 * level[people], level[more], people, more)
    assert found.low < 0.9 < found.high and found.high - found.low < 0.1
    assert ratio(level[people], level[people], people) == ratio(level[people], level[people], people, people)


def judgement(rng: np.random.Generator, persons: int = 1, **means: float) -> Judgement:
    """Of 40 pictures of 20 people; every measure 0.5 where no other mean is given."""
    people = np.tile(np.arange(20), 2 * persons).astype(float)
    values = {name: means.get(name, 0.5) + rng.normal(0, 0.02, len(people)) for name in MEASURES}
    return Judgement({"identity": people, **values}, rng.normal(0, 1, (40, 4)))


def test_leads_that_grow_as_faces_shrink() -> None:
    rng = np.random.default_rng(6)
    rows = {"full": 0.8, "same": 0.7, "worse": 0.7}
    large = {name: judgement(rng, similarity=mean) for name, mean in rows.items()}
    small = {name: judgement(rng, similarity=rows[name] - (name == "worse") * 0.3) for name in rows}
    told = between({"table3-8": large, "table3-4": small})
    assert list(told) == ["table3-growth"]
    grown, level = told["table3-growth"]["worse"]["similarity"], told["table3-growth"]["same"]["similarity"]
    assert grown[0] == pytest.approx(0.3, abs=0.02) and grown[1] > 0.25
    assert level[1] < 0 < level[2]


def test_three_people_over_one() -> None:
    rng = np.random.default_rng(7)
    one = {name: judgement(rng, rank1=0.8) for name in ("full", CEILING)}
    three = {name: judgement(rng, 3, rank1=0.4 if name == "full" else 0.8) for name in ("full", CEILING)}
    told = between({"persons-1-apart": one, "persons-3-apart": three})["persons-kept"]
    assert told["full"]["rank1"][0] == pytest.approx(0.5, abs=0.02)
    assert told[CEILING]["rank1"][0] == pytest.approx(1, abs=0.02)


def test_the_report_shows_every_table_and_what_is_certain(tmp_path: Path) -> None:
    """Differences whose interval leaves zero out are in bold, others are not; curves where there are several places."""
    rng = np.random.default_rng(8)
    made = {"steps": 9, "guidance_scale": 3.0, "id_guidance_scale": 2.0, "subject_conditioning_ratio": 0.8,
            "backend": "auto", "versions": {"torch": "1"}}  # fmt: skip
    for name in ("table2-small", "table3-8", "table3-4"):
        full, noise = judgement(rng, iou=0.9), 1e-3 * rng.choice([-1, 1], 40)
        worse = {key: full.values[key] + noise * (key != "identity") - 0.4 * (key == "iou") for key in full.values}
        rows = {CEILING: judgement(rng), "full": full, "uncropped twin": Judgement(worse, full.features)}
        told = {**table(EXPERIMENTS[name], rows, 40), "made": made}
        (tmp_path / f"{name}.json").write_text(json.dumps(told))
    write_report(tmp_path)
    page = (tmp_path / "README.md").read_text()
    assert "9 steps of DDIM, λt 3.0" in page and page.count("| uncropped twin |") == 6
    assert "**-0.4" in page and "(sizes.png)" in page and "persons.png" not in page
    minus = [line for line in page.splitlines() if line.startswith("| uncropped twin | ") and "[" in line]
    assert len(minus) == 3 and all(line.count("**") == 2 for line in minus)
    with Image.open(tmp_path / "sizes.png") as plot:
        assert plot.width > 3 * 300 and len(plot.convert("RGB").getcolors(2**24)) > 20


def test_who_is_nearer_to_the_truth_is_said_with_an_interval() -> None:
    """Features with more noise are farther away; against itself nothing is nearer."""
    rng = np.random.default_rng(4)
    truth = rng.normal(0, 1, (400, 4))
    near, far = truth + rng.normal(0, 0.1, truth.shape), truth + rng.normal(0, 1.5, truth.shape)
    gain = frechet_difference(far, near, truth)
    assert 0 < gain.low < gain.mean < gain.high
    assert frechet_difference(near, near, truth).mean == 0


def test_cases_are_what_is_asked_for() -> None:
    cases = CASTING.table("small", identities=2, prompts=3, images=2)
    assert len(cases) == 12 and [case.identities[0] for case in cases] == [0] * 6 + [1] * 6
    assert len({case.seed for case in cases}) == 12
    low, high = SIZES["small"]
    for case in cases:
        side = (case.picture.boxes[0, 2] - case.picture.boxes[0, 0]) / 128
        assert low - 1 / 32 <= side <= high + 1 / 32
        assert describe(case.scene.caption).hats == (None,)
        assert case.crops[0].shape == (64, 64, 3) and case.scene.actors[0].identity.name[0] == "unseen"
    assert len(set(one_person_captions(35))) == 35
    again = CASTING.table("small", identities=2, prompts=3, images=2)[7]
    assert np.array_equal(again.picture.rgb, cases[7].picture.rgb) and np.array_equal(again.crops[0], cases[7].crops[0])
    pair = CASTING.groups(2, 3, (1 / 5, 1 / 4), "overlap", 40)[0]
    boxes = pair.picture.boxes
    assert len(set(pair.identities)) == 2 and boxes[1, 0] < boxes[0, 2]


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
    """Who is compared with whom does not hang on the pictures."""
    judges = Judges(untrained, CASTING)
    cases = [CASTING.case(1, (0,)), CASTING.case(2, (1, 2), None, (1 / 6, 1 / 5))]
    told = judges.judge(cases, np.stack([case.picture.rgb for case in cases]))
    assert all(column.shape == (3,) for column in told.values.values()) and told.features.shape == (2, 128)
    assert told.values["identity"].tolist() == [0, 1, 2]
    assert (np.abs(told.values["similarity"]) <= 1 + 1e-6).all() and set(told.values["rank1"]) <= {0.0, 1.0}
    assert np.array_equal(told.values["neck"], np.ones(3)) and np.array_equal(told.values["shirt"], np.ones(3))
    others = judges._distractors(0, (0,))
    assert len(others) == 8 and all(np.linalg.norm(other) == pytest.approx(1) for other in others)
    assert face_crop(cases[0].picture.rgb, cases[0].picture.boxes[0]).shape == (48, 48, 3)


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


def test_the_command_makes_a_table_and_makes_no_picture_twice(
    built, untrained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "--engine", str(built["x4"].engine), "--checkpoint", str(built["x4"].checkpoint), "--judges", str(untrained),
        "--pictures", "4", "--steps", "2", "--backend", "onnxruntime", "--cache", str(tmp_path / "cache"),
        "--runs", str(tmp_path), "--out", str(tmp_path / "results"), "--json",
    ]  # fmt: skip
    assert main([*arguments, "--experiment", "table2-small", "--experiment", "placement"]) == 0
    told = capsys.readouterr()
    tables = json.loads(told.out.splitlines()[-1])["tables"]
    rows = tables["table2-small"]["rows"]
    assert list(rows) == ["true renders", CEILING, "full", "without local branch", "without global branch"]
    assert "retrained is left out" in told.err and "| full |" in told.err
    assert rows["true renders"]["means"]["neck"] == [1.0, 1.0, 1.0] and rows["full"]["persons"] == 4
    assert rows[CEILING]["of ceiling"]["similarity"] == [1.0, 1.0, 1.0]
    assert rows["without local branch"]["minus full"]["similarity"] != [0.0, 0.0, 0.0]
    assert rows["full"]["frechet"] > 0 and "frechet" in rows["without local branch"]["minus full"]
    assert list(tables["placement"]["rows"]) == ["full", "relocate_mode area", "box_snap 16 px"]
    written = json.loads((tmp_path / "results" / "placement.json").read_text())
    assert written.pop("made")["steps"] == 2 and written == tables["placement"]
    page = (tmp_path / "results" / "README.md").read_text()
    assert "2 steps of DDIM" in page and "| box_snap 16 px |" in page and "**Branches, small faces" in page
    assert main([*arguments, "--experiment", "precision"]) == 0
    told = capsys.readouterr()
    assert "float32 is left out, no GPU" in told.err
    assert not json.loads(told.out.splitlines()[-1])["tables"]  # one row compares nothing
    pictures = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()}
    assert len(pictures) == 8
    loaded = [np.load(path) for path in pictures]
    assert all(one.shape == (4, 128, 128, 3) and one.dtype == np.uint8 for one in loaded)
    assert len({one.tobytes() for one in loaded}) == 8  # every row made other pictures
    assert main([*arguments, "--experiment", "placement"]) == 0
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()} == pictures
    capsys.readouterr()
    other = [str(built["x8"].engine) if argument == str(built["x4"].engine) else argument for argument in arguments]
    assert main(other) == 2 and "was built from another checkpoint" in capsys.readouterr().err
    assert main([*arguments, "--pictures", "0"]) == 2 and "--pictures is 0" in capsys.readouterr().err
