"""How sure a figure is: bootstrap over prompts, paired tests, and no win that could be noise.

Prompts are what is resampled: they are a sample of the prompts that somebody might ask. That says nothing about other
seeds of training or another machine.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product
from typing import NamedTuple

import numpy as np

LEVEL = 0.95
DRAWS = 4000
EXACT = 12
"""Pairs up to which all 2^n sign flips are tried."""
NORMAL = 1.959964
"""Quantile of the normal distribution at 97.5%."""


class Interval(NamedTuple):
    """An estimate and its 95% confidence interval."""

    value: float
    low: float
    high: float

    def excludes(self, value: float) -> bool:
        return not self.low <= value <= self.high


def ratio_interval(numerators: Sequence[float], denominators: Sequence[float]) -> Interval:
    """sum(numerators) / sum(denominators), one of each a prompt; percentile bootstrap over prompts."""
    n, d = np.asarray(numerators, float), np.asarray(denominators, float)
    index = _resamples(len(n))
    return _interval(n.sum() / d.sum(), n[index].sum(1) / d[index].sum(1))


def relative_interval(
    numerators: Sequence[float], denominators: Sequence[float], other: tuple[Sequence[float], Sequence[float]]
) -> Interval:
    """A ratio of sums over another method's ratio of sums on the same prompts, which are resampled together."""
    n, d = np.asarray(numerators, float), np.asarray(denominators, float)
    n0, d0 = (np.asarray(values, float) for values in other)
    index = _resamples(len(n))
    value = n.sum() / d.sum() / (n0.sum() / d0.sum())
    return _interval(value, n[index].sum(1) / d[index].sum(1) / (n0[index].sum(1) / d0[index].sum(1)))


def mean_interval(values: Sequence[float]) -> Interval:
    """Mean over prompts; percentile bootstrap."""
    return ratio_interval(values, [1.0] * len(values))


def share_interval(right: Sequence[bool]) -> Interval:
    """Share of True; Wilson's interval, which unlike a bootstrap is not a point where all answers are wrong."""
    n, share = len(right), sum(right) / len(right)
    centre = (share + NORMAL**2 / (2 * n)) / (1 + NORMAL**2 / n)
    half = NORMAL / (1 + NORMAL**2 / n) * math.sqrt(share * (1 - share) / n + NORMAL**2 / (4 * n * n))
    return Interval(share, max(0.0, centre - half), min(1.0, centre + half))


def share_error(right: Sequence[bool]) -> float:
    """Standard error of the share of True."""
    share = sum(right) / len(right)
    return math.sqrt(share * (1 - share) / max(1, len(right) - 1))


def paired_p(differences: Sequence[float], draws: int = 20_000) -> float:
    """Two-sided p-value of "these paired differences are centred at zero": the sign-flip permutation test.

    For differences of right and wrong (1, 0, -1) it is McNemar's exact test. All flips are tried for up to EXACT
    differences that are not zero, else `draws` random ones.
    """
    nonzero = np.asarray([d for d in differences if d], float)
    if not len(nonzero):
        return 1.0
    seen = abs(nonzero.sum()) * (1 - 1e-12)  # sums of the same numbers in another order may differ in the last bit
    if len(nonzero) <= EXACT:
        signs = np.array(list(product((-1.0, 1.0), repeat=len(nonzero))))
        return float((np.abs(signs @ nonzero) >= seen).mean())
    signs = np.random.default_rng(0).choice((-1.0, 1.0), (draws, len(nonzero)))
    return float((1 + (np.abs(signs @ nonzero) >= seen).sum()) / (1 + draws))


def smallest_p(pairs: int) -> float:
    """The p-value of `pairs` differences that all have one sign: no result is surer."""
    return min(1.0, 2.0 ** (1 - pairs))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's correction: p-values that may all be compared with one level, however many comparisons there are."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, most = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        most = max(most, min(1.0, p_values[i] * (len(p_values) - rank)))
        adjusted[i] = most
    return adjusted


def verdict(effect: Interval, nothing: float, p: float) -> str:
    """ "better" or "worse" where both the corrected test and the interval of the effect say so, else "not shown"."""
    if p >= 1 - LEVEL or not effect.excludes(nothing):
        return "not shown"
    return "better" if effect.value > nothing else "worse"


def _resamples(count: int) -> np.ndarray:
    """[DRAWS, count] prompts of each resample; the same for all methods and every time a report is made."""
    return np.random.default_rng(0).integers(0, count, (DRAWS, count))


def _interval(value: float, drawn: np.ndarray) -> Interval:
    low, high = np.quantile(drawn, ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    return Interval(float(value), float(low), float(high))
