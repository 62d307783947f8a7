"""Spread: against formulas written out, and what cannot be compared."""

import math

import numpy as np
import pytest

from sptseg_lib.spread import holm, mean_deviation, paired_difference, told


def test_mean_and_deviation():
    values = [3.0, 5.0, 10.0]
    mean, deviation = mean_deviation(values)
    assert mean == 6 and deviation == pytest.approx(np.std(values, ddof=1))
    assert math.isnan(mean_deviation([4.0])[1])
    assert told(values) == "6.0 ± 3.6" and told([4.0]) == "4.0 (one seed)"


def test_paired_difference_is_students_interval():
    ours, baseline = [60.0, 64.0, 59.0], [50.0, 57.0, 51.0]
    found = paired_difference(ours, baseline)
    d = np.subtract(ours, baseline)
    half = 4.302652729911275 * d.std(ddof=1) / 3**0.5  # t of 2 degrees of freedom, 95 % two-sided
    assert found.mean == pytest.approx(d.mean())
    assert (found.low, found.high) == pytest.approx((d.mean() - half, d.mean() + half))
    assert found.clear and not paired_difference(ours, [70.0, 57.0, 51.0]).clear


def test_pairing_cancels_what_seeds_share():
    assert paired_difference([10.0, 50.0, 91.0], [8.0, 48.5, 88.5]).clear


def test_equal_differences_have_no_width():
    assert paired_difference([2.0, 3.0], [1.0, 2.0]) == (1.0, 1.0, 1.0, 0.0)
    assert paired_difference([2.0, 3.0], [2.0, 3.0]).p == 1.0


@pytest.mark.parametrize("ours, baseline", [([1.0], [2.0]), ([1.0, 2.0], [1.0, 2.0, 3.0])])
def test_what_is_no_pair_is_refused(ours, baseline):
    with pytest.raises(ValueError, match="same two seeds"):
        paired_difference(ours, baseline)


def test_holm_raises_p_values_by_their_rank():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
