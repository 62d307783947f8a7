"""How much a score moves from seed to seed, and whether a difference is more than that."""

from collections.abc import Sequence
from math import isfinite
from statistics import fmean, stdev
from typing import NamedTuple

from scipy.stats import ttest_rel


class Difference(NamedTuple):
    """A paired difference: its mean, the ends of its confidence interval, and the p-value of no difference."""

    mean: float
    low: float
    high: float
    p: float

    @property
    def clear(self) -> bool:
        """Whether the interval leaves out zero."""
        return self.low > 0 or self.high < 0


def mean_deviation(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation; the deviation of a single value is not a number."""
    return fmean(values), stdev(values) if len(values) > 1 else float("nan")


def told(values: Sequence[float]) -> str:
    """Mean ± sample standard deviation with one decimal; a single value has no spread, and says so."""
    mean, deviation = mean_deviation(values)
    return f"{mean:.1f} ± {deviation:.1f}" if isfinite(deviation) else f"{mean:.1f} (one seed)"


def paired_difference(ours: Sequence[float], baseline: Sequence[float], level: float = 0.95) -> Difference:
    """Mean of ours − baseline, seed by seed, with Student's t interval: d̄ ± t(n−1) s/√n.

    The same seed gives both the same pictures in the same order, so what they share cancels.
    Raises: ValueError for fewer than two seeds, or for lists of different length.
    """
    if len(ours) != len(baseline) or len(ours) < 2:
        raise ValueError(
            f"{len(ours)} and {len(baseline)} seeds make no paired comparison with an interval. A difference could not "
            "be told from noise; run both with the same two seeds or more."
        )
    differences = [a - b for a, b in zip(ours, baseline)]
    if len(set(differences)) == 1:  # no spread at all, where the t statistic divides by zero
        return Difference(differences[0], differences[0], differences[0], 0.0 if differences[0] else 1.0)
    test = ttest_rel(ours, baseline)
    interval = test.confidence_interval(level)
    return Difference(fmean(differences), float(interval.low), float(interval.high), float(test.pvalue))


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values raised for their number, so that one false alarm among all stays as unlikely as asked [Holm 1979]."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = highest
    return adjusted
