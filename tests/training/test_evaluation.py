"""The evaluation: cases, judges that tell a true render from a wrong one, pictures that are made once, the command."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

from export.checkpoint import Checkpoint
from export.truth.half_reference import half_reference
from export.truth.reference import Reference, ReferencePerson
from realisid_trt import Engine
from realisid_trt.errors import CheckpointError, RequestError
from realisid_trt.loop import samplers
from realisid_trt.loop.noise import initial_noise
from realisid_trt.persons.conditions import id_pixels, pose_image
from training.evaluate import main
from training.evaluation.cases import Case, Casting
from training.evaluation.contenders import EngineContender, Truth
from training.evaluation.experiments import CEILING, FLOOR, Row
from training.evaluation.figures import read_figures
from training.evaluation.measures import (
    MEASURES,
    Judges,
    brow_height,
    face_crop,
    match,
    mouth_opening,
    moved,
    right_color,
)
from training.evaluation.picture_cache import EvaluationOptions, PictureCache
from training.evaluation.sampler import TorchSampler
from training.judges import JUDGES
from training.judges.nets import POINTS, Detector, overlap
from training.result import write_origin
from training.stages.branches import BranchesStage
from training.world import POSE, landmarks

CASTING = Casting()


def test_a_face_found_counts_for_one_box() -> None:
    asked_boxes = np.array([(0, 0, 10, 10), (4, 0, 14, 10), (50, 50, 60, 60)], float)
    first, second, third = match(asked_boxes, [(3.0, 0.0, 13.0, 10.0), (90.0, 90.0, 99.0, 99.0)])
    assert second[0] == pytest.approx(9 / 11) and second[1] == (3.0, 0.0, 13.0, 10.0)
    assert first == (0.0, None)
    assert third == (0.0, (90.0, 90.0, 99.0, 99.0))  # elsewhere, but the nearest of all faces


def test_colours_under_the_face_are_checked_where_the_truth_shows_them() -> None:
    case = CASTING.case(3, (5,), "a person in a red shirt in the park", (1 / 3, 1 / 3))
    rgb = case.picture.rgb
    assert right_color(case, 0, rgb, "shirt") == right_color(case, 0, rgb, "neck") == 1.0
    bluish = rgb[..., ::-1].copy()
    assert right_color(case, 0, bluish, "shirt") == 0.0
    assert right_color(case, 0, np.roll(rgb, 64, axis=1), "shirt") == 0.0


def test_a_person_who_stands_elsewhere_is_looked_at_there() -> None:
    """The same person half as large in another corner: wrong at the requested box, right under the drawn face."""
    case = CASTING.case(3, (5,), "a person in a red shirt in the park", (1 / 3, 1 / 3))
    elsewhere = np.zeros_like(case.picture.rgb)
    elsewhere[:64, 64:] = case.picture.rgb[::2, ::2]
    face = case.picture.boxes[0] / 2 + (64, 0, 64, 0)
    for part in ("neck", "shirt"):
        assert right_color(case, 0, elsewhere, part) == 0.0
        assert right_color(case, 0, elsewhere, part, face) == 1.0
    mask = np.zeros((12, 12), bool)
    mask[2:4, 3:5] = True
    there = np.zeros_like(mask)
    there[4:8, 5:9] = True  # twice as large; x: 3 + 2 (x - 2), y: 4 + 2 (y - 2)
    assert np.array_equal(moved(mask, (2, 2, 6, 6), (3, 4, 11, 12)), there)


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
    """Untrained judges: their numbers have the right form."""
    folder = tmp_path_factory.mktemp("judges")
    for name, kind in JUDGES.items():
        torch.manual_seed(0)
        save_file({key: value.half() for key, value in kind().state_dict().items()}, folder / f"{name}.safetensors")
    return folder


def test_judges_see_truth_and_galleries(untrained: Path) -> None:
    """The comparisons that the judges make, and the values that a picture has once."""
    judges = Judges(untrained, CASTING)
    cases = [CASTING.case(1, (0,)), CASTING.case(2, (1, 2), None, (1 / 6, 1 / 5))]
    told = judges.judge(cases, np.stack([case.picture.rgb for case in cases]))
    assert set(told.values) == set(MEASURES) and all(column.shape == (3,) for column in told.values.values())
    assert told.features.shape == (2, 128) and told.people.tolist() == [0, 1, 2] and told.pictures.tolist() == [1, 2, 2]
    two = dataclasses.replace(told, people=told.people[1:], pictures=told.pictures[1:])
    assert two.cast.tolist() == [[1, 2]]
    assert (np.abs(told.values["similarity"]) <= 1 + 1e-6).all() and set(told.values["rank1"]) <= {0.0, 1.0}
    assert np.isfinite(told.values["text"]).tolist() == [True, True, False]
    assert np.isfinite(told.values["neighbour"]).tolist() == [False, True, True]
    drawn = told.values["drawn"] == 1
    for measure in ("drawn_similarity", "drawn_rank1"):
        assert np.array_equal(np.isfinite(told.values[measure]), drawn)
    others = judges._distractors(0, (0,))
    assert len(others) == 8 and all(np.linalg.norm(other) == pytest.approx(1) for other in others)
    assert not any(np.allclose(other, judges._gallery(0)) for other in others)
    assert not np.allclose(judges._gallery(0), judges._gallery(0, 1))
    assert face_crop(cases[0].picture.rgb, cases[0].picture.boxes[0]).shape == (48, 48, 3)


def test_what_the_judges_cannot_see_is_refused(untrained: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="take pictures of 128 px, these are of 256 px"):
        Judges(untrained, Casting(size_px=256))
    with pytest.raises(CheckpointError, match="recogniser.safetensors is missing"):
        Judges(tmp_path, CASTING)
    for path in untrained.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes()[:-7])
    with pytest.raises(CheckpointError, match="holds no recogniser of this version"):
        Judges(tmp_path, CASTING)


def reference_picture(reference: Reference, case: Case, steps: int) -> NDArray[np.float32]:
    """(128, 128, 3), of 255 levels, not rounded."""
    c = reference.checkpoint
    people = [
        ReferencePerson(
            torch.from_numpy(pose_image(points.astype(np.float32), 128)),
            tuple(box),
            torch.from_numpy(id_pixels(crop, c.image_mean, c.image_std)),
        )
        for points, box, crop in zip(case.picture.landmarks, case.picture.boxes, case.crops, strict=True)
    ]
    latents = reference.generate(
        case.scene.caption, people, torch.from_numpy(initial_noise(case.seed, (4, 32, 32)))[None],
        num_inference_steps=steps, subject_conditioning_ratio=c.config.subject_conditioning_ratio,
    )  # fmt: skip
    pixels = (reference.decode(latents)[0].clamp(-1, 1) + 1) * 127.5
    return np.asarray(pixels.permute(1, 2, 0).numpy())


@pytest.mark.parametrize("persons", [1, 2])
def test_the_sampler_makes_the_references_pictures(built, persons: int) -> None:
    """Batched, with matrices, in float32: the reference's pictures of every case, to a level of 255."""
    checkpoint = Checkpoint.open(built["x4"].checkpoint)
    cases = [CASTING.case(number, tuple(range(number, number + persons)), None, (1 / 6, 1 / 5)) for number in (4, 9)]
    made = TorchSampler(checkpoint, steps=3).make(cases, "test")
    for case, picture in zip(cases, made, strict=True):
        assert np.abs(picture - reference_picture(Reference(checkpoint), case, 3)).max() < 1.0


