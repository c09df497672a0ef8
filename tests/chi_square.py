"""Is it the right distribution? Pearson's chi-square test at p = 1e-4, without scipy."""

import torch
from torch import Tensor

NORMAL_QUANTILE = 3.719  # of 1 - 1e-4


def assert_drawn_from(counts: Tensor, probabilities: Tensor) -> None:
    """Fail if `counts` of the cells are unlikely draws from `probabilities` (any one shape)."""
    counts, probabilities = counts.flatten().double(), probabilities.flatten().double()
    assert not counts[probabilities == 0].any(), "drew something impossible"
    expected, order = (probabilities / probabilities.sum() * counts.sum()).sort()
    observed = counts[order]
    # The rarest cells count as one, so that every cell expects at least 5.
    rare = max(int((expected < 5).sum()), int((expected.cumsum(0) < 5).sum()) + 1)
    expected = torch.cat((expected[:rare].sum(0, keepdim=True), expected[rare:]))
    observed = torch.cat((observed[:rare].sum(0, keepdim=True), observed[rare:]))
    statistic = float(((observed - expected) ** 2 / expected).sum())
    assert statistic <= critical(len(expected) - 1), f"chi-square {statistic:.1f} with {len(expected) - 1} degrees"


def critical(degrees: int) -> float:
    """Wilson and Hilferty's approximation of the chi-square quantile."""
    spread = 2 / (9 * degrees) if degrees else 0.0
    return degrees * (1 - spread + NORMAL_QUANTILE * spread**0.5) ** 3
