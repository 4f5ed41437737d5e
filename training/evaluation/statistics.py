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


def ratio(above: ArrayLike, below: ArrayLike, groups: ArrayLike, seed: int = 0) -> Estimate:
    """mean(above) / mean(below), both of the same cases."""
    pairs = [_per_group(np.asarray(values, np.float64), np.asarray(groups))[0] for values in (above, below)]
    rng = np.random.default_rng(seed)
    draws = rng.integers(0, len(pairs[0]), (RESAMPLES, len(pairs[0])))
    means = [pair[draws].sum(1) for pair in pairs]
    low, high = np.percentile(means[0] / means[1], [2.5, 97.5])
    return Estimate(float(pairs[0].sum() / pairs[1].sum()), float(low), float(high))


def _per_group(values: NDArray[np.float64], groups: NDArray[np.int64]) -> tuple[NDArray[Any], NDArray[Any]]:
    kept = np.isfinite(values)
    names, index = np.unique(groups[kept], return_inverse=True)
    return np.bincount(index, values[kept], len(names)), np.bincount(index, minlength=len(names))


def frechet(one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    """Fréchet distance of two normal distributions with the means and covariances of (N, D) and (M, D) features.

    ‖μ₁ − μ₂‖² + tr(C₁ + C₂ − 2·√(C₁C₂)). Source: Heusel et al. 2017, "FID".
    """
    c1, c2 = np.cov(one, rowvar=False), np.cov(other, rowvar=False)
    eigenvalues = np.linalg.eigvals(c1 @ c2).real  # of a product of two positive ones: real and not negative
    root = np.sqrt(np.clip(eigenvalues, 0, None)).sum()
    return float(((one.mean(0) - other.mean(0)) ** 2).sum() + np.trace(c1) + np.trace(c2) - 2 * root)