def test_its_half_precision_is_that_of_a_half_build(built) -> None:
    """It is as far from float32 as the half reference, and not farther from that than both are from float32."""
    checkpoint, case = Checkpoint.open(built["x4"].checkpoint), CASTING.case(4, (4,))
    exact = reference_picture(Reference(checkpoint), case, 3)
    [made] = TorchSampler(checkpoint, steps=3, half=True).make([case], "")
    with half_reference(checkpoint, torch.float16) as reference:
        half = reference_picture(reference, case, 3)
    rounded = [picture.round() for picture in (exact, half)]
    own, theirs, apart = (
        np.abs(a - b).mean() for a, b in ((made, rounded[0]), (rounded[1], rounded[0]), (made, rounded[1]))
    )
    assert 0.5 < own / theirs < 2 and apart < own + theirs


def test_an_engine_makes_the_samplers_pictures(built) -> None:
    """The tables are about the engine that users run."""
    cases = [CASTING.case(number, (number,)) for number in (2, 3)]
    with Engine.load(built["x4"].engine, backend="onnxruntime", device="cpu") as engine:
        one = EngineContender(engine, steps=3, batch=2).make(cases, "engine")
    other = TorchSampler(Checkpoint.open(built["x4"].checkpoint), steps=3).make(cases, "sampler")
    assert np.abs(one.astype(int) - other).max() <= 1


