"""From values to a page: intervals contain the truth as often as stated; tables and plots show sure differences."""

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
from training.evaluation.figures import read_figures, write_figures
from training.evaluation.measures import MEASURES, Judgement
from training.evaluation.report import write_report
from training.evaluation.tables import between, table
from training.statistics import METHOD, Sample, estimate, frechet, kernel_difference, ratio, surely

TRIALS = 2000
LEAST = 0.93  # of intervals that are stated as 95 %

# (deviation of people, of pictures, of single values); coverage of a mean of 133 pictures with three of 40 people each,
# of a mean of 400 pictures with one each, and of the ratio of two such means of 133 pictures: 2000 data sets, seed 0.
EFFECTS = {
    "both": ((0.09, 0.16, 0.15), (0.9510, 0.9450, 0.9520)),
    "people": ((0.3, 0, 0.3), (0.9475, 0.9425, 0.9690)),
    "pictures": ((0, 0.3, 0.3), (0.9560, 0.9540, 0.9540)),
    "neither": ((0, 0, 0.3), (0.9695, 0.9655, 0.9645)),
}


def covered(inside: int, share: float, trials: int) -> bool:
    """Whether `inside` of `trials` intervals may hold the truth, if each does with the chance `share`; wrong with one
    chance in ten thousand on either side."""
    chances = [math.comb(trials, k) * share**k * (1 - share) ** (trials - k) for k in range(trials + 1)]
    return sum(chances[: inside + 1]) > 1e-4 and sum(chances[inside:]) > 1e-4


def sample(values: NDArray[np.float64], people: NDArray[np.int64]) -> Sample:
    return Sample(values, people, np.arange(len(values)))


def drawn(
    rng: np.random.Generator, effects: tuple[float, float, float], persons: int, pictures: int,
    by_person: NDArray[np.float64], first_picture: int = 0,
) -> Sample:  # fmt: skip
    """Values around 1 of people drawn for every picture, as `Casting.groups` draws them."""
    people = rng.random((pictures, len(by_person))).argsort(1)[:, :persons].ravel()
    seen = np.repeat(np.arange(pictures), persons)
    values = 1 + by_person[people] + rng.normal(0, effects[1], pictures)[seen] + rng.normal(0, effects[2], len(people))
    return Sample(values, people, first_picture + seen)


@pytest.mark.parametrize("name", EFFECTS)
def test_intervals_contain_the_truth_as_often_as_they_say(name: str) -> None:
    """With effects of people, of pictures, of both and of neither; for means, and for ratios of means.

    The variance is the sum of both. "The wider of people and of pictures" held the truth 88 times in 100 with both.
    """
    effects, told = EFFECTS[name]
    rng, inside = np.random.default_rng(0), np.zeros(3)
    for _ in range(TRIALS):
        people = rng.normal(0, effects[0], 40)
        three, one, later = (
            drawn(rng, effects, *shape) for shape in ((3, 133, people), (1, 400, people), (3, 133, people, 1000))
        )
        found = estimate(three)
        assert found.mean == pytest.approx(three.values.mean()) and found.low < found.mean < found.high
        inside += [each.low <= 1 <= each.high for each in (found, estimate(one), ratio(later, three))]
    share = inside / TRIALS
    assert (share >= LEAST).all() and share == pytest.approx(told, abs=1e-3), (name, share)


def test_effects_that_the_older_intervals_missed() -> None:
    """If people and pictures matter about equally, the interval of either alone is too narrow."""
    rng = np.random.default_rng(3)
    sums = drawn(rng, (1, 1.8, 0), 3, 133, rng.normal(0, 1, 40))
    people, pictures = (
        estimate(Sample(sums.values, *pair))
        for pair in ((sums.groups[0], np.arange(399)), (np.arange(399), sums.groups[1]))
    )
    widths = [each.high - each.low for each in (estimate(sums), people, pictures)]
    assert widths[0] > 1.15 * max(widths[1:])


def test_of_one_person_or_one_picture_the_other_alone_tells() -> None:
    values = np.random.default_rng(4).normal(0, 1, 30)
    one_person = estimate(Sample(values, np.zeros(30), np.arange(30)))
    assert one_person.high - one_person.mean == pytest.approx(2.0452 * values.std(ddof=1) / np.sqrt(30), rel=1e-4)
    assert estimate(Sample(values, np.arange(30), np.zeros(30))) == one_person
    alone = estimate(Sample([0.5, 0.7], [3, 3], [8, 8]))
    assert alone.mean == pytest.approx(0.6) and np.isnan(alone.low) and str(alone) == "0.600"


