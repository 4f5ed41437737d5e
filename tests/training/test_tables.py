"""From values to a page: intervals that contain what they should, tables and plots that show what is certain."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from realisid_trt.errors import RequestError
from training.evaluation.experiments import CEILING, EXPERIMENTS
from training.evaluation.measures import MEASURES, Judgement
from training.evaluation.report import write_report
from training.evaluation.statistics import Sample, estimate, frechet, kernel_difference, ratio
from training.evaluation.tables import between, table

TRIALS = 600


def covered(inside: int, share: float, trials: int = TRIALS) -> bool:
    """Whether intervals that hold the truth with this chance hold it `inside` times of so many, but for one chance in
    ten thousand on either side."""
    chances = [math.comb(trials, k) * share**k * (1 - share) ** (trials - k) for k in range(trials + 1)]
    return sum(chances[: inside + 1]) > 1e-4 and sum(chances[inside:]) > 1e-4


def sample(values: NDArray[np.float64], people: NDArray[np.int64]) -> Sample:
    return Sample(values, people, np.arange(len(values)))


def test_intervals_contain_the_truth_as_often_as_they_say() -> None:
    """40 people with 6 pictures each: intervals over people contain the mean of all people.

    The percentiles of resampled means lie 1.96·√(39/40) standard errors away, and Student's t of 39 is within that
    94.0 % of the time.
    """
    rng, people = np.random.default_rng(0), np.repeat(np.arange(40), 6)
    inside = 0
    for trial in range(TRIALS):
        values = 0.3 + np.repeat(rng.normal(0, 0.2, 40), 6) + rng.normal(0, 0.1, 240)
        found = estimate(sample(values, people), seed=trial)
        assert found.mean == pytest.approx(values.mean()) and found.low < found.mean < found.high
        inside += found.low <= 0.3 <= found.high
    assert covered(inside, 0.940)


def test_what_is_of_a_picture_counts_once_however_many_people_are_in_it() -> None:
    """Three persons of a picture share its fate: intervals over people alone would be too narrow by half.

    100 pictures: Student's t of 99 is within 1.96·√(99/100) in 94.7 % of the time.
    """
    rng, inside = np.random.default_rng(3), 0
    for trial in range(TRIALS):
        pictures = np.repeat(np.arange(100), 3)
        people = np.concatenate([rng.choice(40, 3, replace=False) for _ in range(100)])
        values = np.repeat(rng.normal(0, 1, 100), 3)
        found = estimate(Sample(values, people, pictures), seed=trial)
        inside += found.low <= 0 <= found.high
    assert covered(inside, 0.947)


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
    for _ in range(trials := 60):
        cases, truth = rng.normal(0, 1, (200, 128)), rng.normal(0, 1, (200, 128))
        close, loose = (r * cases + np.sqrt(1 - r * r) * rng.normal(0, 1, cases.shape) for r in (0.95, 0.3))
        found = kernel_difference(close, loose, truth, people)
        inside += found.low <= 0 <= found.high
    assert covered(inside, 0.943, trials)  # Student's t of 39 within 1.96 standard errors
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
    "training": {"steps": 7, "batch_size": 5, "new": False}, "versions": {"torch": "1"},
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
    assert (
        page.count("9 steps of DDIM, λt 3.0") == 1
        and "7 steps of 5, after an earlier" in page
        and "onnxruntime on cpu" in page
    )
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