def test_truth_is_the_worlds_and_its_ceiling_the_vaes(built) -> None:
    cases = [CASTING.case(number, (number,)) for number in (2, 3)]
    assert np.array_equal(Truth().make(cases, "truth")[1], cases[1].picture.rgb)
    assert Truth(Checkpoint.open(built["x4"].checkpoint)).make(cases, "vae").shape == (2, 128, 128, 3)


@pytest.mark.slow
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
    next(iter(pictures)).write_bytes(b"cut off")  # a damaged file is made again
    assert main([*arguments, "--experiment", "table2-small", "--experiment", "placement"]) == 0
    assert [np.load(path).tobytes() for path in pictures] == [one.tobytes() for one in loaded]
    again = {path: path.stat().st_mtime_ns for path in cache.iterdir()}
    assert [path for path in pictures if again[path] != pictures[path]] == [next(iter(pictures))]


def test_pictures_made_otherwise_are_other_pictures(built, with_config, tmp_path: Path) -> None:
    """Everything that determines a picture is part of its file's name."""
    checkpoint = Checkpoint.open(built["x4"].checkpoint)

    def named(row: Row, **options: Any) -> Path:
        told = {
            "engine": built["x4"].engine,
            "checkpoint": checkpoint,
            "device": "cpu",
            "runs": tmp_path,
            "cache": tmp_path,
        }
        picture_cache = PictureCache(EvaluationOptions(**(told | options)), CASTING)
        return picture_cache._path(picture_cache._decides(row), cases)

    cases = [CASTING.case(2, (2,))]
    config = dataclasses.replace(checkpoint.config, guidance_scale=3.25)
    names = [named(Row()), named(Row(), steps=7), named(Row("ceiling")), named(Row("truth"))]
    names += [named(Row(options={"local_scale": 0.0})), named(Row(config={"overlap": "average"}))]
    assert len(set(names)) == len(names) and named(Row()) == names[0]
    with pytest.raises(RequestError, match="another checkpoint than .*: guidance_scale. Build it again"):
        named(Row(), checkpoint=dataclasses.replace(checkpoint, config=config))
    steps = dict(checkpoint.scheduler_config) | {"timestep_spacing": "trailing"}
    euler = dataclasses.replace(config, sampler=samplers.Sampler("euler"))
    for other in (
        {"engine": with_config(built["x4"].engine, sampler="euler")},
        {"checkpoint": dataclasses.replace(checkpoint, config=euler)},
    ):
        with pytest.raises(RequestError, match="another checkpoint than .*: .*sampler. Build it again"):
            named(Row(), **other)
    with pytest.raises(RequestError, match="another checkpoint than .*: scheduler"):
        named(Row(), checkpoint=dataclasses.replace(checkpoint, scheduler_config=steps))