def test_surely_is_of_all_cells_of_a_table_together() -> None:
    """For 36 cells, an interval over 40 people is 3.42 / 2.02 = 1.69 times as wide: t(39) at 0.9993 and at 0.975."""
    assert surely([0.05, 0.01, 0.09], 40, 1) and not surely([0.05, 0.01, 0.09], 40, 36)
    assert surely([-0.10, -0.155, -0.045], 40, 36) and not surely([-0.10, -0.160, -0.040], 40, 36)
    assert not surely([0.05, None, None], 40, 1)  # nothing is sure about one picture
    assert surely([0.02, 0.01, 0.09], 40, 4)  # older ones are not symmetrical: each side is widened
    rng, false = np.random.default_rng(5), 0
    for _ in range(TRIALS):
        found = [estimate(sample(rng.normal(0, 1, 80), np.repeat(np.arange(40), 2))) for _ in range(12)]
        false += any(surely([each.mean, each.low, each.high], 40, 12) for each in found)
    assert false / TRIALS < 0.06  # a table in which nothing differs


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
    """People differ, and one is missing in the denominator: the ratio of means, with an interval around it."""
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


@pytest.mark.parametrize("persons", [1, 3])
def test_models_of_one_law_are_not_told_apart(persons: int) -> None:
    """In 128 dimensions, with the same people, one model follows the cases much more closely: zero lies inside."""
    rng, inside = np.random.default_rng(11), 0
    for _ in range(trials := 60):
        people = rng.random((200, 40)).argsort(1)[:, :persons]
        cast, cases = rng.normal(0, 1, (40, 128))[people].mean(1), rng.normal(0, 1, (200, 128))
        truth = 0.6 * cast + 0.8 * rng.normal(0, 1, cases.shape)
        close, loose = (
            0.6 * cast + 0.8 * (r * cases + np.sqrt(1 - r * r) * rng.normal(0, 1, cases.shape)) for r in (0.95, 0.3)
        )
        found = kernel_difference(close, loose, truth, people)
        inside += found.low <= 0 <= found.high
    assert covered(inside, 0.95, trials), inside
    far = kernel_difference(loose * 1.6, close, truth, people)
    assert 0 < far.low < far.mean < far.high


def judgement(rng: np.random.Generator, persons: int = 1, **means: float) -> Judgement:
    """Of 40 pictures of 20 people; every measure 0.5 where no other mean is given."""
    people, pictures = np.tile(np.arange(20.0), 2 * persons), np.repeat(np.arange(40.0), persons)
    values = {name: means.get(name, 0.5) + rng.normal(0, 0.02, len(people)) for name in MEASURES}
    return Judgement(people, pictures, values, rng.normal(0, 1, (40, 4)))


def test_figures_of_every_picture_make_the_table_again(tmp_path: Path) -> None:
    rng = np.random.default_rng(9)
    rows = {"full": judgement(rng, 3, rank1=0.7), "average": judgement(rng, 3)}
    rows["average"].values["text"][::2] = np.nan
    told = table(EXPERIMENTS["persons-3-overlap"], rows, 40, rng.normal(0, 1, (40, 4)))
    write_figures(tmp_path / "a.npz", rows)
    figures = read_figures(tmp_path / "a.npz")
    assert list(figures.values) == list(rows) and list(figures.values["full"]) == list(MEASURES)
    for measure in MEASURES:
        difference = figures.sample("average", measure) - figures.sample("full", measure)
        found = estimate(difference)
        expected = told["rows"]["average"]["minus full"][measure]
        assert (found.mean, found.low, found.high) == pytest.approx(expected, abs=2e-5)
    write_figures(tmp_path / "b.npz", rows)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    (tmp_path / "b.npz").write_bytes((tmp_path / "a.npz").read_bytes()[:400])
    for name in ("b", "missing"):
        with pytest.raises(RequestError, match=f"{name}.npz holds no figures of a table"):
            read_figures(tmp_path / f"{name}.npz")


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
    """Differences that are surely not zero are in bold, others are not; curves where there are several points."""
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
    assert "less that of single values" in page and "intervals are older" not in page
    # each table that was made differently says so
    other = json.loads((tmp_path / "table3-4.json").read_text()) | {"made": {**MADE, "steps": 4}}
    (tmp_path / "table3-4.json").write_text(json.dumps(other))
    write_report(tmp_path)
    page = (tmp_path / "README.md").read_text()
    assert page.count("9 steps of DDIM") == 2 and page.count("4 steps of DDIM") == 1
    # tables with older intervals say so too: each, or the page for all
    old = json.loads((tmp_path / "table3-4.json").read_text())
    assert old.pop("intervals") == METHOD and old.pop("people") == 20
    (tmp_path / "table3-4.json").write_text(json.dumps(old))
    write_report(tmp_path)
    assert (tmp_path / "README.md").read_text().count("intervals are older") == 1
    (tmp_path / "older").mkdir()
    (tmp_path / "older" / "table3-4.json").write_text(json.dumps(old))
    (tmp_path / "older" / "about.md").write_text("These weights are lost.\n")
    write_report(tmp_path / "older")
    page = (tmp_path / "older" / "README.md").read_text()
    assert page.startswith("# Evaluation tables\n\nThese weights are lost.\n\nThese tables show")
    assert page.count("intervals are older") == 1 and "less that of single values" not in page
    (tmp_path / "table3-8.json").write_text("[]")
    with pytest.raises(RequestError, match="table3-8.json is not a table of this version"):
        write_report(tmp_path)
