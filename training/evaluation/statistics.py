"""How sure a mean is: bootstrap over people, since pictures of one person are not independent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

RESAMPLES = 2000
FRECHET_RESAMPLES = 100  # each is an eigenvalue problem


@dataclass(frozen=True)
class Estimate:
    """A mean and its 95 % interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def frechet_difference(
    one: NDArray[np.float64], other: NDArray[np.float64], truth: NDArray[np.float64], seed: int = 0
) -> Estimate:
    """How much nearer `other` is to `truth` than `one`, picture by picture: (N, D) features of the same N cases.

    Both distances are of N pictures, so what few pictures add to either (21 in 128 dimensions at N = 400) is the same.
    """
    rng = np.random.default_rng(seed)
    gains = []
    for _ in range(FRECHET_RESAMPLES):
        drawn = rng.integers(0, len(truth), len(truth))
        gains.append(frechet(one[drawn], truth[drawn]) - frechet(other[drawn], truth[drawn]))
    low, high = np.percentile(gains, [2.5, 97.5])
    return Estimate(frechet(one, truth) - frechet(other, truth), float(low), float(high))


def estimate(values: ArrayLike, groups: ArrayLike, seed: int = 0) -> Estimate:
    """The mean of `values` (N,), and where 95 % of the means of resampled groups lie.

    groups: (N,) whose value it is; whole groups are drawn, with replacement. NaN values are left out.
    """
    sums, counts = _per_group(np.asarray(values, np.float64), np.asarray(groups))
    draws = np.random.default_rng(seed).integers(0, len(counts), (RESAMPLES, len(counts)))
    low, high = np.percentile(sums[draws].sum(1) / counts[draws].sum(1), [2.5, 97.5])
    return Estimate(float(sums.sum() / counts.sum()), float(low), float(high))


def difference(one: ArrayLike, other: ArrayLike, groups: ArrayLike, seed: int = 0) -> Estimate:
    """The mean of one − other, pair by pair: the same people, captions, boxes and seeds."""
    return estimate(np.asarray(one, np.float64) - np.asarray(other, np.float64), groups, seed)


def ratio(
    above: ArrayLike, below: ArrayLike, groups: ArrayLike, groups_below: ArrayLike | None = None, seed: int = 0
) -> Estimate:
    """mean(above) / mean(below). groups_below: whose value each of `below` is, if not the same as above.

    Groups are drawn for both together.
    """
    people = np.asarray(groups), np.asarray(groups if groups_below is None else groups_below)
    names = np.unique(np.concatenate(people))
    (sums, counts), (sums_below, counts_below) = (
        _per_group(np.asarray(values, np.float64), whose, names)
        for values, whose in zip((above, below), people, strict=True)
    )
    draws = np.random.default_rng(seed).integers(0, len(sums), (RESAMPLES, len(sums)))
    means = sums[draws].sum(1) / counts[draws].sum(1) / (sums_below[draws].sum(1) / counts_below[draws].sum(1))
    low, high = np.nanpercentile(means, [2.5, 97.5])
    mean = sums.sum() / counts.sum() / (sums_below.sum() / counts_below.sum())
    return Estimate(float(mean), float(low), float(high))


def _per_group(
    values: NDArray[np.float64], groups: NDArray[Any], names: NDArray[Any] | None = None
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Sum and number of the values of every group, of those in `names` if it is given."""
    kept = np.isfinite(values)
    names = np.unique(groups[kept]) if names is None else names
    index = np.searchsorted(names, groups[kept])
    return np.bincount(index, values[kept], len(names)), np.bincount(index, minlength=len(names))


def frechet(one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    """Fréchet distance of two normal distributions with the means and covariances of (N, D) and (M, D) features.

    ‖μ₁ − μ₂‖² + tr(C₁ + C₂ − 2·√(C₁C₂)). Source: Heusel et al. 2017, "FID".
    """
    c1, c2 = np.cov(one, rowvar=False), np.cov(other, rowvar=False)
    eigenvalues = np.linalg.eigvals(c1 @ c2).real  # of a product of two positive ones: real and not negative
    root = np.sqrt(np.clip(eigenvalues, 0, None)).sum()
    return float(((one.mean(0) - other.mean(0)) ** 2).sum() + np.trace(c1) + np.trace(c2) - 2 * root)
