"""How sure a mean is: resampled by person and by picture.

Neither the pictures of one person nor the persons of one picture are independent.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

RESAMPLES = 2000
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A value and its 95 % interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


class Sample:
    """Values (N,), NaN where nothing can be said; of every value the person (N,) and the picture (N,) that it is of."""

    def __init__(self, values: ArrayLike, people: ArrayLike, pictures: ArrayLike) -> None:
        self.values = np.asarray(values, np.float64)
        self.groups = np.asarray(people), np.asarray(pictures)

    def __sub__(self, other: Sample) -> Sample:
        """Pair by pair: both are of the same persons in the same pictures."""
        return Sample(self.values - other.values, *self.groups)


def estimate(sample: Sample, seed: int = 0) -> Estimate:
    """The mean, and where 95 % of the means of resampled people lie, or of resampled pictures if that is wider."""
    return _widest(lambda by: _bootstrap(_sums(sample, by, _names(sample, by)), None, seed))


def ratio(above: Sample, below: Sample, seed: int = 0) -> Estimate:
    """mean(above) / mean(below). Who or what is in both is drawn for both together."""

    def interval(by: int) -> Estimate:
        names = np.union1d(above.groups[by], below.groups[by])
        return _bootstrap(_sums(above, by, names), _sums(below, by, names), seed)

    return _widest(interval)


Sums = tuple[Floats, Floats]  # of the values of every group, and how many they are


def _sums(sample: Sample, by: int, names: NDArray[Any]) -> Sums:
    kept = np.isfinite(sample.values)
    index = np.searchsorted(names, sample.groups[by][kept])
    sums = np.bincount(index, sample.values[kept], len(names))
    return sums.astype(np.float64), np.bincount(index, minlength=len(names)).astype(np.float64)


def _names(sample: Sample, by: int) -> NDArray[Any]:
    return np.unique(sample.groups[by][np.isfinite(sample.values)])


def _bootstrap(above: Sums, below: Sums | None, seed: int) -> Estimate:
    count = len(above[0])
    if not count:
        return Estimate(np.nan, np.nan, np.nan)
    draws = np.random.default_rng(seed).integers(0, count, (RESAMPLES, count))
    with np.errstate(divide="ignore", invalid="ignore"):
        mean, means = above[0].sum() / above[1].sum(), above[0][draws].sum(1) / above[1][draws].sum(1)
        if below is not None:
            mean /= below[0].sum() / below[1].sum()
            means /= below[0][draws].sum(1) / below[1][draws].sum(1)
    finite = means[np.isfinite(means)]
    low, high = np.percentile(finite, [2.5, 97.5]) if len(finite) else (np.nan, np.nan)
    return Estimate(float(mean), float(low), float(high))


def _widest(interval: Callable[[int], Estimate]) -> Estimate:
    return max((interval(by) for by in (0, 1)), key=lambda found: found.high - found.low)


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

    one, other: (N, D) features of the same cases, people (N,) whose; truth: (M, D) of other pictures than those cases'
    own truth. The interval is the jackknife's over people, given `truth`. Source: Bińkowski et al. 2018, "KID", with
    its kernel (x·y/D + 1)³.
    """
    whose = np.asarray(people)
    groups = [np.flatnonzero(whose == who) for who in np.unique(whose)]
    parts = [_distances(features, truth, groups) for features in (one, other)]
    mean, without = parts[0][0] - parts[1][0], parts[0][1] - parts[1][1]
    if len(groups) < 2:
        return Estimate(mean, np.nan, np.nan)
    error = np.sqrt((len(groups) - 1) / len(groups) * ((without - without.mean()) ** 2).sum())
    return Estimate(mean, float(mean - 1.96 * error), float(mean + 1.96 * error))


def _distances(features: Floats, truth: Floats, groups: list[NDArray[np.int64]]) -> tuple[float, Floats]:
    """The squared distance but for what hangs on the truth alone; and the same without each of the groups."""
    among = _kernel(features, features)
    np.fill_diagonal(among, 0)
    to_truth, rows, count = _kernel(features, truth).mean(1), among.sum(1), len(features)

    def distance(pairs: float, crosses: float, number: int) -> float:
        return pairs / max(number * (number - 1), 1) - 2 * crosses / max(number, 1)

    whole = distance(float(rows.sum()), float(to_truth.sum()), count)
    without = [
        distance(
            float(rows.sum() - 2 * rows[group].sum() + among[np.ix_(group, group)].sum()),
            float(to_truth.sum() - to_truth[group].sum()),
            count - len(group),
        )
        for group in groups
    ]
    return whole, np.array(without)


def _kernel(one: Floats, other: Floats) -> Floats:
    return np.asarray((one @ other.T / one.shape[1] + 1) ** 3)