def test_only_designs_that_were_trained_alike_are_compared(built, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(built["x4"].checkpoint)
    options = EvaluationOptions(
        engine=built["x4"].engine, checkpoint=checkpoint, device="cpu", runs=tmp_path, cache=tmp_path
    )
    picture_cache, row = PictureCache(options, CASTING), Row("uncropped")
    assert "uncropped.safetensors is missing" in picture_cache.cannot(row)
    own, full = tmp_path / "branches-uncropped", tmp_path / "branches"
    full.mkdir()
    (own / "weights").mkdir(parents=True)
    files = {"uncropped": own / "weights" / "uncropped.safetensors"}
    files["uncropped"].write_bytes(b"")
    parts = {name: checkpoint.components[name].files[0] for name in BranchesStage.writes}
    run = {"batch_size": 4, "seed": 0, "new": True, "weights": {"vae": checkpoint.weights_key("vae")}}

    def trained(folder: Path, step: int, written: dict[str, Path], **other: Any) -> None:
        """The files of a run of 12 steps that was stopped, looked at, or prolonged."""
        (folder / "run.json").write_text(json.dumps({"stage": folder.name, "steps": 12, **run, **other}))
        write_origin(folder, step, written)

    (own / "run.json").write_text(json.dumps(run))
    assert "says that it made these weights" in picture_cache.cannot(row)
    trained(own, 9, files)
    assert "says that it made the full model's weights" in picture_cache.cannot(row)
    for step, other, why in (
        (9, {}, ""),
        (10, {}, "trained otherwise than the full model (steps)"),
        (9, {"weights": {"vae": "0"}}, "trained otherwise than the full model (weights)"),
    ):
        trained(full, step, parts, **other)
        assert why in picture_cache.cannot(row) and bool(why) == bool(picture_cache.cannot(row))
    trained(full, 9, parts)
    assert PictureCache(options, CASTING).made["training"] == {"steps": 9, "batch_size": 4, "seed": 0, "new": True}
    trained(full, 9, {**parts, "id_projection": files["uncropped"]})  # of a run that has gone on since
    assert (
        "the full model's weights" in picture_cache.cannot(row)
        and PictureCache(options, CASTING).made["training"] is None
    )
    for folder, written in ((own, files), (full, parts)):
        trained(folder, 9, written, weights={"vae": "0"})
    assert "trained on another vae" in picture_cache.cannot(row)
    with pytest.raises(CheckpointError, match="is not of this checkpoint"):
        picture_cache.pictures([CASTING.case(2, (2,))], row, "test")


@pytest.fixture
def evaluate(
    built, untrained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str]]:
    """The command with everything in tmp_path: its exit status and its output."""

    def evaluate(*more: str, engine: str = "x4") -> tuple[int, str]:
        made = ["--engine", str(built[engine].engine), "--checkpoint", str(built["x4"].checkpoint), "--device", "cpu"]
        paths = ["--judges", str(untrained), "--cache", str(tmp_path), "--runs", str(tmp_path), "--out", str(tmp_path)]
        return main([*made, *paths, *more]), "".join(capsys.readouterr())

    return evaluate


@pytest.mark.slow
def test_half_precision_and_plain_torch_draw_what_the_engine_draws(evaluate, tmp_path: Path) -> None:
    status, said = evaluate("--experiment", "precision", "--pictures", "2", "--steps", "2")
    assert status == 0 and "the engine in float32 is left out, no GPU runs the engine" in said
    table = json.loads((tmp_path / "precision.json").read_text())
    assert set(table["rows"]) == {"full", "plain torch, float32", "plain torch, float16"}
    exact, half = table["levels"]["plain torch, float32"], table["levels"]["plain torch, float16"]
    assert exact[1] < 0.02 < half[0] <= half[1] < 1
    assert f"float16: {half[0]:.2f} of 255 levels away" in (tmp_path / "README.md").read_text()
    figures = read_figures(tmp_path / "precision.npz")
    assert list(figures.values) == list(table["rows"]) and len(figures.pictures) == 2
    for row, values in table["rows"].items():
        assert values["means"]["similarity"][0] == pytest.approx(figures.values[row]["similarity"].mean(), abs=1e-5)


def test_what_cannot_be_evaluated_is_said_first(evaluate, tmp_path: Path) -> None:
    assert "was built from another checkpoint" in evaluate(engine="x8")[1]
    for flag in ("pictures", "steps", "batch"):
        status, said = evaluate(f"--{flag}", "0")
        assert status == 2 and f"--{flag} is 0, expected at least" in said
    assert not list(tmp_path.iterdir())
