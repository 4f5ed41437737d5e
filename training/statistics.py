"""Confidence intervals: neither the pictures of one person nor the persons of one picture are independent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import stdtrit

METHOD = "variances of people + pictures - single values, Student's t"
CONFIDENCE = 0.95
Floats = NDArray[np.float64]
Names = NDArray[Any]


@dataclass(frozen=True)
class Estimate:
    """A value and its 95 % interval, which is NaN where it is unknown: for one picture."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3f}" + (f" [{self.low:.3f}, {self.high:.3f}]" if np.isfinite(self.low) else "")


class Sample:
    """Values (N,), NaN where there is none, and the person (N,) and the picture (N,) of every value."""

    def __init__(self, values: ArrayLike, people: ArrayLike, pictures: ArrayLike) -> None:
        self.values = np.asarray(values, np.float64)
        self.groups = np.asarray(people), np.asarray(pictures)

    def __sub__(self, other: Sample) -> Sample:
        """Pair by pair: both are of the same persons in the same pictures."""
        return Sample(self.values - other.values, *self.groups)

    def known(self) -> tuple[Floats, Names, Names]:
        """(values, people, pictures) without NaN."""
        kept = np.isfinite(self.values)
        return self.values[kept], self.groups[0][kept], self.groups[1][kept]


def estimate(sample: Sample) -> Estimate:
    """The mean of all values, and its interval."""
    values, people, pictures = sample.known()
    if not len(values):
        return Estimate(np.nan, np.nan, np.nan)
    mean = float(values.mean())
    return _interval(mean, (values - mean) / len(values), people, pictures)


def ratio(above: Sample, below: Sample) -> Estimate:
    """mean(above) / mean(below), with its interval to first order. A person or picture in both is one group."""
    (a, *of_a), (b, *of_b) = above.known(), below.known()
    if not len(a) or not len(b) or b.mean() == 0:
        return Estimate(np.nan, np.nan, np.nan)
    found = float(a.mean() / b.mean())
    influence = np.concatenate([(a - a.mean()) / len(a), -found * (b - b.mean()) / len(b)]) / b.mean()
    people, pictures = (np.concatenate(pair) for pair in zip(of_a, of_b, strict=True))
    return _interval(found, influence, people, pictures)


def surely(values: Sequence[float | None], groups: int, cells: int) -> bool:
    """Whether zero lies outside of an interval after it was widened for all `cells` differences of a table.

    values: mean, low and high of a 95 % interval over `groups` groups. After the widening, all intervals of the table
    together hold the truth with 95 % (Bonferroni).
    """
    mean, low, high = values
    if mean is None or low is None or high is None:
        return False
    factor = _quantile(groups, cells) / _quantile(groups)
    return mean + (low - mean) * factor > 0 or mean + (high - mean) * factor < 0


def _interval(mean: float, influence: Floats, people: Names, pictures: Names) -> Estimate:
    """The interval of a mean. influence: (N,), by how much each value moves the mean.

    The variance is that of people, plus that of pictures, less that of single values, which both contain. Only chance
    can make it less than the variance of people or of pictures alone, so these are its lower bounds. Sources: Cameron,
    Gelbach, Miller 2011, "Robust inference with multiway clustering"; MacKinnon, Nielsen, Webb 2024, "Jackknife
    inference with two-way clustering".
    """
    pairs = np.unique(np.stack([_numbers(people), _numbers(pictures)], 1), axis=0, return_inverse=True)[1].reshape(-1)
    of_people, of_pictures, of_pairs = (_variance(influence, names) for names in (people, pictures, pairs))
    alone = [variance for variance, count in (of_people, of_pictures) if count > 1]
    if not alone:
        return Estimate(mean, np.nan, np.nan)
    # one person's pictures tell nothing about other people, one picture's persons nothing about other pictures
    variance = max(*alone, of_people[0] + of_pictures[0] - of_pairs[0]) if len(alone) == 2 else alone[0]
    least = min(count for _, count in (of_people, of_pictures) if count > 1)
    half = _quantile(least) * float(np.sqrt(variance))
    return Estimate(mean, mean - half, mean + half)


def _variance(influence: Floats, names: Names) -> tuple[float, int]:
    """The variance of a sum of independent groups, and the number of groups."""
    sums = np.bincount(_numbers(names), influence)
    count = len(sums)
    return float((sums**2).sum()) * count / max(count - 1, 1), count


def _numbers(names: Names) -> NDArray[np.int64]:
    return np.unique(names, return_inverse=True)[1].reshape(-1)


def _quantile(groups: int, cells: int = 1) -> float:
    return float(stdtrit(groups - 1, 1 - (1 - CONFIDENCE) / 2 / cells))


def frechet(one: Floats, other: Floats) -> float:
    """Fréchet distance of two normal distributions with the means and covariances of (N, D) and (M, D) features.

    ‖μ₁ − μ₂‖² + tr(C₁ + C₂ − 2·√(C₁C₂)). It is too large by about D²/N for few features. Source: Heusel et al. 2017,
    "FID".
    """
    c1, c2 = np.cov(one, rowvar=False), np.cov(other, rowvar=False)
    eigenvalues = np.linalg.eigvals(c1 @ c2).real  # of a product of two positive ones: real and not negative
    root = np.sqrt(np.clip(eigenvalues, 0, None)).sum()
    return float(((one.mean(0) - other.mean(0)) ** 2).sum() + np.trace(c1) + np.trace(c2) - 2 * root)


def kernel_difference(one: Floats, other: Floats, truth: Floats, people: ArrayLike) -> Estimate:
    """How much farther `one` is from `truth` than `other`, in KID: without the bias that Fréchet distances have.

    one, other: (N, D) features of the same N cases; people: (N,) or (N, persons), the people of each; truth: (M, D) of
    other pictures than those cases' own truth. The interval takes `truth` as exact: each picture's part comes from
    the jackknife, and pictures that share a person are not independent. Source: Bińkowski et al. 2018, "KID", with its
    kernel (x·y/D + 1)³.
    """
    cast = np.asarray(people).reshape(len(one), -1)
    parts = [_distances(features, truth) for features in (one, other)]
    mean, without = parts[0][0] - parts[1][0], parts[0][1] - parts[1][1]
    names, count = np.unique(cast), len(one)
    if len(names) < 2:
        return Estimate(mean, np.nan, np.nan)
    influence = (without.mean() - without) * (count - 1) / count
    there = (cast[:, :, None] == names).any(1).astype(np.float64)
    together = float(influence @ (there @ there.T > 0) @ influence) * len(names) / (len(names) - 1)
    half = _quantile(len(names)) * float(np.sqrt(max(together, float((influence**2).sum()) * count / (count - 1))))
    return Estimate(mean, mean - half, mean + half)


def _distances(features: Floats, truth: Floats) -> tuple[float, Floats]:
    """The squared distance without the term of the truth alone; and (N,) the same with each feature left out."""
    among = _kernel(features, features)
    np.fill_diagonal(among, 0)
    to_truth, rows, count = _kernel(features, truth).mean(1), among.sum(1), len(features)

    def distance(pairs: Any, crosses: Any, number: int) -> Any:
        return pairs / max(number * (number - 1), 1) - 2 * crosses / max(number, 1)

    whole = float(distance(rows.sum(), to_truth.sum(), count))
    return whole, np.asarray(distance(rows.sum() - 2 * rows, to_truth.sum() - to_truth, count - 1))


def _kernel(one: Floats, other: Floats) -> Floats:
    return np.asarray((one @ other.T / one.shape[1] + 1) ** 3)
